"""Part f: `eval.throughput` at OPT-6.7B's shape, in the KV bytes that a V100 of 16 GB leaves beside the weights.

What SWA attends is replayed from the bundled model (`--trace=bundled`), for random weights attend to all tokens alike.
"""

import functools
import json
import tempfile
import time
from pathlib import Path

import alisa_jax
from eval import throughput
from eval.card import small
from eval.modelled import shapes
from eval.speed import systems, timing, traces

MODEL, DTYPE, PROMPT_TOKENS, NEW_TOKENS = "random:opt_6.7b", "float16", 128, 512
BATCHES = (16, 64, 4)
CARD_BYTES = 16e9  # of the paper's V100
FIRST = ("alisa | swa(kv_sparsity=0.8)", "flexgen | dense")  # the paper's two; then the other rows of its comparison
SYSTEMS = (*FIRST, *(name for name in systems.DEFAULTS if name not in FIRST))
DRY = ("--batch=2", "--prompt_tokens=24", "--new_tokens=4", "--device_kv_bytes=2.2x")
DRY_SYSTEM = "alisa | swa(kv_sparsity=0.8)"


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each system and batch, and one for each of its runs, the first of which compiles."""
    if dry:
        with tempfile.TemporaryDirectory() as folder:
            return _run(emit, left, (2,), (DRY_SYSTEM,), (*DRY, f"--model={small.write(Path(folder))}"), seed)
    return _run(emit, left, BATCHES, SYSTEMS, None, seed)


def _run(emit, left, batches, names, dry_flags: tuple[str, ...] | None, seed: int) -> None:
    load = functools.cache(alisa_jax.load)
    recorded = _kept(traces.recorded)
    for batch in batches:
        for system in names:
            if left() < 0:
                return
            flags = dry_flags or _flags(batch) + (("--trace=bundled",) if "swa" in system else ())

            def measure(system=system, flags=flags, batch=batch) -> dict:
                def build(*args, **kwargs):
                    return _Told(timing.build(*args, **kwargs), emit, f"b{batch} {system} run")

                return _throughput((*flags, f"--system={system}", f"--seed={seed}"), load, build, recorded)

            emit.attempt(f"b{batch} {system}", measure)


def budget(batch: int) -> float:
    """Bytes that weights and activations leave of the V100, whatever this card has."""
    config = shapes.config(MODEL)
    shape = shapes.shape(config, shapes.codec("raw", DTYPE), DTYPE)
    return CARD_BYTES - shape.weight_bytes - shape.activation_bytes(batch, PROMPT_TOKENS)


def _flags(batch: int) -> tuple[str, ...]:
    sizes = f"--batch={batch}", f"--prompt_tokens={PROMPT_TOKENS}", f"--new_tokens={NEW_TOKENS}"
    return f"--model={MODEL}", f"--dtype={DTYPE}", *sizes, f"--device_kv_bytes={int(budget(batch))}"


def _throughput(flags: tuple[str, ...], load, build, recorded) -> dict:
    """The record that `eval.throughput` makes of one system."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        argv = ["eval.throughput", *flags, "--repeats=1", "--compile_cache=none", f"--out={out}"]
        throughput.main(argv, load=load, build=build, recorded=recorded)
        record = json.loads(out.read_text().splitlines()[-1])
    return {key: value for key, value in record.items() if key not in ("basis", "wall_s", "seed")}


class _Told:
    """An engine that records each of its runs as it ends: a system that is stopped in its second has its first."""

    def __init__(self, engine, emit, cell: str):
        self.engine = engine
        self.emit = emit
        self.cell = cell
        self.runs = 0

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def generate(self, prompts, new: int, eos_ids=(), progress: bool = False):
        began = time.perf_counter()
        made = self.engine.generate(prompts, new, eos_ids, progress)
        moved = made.placement
        self.runs += 1
        self.emit(
            {
                "cell": f"{self.cell} {self.runs}",
                "batch": len(prompts),
                "new_tokens": new,
                "tokens_per_s": made.tokens_per_s,
                "prefill_s": made.prefill_s,
                "decode_s": made.decode_s,
                "load_bytes": moved.load_bytes,
                "store_bytes": moved.store_bytes,
                "compiles": made.compiles,
                "host_reads": moved.host_reads,
                "device_peak_bytes": moved.device_peak_bytes,
                "tokens_sha256": timing.digest(made.tokens),
                "run_s": time.perf_counter() - began,
            }
        )
        return made


def _kept(recorded):
    """`traces.recorded` that makes each trace once."""
    made = {}

    def find(name, waiting, work, source, load):
        keys = {system: (name, system.policy, work.prompt_tokens, work.new_tokens) for system in waiting}
        if missing := [system for system in waiting if keys[system] not in made]:
            found = recorded(name, missing, work, source, load)
            made.update({keys[s]: found[s.policy] for s in missing if s.policy in found})
        return {s.policy: made[keys[s]] for s in waiting if keys[s] in made}

    return find
