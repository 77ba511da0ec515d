"""Golden records: what every policy, codec and controller gives, to the bit, to hold later changes of the library to it.

    python -m eval.golden --out=golden.jsonl                                     the bundled model
    python -m eval.golden --out=golden.jsonl --stories=stories260K               and a folder of stories260K
    python -m eval.golden --check=eval/results/golden.jsonl --stories=stories260K
    python -m eval.golden --check=eval/results/golden.jsonl --cells=10 --seed=3

`eval/quality/golden_cells.py` says what is run: half an hour on two busy CPU cores, three minutes where programs are
kept. A record holds tokens, log-probabilities, margins, selected sets, bytes of the cache, codes of single tokens and, of
placed runs, what was moved.

--check computes cells again. Where processor, settings and versions are those of the record, all must be equal to the bit.
Elsewhere, and with --reordered, for a change that takes sums in another order, values may differ so far:

    log-probabilities  to 1e-4 nats; with a codec that rounds to `STEP_NATS`, but for the first token, which reads no code
    tokens             equal up to the first that differs at a margin below that; what follows is not compared
    sets               equal up to members exchanged for others whose score is within that; likewise
    codes              of a token at most one step apart
    bytes, moves       equal; moves where there was no tie
    peaks              not compared: they depend on when a copy in the background ends

What else may differ stands in `EXCEPTIONS` of `eval/quality/golden_compare.py`, by name and reason. The exit code is 1
when anything differs.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from alisa_jax import records
from eval.quality import golden_cells
from eval.quality.golden_cells import Cell
from eval.quality.golden_compare import Compared, compare, summary
from eval.script import common, inputs, machine
from eval.script.common import UserError

EXIT_DIFFERS = 1
SAME = tuple("processor cpu_count xla_flags jax_settings python jax jaxlib numpy platform device_kind".split())
CLEAR_EVERY = 8  # cells: what they have compiled is freed


def main(argv: Sequence[str], load: Callable = inputs.load, make_engine: Callable = inputs.make_engine) -> None:
    """flags -> models -> cells -> records, or their comparison. Beside `argv` all is for tests."""
    values = common.shared_flags("bundled", "", None)
    del values.model, values.text
    where = {"flag_values": values}
    values["seed"].help = "Seed of the sample of --cells."
    flags.DEFINE_string("stories", None, "Folder of stories260K; without it the bundled model alone is run.", **where)
    flags.DEFINE_string("check", None, "A file of golden records: compute its cells again and compare.", **where)
    flags.DEFINE_bool("reordered", False, "Compare with tolerance, as on another processor.", **where)
    flags.DEFINE_integer("cells", None, "So many cells, drawn with --seed from all kinds.", lower_bound=1, **where)
    flags.DEFINE_string("only", "", "Cells whose name contains this.", **where)
    common.parse(values, argv, __doc__)
    if values.check is not None and values.out is not None:
        raise UserError("give --out, to make records, or --check, to compare with them, and not both")
    if values.reordered and values.check is None:
        raise UserError("--reordered says how to compare, and needs --check")
    try:
        golden = None if values.check is None else records.read(values.check)
    except (OSError, ValueError) as error:
        raise UserError(f"--check: {error}") from None
    names = ["bundled"] + ([] if values.stories is None else [values.stories])
    cards = [inputs.card(name) for name in names]
    results = inputs.results(values.out)
    models = {card.name: inputs.model(load, name) for card, name in zip(cards, names, strict=True)}
    cells = [cell for name, model in models.items() for cell in golden_cells.cells(name, model, make_engine)]
    cells = [cell for cell in cells if values.only in str(cell)]
    if not cells:
        raise UserError(f"--only: no cell's name contains {values.only!r}; one is '{Cell('bundled', 'dense', 'raw')}'")
    cells = cells if values.cells is None else sample(cells, values.cells, values.seed)
    hashes = {card.name: card.fields()["model_sha256"] for card in cards}
    run = lambda cell: golden_cells.measure(cell, models[cell.model], make_engine)
    if golden is None:
        make(cells, hashes, run, results, values)
    elif not check(cells, hashes, run, golden, values):
        sys.exit(EXIT_DIFFERS)


def identity(cell: Cell, hashes: Mapping[str, str]) -> dict:
    """The fields that find the record of a cell."""
    return {**cell.fields(), "model_sha256": hashes[cell.model]}


def make(cells: Sequence[Cell], hashes, run: Callable, results, values) -> None:
    """Records of `cells`; those that are finished in `results` are taken from there."""
    made, reused = [], 0
    for i, cell in enumerate(tqdm(cells, desc="cells", disable=None, leave=False)):
        found = None if results is None or values.rerun else results.find(identity(cell, hashes))
        if found is None:
            began = time.perf_counter()
            got = run(cell).values
            found = inputs.record(results, identity(cell, hashes), got, time.perf_counter() - began, settings())
            free(i)
        else:
            reused += 1
        made.append(found)
    if reused:
        common.say(f"{reused} of {len(cells)} cells were finished in {Path(results.path).name}")
    rows = [(str(cell), f"{record['wall_s']:.1f}") for cell, record in zip(cells, made, strict=True)]
    common.emit(made, common.table(("cell", "s"), rows), values.json)


def check(cells: Sequence[Cell], hashes, run: Callable, golden: Sequence[dict], values) -> bool:
    """Compute `cells` again; prints what differs, and a summary. Returns whether all is as it was."""
    found, began, here = [], time.perf_counter(), {**records.environment(), **settings()}
    for i, cell in enumerate(tqdm(cells, desc="cells", disable=None, leave=False)):
        wanted = identity(cell, hashes)
        record = next((r for r in reversed(golden) if all(r.get(k) == v for k, v in wanted.items())), None)
        if record is None:
            found.append(Compared(False, differs={"record": "there is none of this cell and model"}))
        else:
            same = all(record.get(name) == here[name] for name in SAME) and not values.reordered
            found.append(compare(record, run(cell), cell, same))
            free(i)
    lines = summary(cells, found)
    if left := sorted({r["model"] for r in golden} - {cell.model for cell in cells}):
        lines.append(f"not compared: the records of {', '.join(left)}")
    lines.append(f"{time.perf_counter() - began:.0f} s")
    rows = [{"cell": str(cell), **one.__dict__} for cell, one in zip(cells, found, strict=True)]
    common.emit(rows, "\n".join(lines), values.json)
    return not any(one.differs for one in found)


def free(i: int) -> None:
    """Free what the last cells have compiled, once in a while."""
    if i % CLEAR_EVERY == CLEAR_EVERY - 1:
        jax.clear_caches()


def sample(cells: Sequence[Cell], n: int, seed: int) -> list[Cell]:
    """n cells in their order: as many of every model, placed and not, as there are."""
    draw, kinds = random.Random(seed), {}
    for cell in cells:
        kinds.setdefault((cell.model, cell.placed), []).append(cell)
    for kind in kinds.values():
        draw.shuffle(kind)
    queues, chosen = list(kinds.values()), []
    draw.shuffle(queues)
    while len(chosen) < min(n, len(cells)):
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop())
    return [cell for cell in cells if cell in chosen]


# Where a record was made.


def settings() -> dict:
    """Fields of a record beside `records.environment` that say what its bits depend on."""
    names = ("jax_disable_most_optimizations", "jax_enable_x64", "jax_default_matmul_precision")
    return {
        "processor": machine.processor(),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "jax_settings": {name: jax.config.values.get(name) for name in names},
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    sys.exit(common.run(main))
