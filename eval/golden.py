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

    log-probabilities  to 1e-4 nats; further, by `STEP_NATS`, where a code that a query reads lay on the border of two steps
    tokens             equal up to the first that differs at a margin below that; what follows is not compared
    sets               equal up to members exchanged for others whose score is as near; likewise
    codes              of a token at most one step apart
    bytes, moves       equal; moves where there was no tie; peaks are never compared: they hang on when a copy ends

What else may differ stands in `EXCEPTIONS`, by name and reason. Exit code 1 when anything does.
"""

import fnmatch
import hashlib
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from alisa_jax import records
from eval.quality import golden_cells
from eval.quality.golden_cells import NEW_TOKENS, Cell, Measured
from eval.script import common, inputs
from eval.script.common import UserError

EXIT_DIFFERS = 1
TOLERANCE = 1e-4  # nats, and units of attention: of margins, scores and log-probabilities
VALUES = ("tokens", "logprobs", "margins", "sets", "fed", "kv_bytes", "other_bytes", "codes", "moved")
SAME = tuple("processor cpu_count xla_flags jax_settings python jax jaxlib numpy platform device_kind".split())
# Of codecs that round: how far log-probabilities after the first token may be apart, which reads no code. Sums in another
# order end up on the other side of a border now and then, and a step of one code moves what reads it by more than rounding:
# 6e-3 at most with int8 here. With int4 and skvq, whose borders are fewer, it was seen once, among `EXCEPTIONS`.
STEP_NATS = MappingProxyType({"int8": 1e-2, "int4": 5e-2, "skvq": 5e-2})
CODE_BITS = MappingProxyType({"int4": 4, "skvq": 2})  # of codes that share bytes
EXCEPTIONS = MappingProxyType(  # pattern of cells -> fields, reason
    {
        "stories260K | local(kv_sparsity=0.8) | int4 | resident": (
            ("logprobs", "margins"),
            "without LLVM's optimisation a code of token 86 steps in layer 3 of sequence 2, then a zero point of token 89",
        )
    }
)
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


def processor() -> str:
    """Name, family, model and stepping of the processor, and a hash of what it says it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    first = dict(map(str.strip, line.split(":", 1)) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    can = hashlib.sha256(" ".join(sorted(first.get("flags", "").split())).encode()).hexdigest()[:8]
    number = "/".join(first.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return f"{first.get('model name', platform.machine())} {number} {can}"


def settings() -> dict:
    """Fields of a record beside `records.environment` that say what its bits depend on."""
    names = ("jax_disable_most_optimizations", "jax_enable_x64", "jax_default_matmul_precision")
    return {
        "processor": processor(),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "jax_settings": {name: jax.config.values.get(name) for name in names},
        "numpy": np.__version__,
    }


# Comparison.


@dataclass
class Compared:
    """A cell beside its record; fields by name with what differs."""

    exact: bool
    differs: dict[str, str] = field(default_factory=dict)
    excepted: dict[str, str] = field(default_factory=dict)
    ties: int = 0
    code_steps: int = 0
    stepped: int = 0  # log-probabilities and margins that only `STEP_NATS` allows


def compare(record: Mapping, got: Measured, cell: Cell, exact: bool) -> Compared:
    """`got` beside `record`, to the bit (`exact`) or with the tolerance of the module's docstring."""
    one, record = Compared(exact), golden_cells.untimed(record)
    got = got._replace(values=golden_cells.untimed(got.values))
    missing = [name for name in VALUES if (name in record) != (name in got.values)]
    if missing:
        one.differs |= dict.fromkeys(missing, "one of the two has none")
    elif exact:
        there = [name for name in VALUES if record.get(name) != got.values.get(name)]
        one.differs |= {name: _first(record[name], got.values[name]) for name in there}
    else:
        _tolerant(one, record, got, cell)
    for pattern, (names, reason) in EXCEPTIONS.items():
        for name in one.differs.keys() & set(names) if not exact and fnmatch.fnmatchcase(str(cell), pattern) else ():
            one.excepted[name] = f"{one.differs.pop(name)}; {reason}"
    return one


def _first(old, new, at: str = "") -> str:
    """Where two values differ first, in words."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return next(_first(old[k], new[k], f"{at}[{k}]") for k in old if old[k] != new[k])
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(_first(a, b, f"{at}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    return f"{at or 'it'} is {str(new)[:60]}, was {str(old)[:60]}"


def _tolerant(one: Compared, old: Mapping, got: Measured, cell: Cell) -> None:
    new, codec = got.values, cell.codec.split("(")[0]
    nats = STEP_NATS.get(codec, TOLERANCE)
    upto = _tokens(one, old, new, nats)
    if old.get("fed") != new.get("fed"):
        one.differs["fed"] = "other tokens of a prompt are fed"
    _sets(one, old["sets"], new["sets"], got.scores, upto, nats)
    for b, n in enumerate(upto):
        for name, times in (("logprobs", 1), ("margins", 2)):  # a margin is a difference of two
            far = np.abs(np.subtract(*(np.asarray(of[name][b][:n], np.float64) for of in (old, new)))) / times
            one.stepped += int((far > TOLERANCE).sum())
            wrong = ~(far <= np.where(np.arange(n) > 0, nats, TOLERANCE))
            if wrong.any():
                t = int(wrong.argmax())
                one.differs.setdefault(name, f"sequence {b}, token {t}: {times * far[t]:.1e} nats apart")
    for name in ("kv_bytes", "other_bytes"):
        if old.get(name) != new.get(name):
            one.differs[name] = f"{new[name]}, was {old[name]}"
    if old.get("moved") != new.get("moved") and not one.ties:
        one.differs["moved"] = _first(old["moved"], new["moved"])
    if "codes" in old:
        _codes(one, old["codes"], new["codes"], upto, CODE_BITS.get(codec, 8))


def _tokens(one: Compared, old: Mapping, new: Mapping, nats: float) -> list[int]:
    """Up to which new token each sequence can be compared."""
    upto = []
    for b, (was, now) in enumerate(zip(old["tokens"], new["tokens"], strict=True)):
        t = next((t for t, (x, y) in enumerate(zip(was, now, strict=True)) if x != y), len(was))
        if t < len(was):
            if (margin := min(old["margins"][b][t], new["margins"][b][t])) < nats:
                one.ties += 1
            else:
                text = f"sequence {b}, token {t}: {now[t]}, was {was[t]}, at a margin of {margin:.1e} nats"
                one.differs.setdefault("tokens", text)
        upto.append(t)
    return upto


def _sets(one: Compared, old: list, new: list, scores, upto: list[int], nats: float) -> None:
    """Compare sets, as far as tokens are equal; what follows a tie is taken out of `upto`."""
    agreed = [1] * len(upto)  # tokens before which the sets were equal
    if [(s["made"], s["first"]) for s in old] != [(s["made"], s["first"]) for s in new]:
        if not one.ties:
            one.differs["sets"] = "they are of other steps"
        return
    for was, now, score in zip(old, new, scores, strict=True):
        for layer, pair in enumerate(zip(was["layers"], now["layers"], strict=True)):
            a, b = map(golden_cells.bits_of, pair)
            if a.shape != b.shape:
                one.differs["sets"] = f"layer {layer}: of {b.shape[:2]} sequences and heads, was {a.shape[:2]}"
                return
            for i, p in np.argwhere((a != b).any(-1)).tolist():
                if was["made"] > upto[sequence := was["first"] + i] + 1:
                    continue
                out, into = (np.flatnonzero(x) for x in (a[i, p] & ~b[i, p], b[i, p] & ~a[i, p]))
                known = score[layer] is not None and len(out) == len(into)  # nan: not this one's
                if (
                    known
                    and (np.abs(np.sort(score[layer][i, p, out]) - np.sort(score[layer][i, p, into])) < nats).all()
                ):
                    one.ties += 1
                    upto[sequence] = min(upto[sequence], agreed[sequence])
                else:
                    where = f"layer {layer}, sequence {sequence}, head {p}, after {was['made']} tokens"
                    one.differs.setdefault("sets", f"{where}: {into.tolist()} instead of {out.tolist()}")
        rows = range(was["first"], was["first"] + len(golden_cells.bits_of(was["layers"][0])))
        agreed[rows.start : rows.stop] = [was["made"]] * len(rows)


def _codes(one: Compared, old: Mapping, new: Mapping, upto: list[int], bits: int) -> None:
    for key in old:
        if upto[int(key.split(".")[1])] < NEW_TOKENS:
            continue
        if key not in new or len(old[key]) != len(new[key]):
            one.differs.setdefault("codes", f"{key} is not among them")
            continue
        for was, now in zip(old[key], new[key], strict=True):
            (kind, a), (other, b) = golden_cells.array_of(was), golden_cells.array_of(now)
            if kind != other or a.shape != b.shape:
                one.differs.setdefault("codes", f"{key}: {other} of {b.shape}, was {kind} of {a.shape}")
            elif a.dtype.kind == "f":
                far, most = np.abs(a - b).max(), TOLERANCE * max(1.0, float(np.abs(a).max()))
                if not far <= most:
                    one.differs.setdefault("codes", f"{key}: {far:.1e} apart")
            else:
                if kind == "uint8" and bits < 8:
                    a, b = (np.concatenate([(x >> i) & (2**bits - 1) for i in range(0, 8, bits)]) for x in (a, b))
                far = np.abs(a.astype(int) - b.astype(int))
                one.code_steps += int((far == 1).sum())
                if far.max() > 1:
                    one.differs.setdefault("codes", f"{key}: {far.max()} steps apart")


def summary(cells: Sequence[Cell], found: Sequence[Compared]) -> list[str]:
    """What differs, what may, and how many cells are as they were."""
    lines = []
    for title in ("differs", "excepted"):
        each = zip(cells, found, strict=True)
        rows = [(str(c), *item) for c, one in each for item in getattr(one, title).items()]
        if rows:
            lines += [common.table(("cell", title, "how"), rows, left=3), ""]
    exact, near = (sum(one.exact == kind and not one.differs for one in found) for kind in (True, False))
    ties, steps, stepped = (sum(getattr(one, name) for one in found) for name in ("ties", "code_steps", "stepped"))
    parts = [
        f"{exact} equal to the bit",
        f"{near} within tolerance ({ties} ties, {steps} code steps, {stepped} values moved by such)",
    ]
    lines.append(f"{len(cells)} cells: {', '.join(parts)}, {sum(bool(one.differs) for one in found)} different")
    return lines


if __name__ == "__main__":
    sys.exit(common.run(main))
