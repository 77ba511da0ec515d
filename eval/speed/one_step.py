"""One decode step of each cell, by the checkout in whose folder this process runs: measured, or kept.

    PYTHONPATH=CHECKOUT python -P eval/speed/one_step.py JOB        JOB: a JSON object, see `Job`

`eval.checkouts` has steps measured, `eval.in_turn` has their programs kept. It is run as a file, for an older checkout has
none, and may use only names that both checkouts have. Its last line on stdout is a JSON object: `folder`, where the library
was imported from, and `records`, one for each cell that was measured.
"""

import functools
import gc
import hashlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

import alisa_jax
from alisa_jax import records
from alisa_jax.engine import step
from eval.speed import cells, ours

WARMUP = 8  # steps: the first of a process takes three times as long as the others


class Job(NamedTuple):
    """What the command asks for."""

    cells: tuple[tuple[str, str], ...]  # model, and the name of a system of the suite decode
    batch: int
    context: int  # tokens in the caches after the last step
    steps: int
    seed: int
    fields: dict  # of every record, beside those that the cell has
    keep_in: str | None = None  # a folder for compiled steps and what they are given; nothing is measured then


def main(argv: list[str]) -> None:
    job = Job(**json.loads(argv[1]))
    load = functools.lru_cache(1)(lambda name: ours.model(name, job.context, job.seed))
    found = []
    for name, system in job.cells:
        began = time.perf_counter()
        cell = cells.Cell("decode", name, job.batch, job.context, rounds=job.steps, steps=1)
        if job.keep_in is not None:
            keep(load(name), cell, system, job.seed, kept_file(job.keep_in, name, system))
            continue
        fields = {
            **job.fields,
            "model": name,
            "row": system,
            **cell.fields(),
            **cells.SYSTEMS["decode"][system].fields(),
        }
        values, how = measure(load(name), cell, system, job.seed)
        how |= {"warmup": WARMUP, "repeats": job.steps}
        found.append(records.make_record(fields, values, wall_s=time.perf_counter() - began, **how))
        gc.collect()
        jax.clear_caches()
    folder = Path(alisa_jax.__file__).parent.parent
    print(json.dumps({"folder": str(folder), "records": found}, allow_nan=False))


def measure(model, cell, system: str, seed: int) -> tuple[dict, dict]:
    """Values of one cell, and what ran. The step that is timed is the compiled program whose costs are read."""
    engine, start, kv, token = filled(model, cell, system, seed)
    program = jax.jit(functools.partial(_step, model.decoder), donate_argnums=1)
    began = time.perf_counter()
    compiled = program.lower(model.params, kv, token).compile()
    compile_s = time.perf_counter() - began
    seconds, tokens = [], []
    for _ in range(WARMUP + cell.rounds):
        began = time.perf_counter()
        logits, kv = jax.block_until_ready(compiled(model.params, kv, token))
        seconds.append(time.perf_counter() - began)
        token = jnp.asarray(np.argmax(logits, axis=-1).astype(np.int32))
        tokens.append(np.asarray(token))
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    rows = np.stack(tokens, axis=1).astype("<i4")
    values = {
        "seconds_per_step": float(np.median(seconds[WARMUP:])),
        "seconds_per_step_quartiles": np.percentile(seconds[WARMUP:], [25, 75]).tolist(),
        "bytes_accessed": costs["bytes accessed"],
        "flops": costs["flops"],
        "temp_bytes": memory.temp_size_in_bytes,
        "compile_s": compile_s,
        "start_tokens": start,
        "tokens_sha256": [hashlib.sha256(row.tobytes()).hexdigest()[:8] for row in rows],
    }
    return values, ours.ran(engine)


def filled(model, cell, system: str, seed: int) -> tuple:
    """An engine, the tokens in its caches, its states with keys and values that are drawn, and the next token [B]."""
    start, config = cell.start(WARMUP + cell.rounds), model.decoder.config
    engine = ours.engine(model, cells.SYSTEMS["decode"][system], None)
    side = ours.Decoding(engine, cell, start)
    for layer in range(config.n_layers):
        side.fill(layer, *cells.drawn(config, cell, start, seed, layer))
    kv = tuple(side.kv) if isinstance(side.kv, list) else side.kv  # a list while layers are filled
    return engine, start, kv, side.token


def kept_file(folder: str, name: str, system: str) -> Path:
    """Where `keep` writes a cell."""
    return Path(folder) / f"{name.replace(':', '_')}-{system}.pickle"


def keep(model, cell, system: str, seed: int, path: Path) -> None:
    """Write a step as another process can run it: compiled, of flat lists of arrays, with what it is given first."""
    _, _, kv, token = filled(model, cell, system, seed)
    params, of_params = jax.tree.flatten(model.params)
    states, of_states = jax.tree.flatten(kv)

    def flat(params, states, token):
        given = jax.tree.unflatten(of_params, params), jax.tree.unflatten(of_states, states)
        logits, kv = _step(model.decoder, *given, token)
        return logits, jax.tree.leaves(kv)

    compiled = jax.jit(flat, donate_argnums=1).lower(params, states, token).compile()
    program = serialize_executable.serialize(compiled)
    with path.open("wb") as file:
        pickle.dump((program, *jax.tree.map(np.asarray, (params, states, token))), file)


def _step(decoder, params, kv, token):
    """Logits [B, V] and states after one step; its taps are dropped, as an engine drops them."""
    return step.decode(decoder, params, kv, token)[:2]


if __name__ == "__main__":
    main(sys.argv)
    sys.stdout.flush()
    os._exit(0)  # in the end of the interpreter, a thread of XLA that lets go of the GIL can crash Python 3.12
