"""Tokens per second, memory and traffic of systems that place their KV caches differently, on the same inputs.

    python -m eval.throughput --model=random:opt_1.3b --dtype=float16 --batch=16 --prompt_tokens=128 --new_tokens=512 \\
        --device_kv_bytes=0.33x --host_kv_bytes=1x --trace=bundled --out=throughput.jsonl
    python -m eval.throughput --system='flexgen | dense' --system='alisa | swa(kv_sparsity=0.8) | int8' --device_kv_bytes=8MB
    python -m eval.throughput --model=random:opt_30b --dtype=float16 --batch=64 --simulate --hardware=h100_80gb

A system is 'controller | policy | codec', so each baseline runs as its authors run it; the default policy is dense, the
default codec raw. Byte flags take 2GB, 512MiB, or a multiple of the dense KV such as 0.33x (raw, of --batch sequences of
--prompt_tokens + --new_tokens - 1 tokens); they limit everything that a cache keeps, including statistics and staging. A
system that does not fit is OOM, with the reason below the table.

Every system runs once untimed, which compiles, then --repeats times; the systems take turns. Times and rates are medians,
with `_min` and `_max` beside them; tokens_per_s = batch * new_tokens / (prefill_s + decode_s). Bytes are those of the arrays
that live and travel in one run. A row is a token of one layer and sequence: `loaded_rows` were copied to the device (under
alisa, as the exchange asked), `recomputed_rows` were computed again, by prefills of `recomputed_tokens` tokens in all. p1 is
the first step that keeps something off the device, p2 the first that deletes something; new_tokens means never. At most
`effective_batch` sequences run at once. `tokens_sha256` hashes the new tokens: systems that differ only in the controller
have the same hash, unless a controller splits the batch under a --trace.

Prompts are cut from --text where the model has a tokenizer, else their ids are drawn; --ragged draws their lengths. Under
random weights SWA's selection hardly changes, so --trace makes every SWA attend what it attends in a trained model that
reads --text (`eval/speed/traces.py`). --simulate prices the same systems on a page of configs/hardware instead, and all its
numbers are modelled (`alisa_jax/placement/modelled/cost.py`); the default budgets are then what weights and activations
leave of the device, and the host's memory. The model has no spare slots: a token that enters a set is copied, although
most of them left it shortly before and would still be there. Without --trace it assumes the entering tokens per step of
trained models.

Beside the rows that a system under a --trace loads stands what Belady's oracle loads, `belady_rows`: no placement with as
many rows on the device loads fewer (`alisa_jax/placement/modelled/belady.py`). The paper names this oracle among caching
policies and calls it impractical, because it needs to know every selection to come; here they are recorded.
`rows_over_belady` is (loaded_rows + recomputed_rows) / belady_rows.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

import alisa_jax
from alisa_jax import placement, policies
from alisa_jax.placement import mover
from alisa_jax.placement.modelled.cost import Cost
from eval.drawing import systems as drawing
from eval.modelled import machines, shapes
from eval.script import common, inputs
from eval.script.common import UserError
from eval.speed import bounds, systems, timing, traces
from eval.speed.systems import System, Work
from eval.text import windows

SELECTION_US = 50.0  # modelled: what selecting adds to a layer of a step


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = common.shared_flags("bundled", windows.BUNDLED, None)
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_integer("batch", 4, "Sequences.", **one)
    flags.DEFINE_integer("prompt_tokens", 128, "Tokens of each prompt; the most, with --ragged.", **one)
    flags.DEFINE_integer("new_tokens", 128, "New tokens of each sequence.", **one)
    flags.DEFINE_bool("ragged", False, "Prompts of half of --prompt_tokens to all of it.", **where)
    flags.DEFINE_string("device_kv_bytes", None, "Device budget of the cache. Default: none.", **where)
    flags.DEFINE_string("host_kv_bytes", None, "Host budget of the cache. Default: none.", **where)
    flags.DEFINE_multi_string("system", systems.DEFAULTS, "controller | policy | codec; may be repeated.", **where)
    flags.DEFINE_integer("repeats", 3, "Timed runs of each system.", **one)
    flags.DEFINE_string("trace", None, "Replay what SWA attends in this trained model: bundled or a folder.", **where)
    flags.DEFINE_bool("simulate", False, "Price the systems on --hardware; nothing runs.", **where)
    flags.DEFINE_string("hardware", None, "A page of configs/hardware, this_machine, or a profile.", **where)
    flags.DEFINE_enum("read", "rows", ("rows", "pages"), "What --simulate can read from host pages.", **where)
    flags.DEFINE_string("plot", None, "PNG file for a figure of tokens per second.", **where)
    common.dtype_flag(values)
    common.impl_flag(values)
    common.parse(values, argv, __doc__)
    if values.simulate and values.hardware is None:
        raise UserError("--simulate prices a machine: name it with --hardware")
    if values.hardware is not None and not values.simulate:
        raise UserError(f"--hardware={values.hardware} is for modelled runs: give --simulate too")
    if values.simulate and values.attention_impl != "auto":
        raise UserError("--attention_impl chooses what runs, and --simulate runs nothing")
    if not 0 <= values.seed < 2**32:
        raise UserError(f"--seed must be in 0..{2**32 - 1}, got {values.seed}")
    if values.plot is not None and not Path(values.plot).parent.is_dir():
        raise UserError(f"--plot: there is no folder {str(Path(values.plot).parent)!r}")
    return values


def main(
    argv: Sequence[str],
    load: Callable = alisa_jax.load,
    build: Callable = timing.build,
    recorded: Callable = traces.recorded,
) -> None:
    """flags -> numbers -> what fits -> runs -> records. The arguments beside `argv` are for tests and `eval.gpu`."""
    values = config(argv)
    inputs.check_impl(values.attention_impl)
    chosen = tuple(dict.fromkeys(systems.parse(text) for text in values.system))
    shaped, card = shapes.config(values.model), inputs.card(values.model)
    machine = machines.hardware(values.hardware) if values.simulate else None
    work = _work(values, shaped, machine)
    traced = None if values.trace is None else traces.card(values.trace, chosen, work)
    read = traced is not None or (systems.has_tokenizer(values.model) and not values.simulate)
    source = windows.read(values.text) if read else None
    reasons = {system: systems.refusal(system, work) for system in chosen}
    if all(reasons.values()):
        raise UserError("the budgets refuse every system: " + "; ".join(f"{s}: {why}" for s, why in reasons.items()))
    for system in chosen if values.simulate else ():
        traces.check_priced(system)
    if not values.simulate:
        _check_host(chosen)
    results = inputs.results(values.out)

    cells = {system: _cell(values, system, card, work, machine, traced, source) for system in chosen}
    here = {} if values.simulate else inputs.here()
    records = {s: None if results is None or values.rerun else results.find(c | here) for s, c in cells.items()}
    reused = sum(record is not None for record in records.values())
    waiting = [s for s in chosen if records[s] is None and reasons[s] is None]
    replayed = recorded(values.trace, waiting, work, source, load) if traced is not None else {}

    def keep(system: System, found: dict, wall_s: float | None) -> None:
        trace = replayed.get(system.policy)
        if trace is not None:
            found |= trace.fields()
            if "loaded_rows" in found:  # it ran
                found |= bounds.fields(system, work, trace, found["loaded_rows"] + found["recomputed_rows"])
        records[system] = inputs.record(results, cells[system], found, wall_s, _how(values))

    for system in chosen:
        if records[system] is None and reasons[system] is not None:
            keep(system, timing.oom(reasons[system]), None)
    if values.simulate:
        for system in tqdm(waiting, desc="systems", disable=None, leave=False):
            began = time.perf_counter()
            found = timing.price(system, work, _cost(machine, system, work), replayed.get(system.policy))
            keep(system, found, time.perf_counter() - began)
    elif waiting:
        model = inputs.model(lambda name: load(name, work.dtype, values.seed), values.model)
        prompts = _prompts(values.seed, work, model, source)
        budgets = work.device_kv_bytes, work.host_kv_bytes
        policy = {s: traces.policy(s.policy, replayed.get(s.policy), work.config.n_layers) for s in waiting}
        impl = common.impl_field(values.attention_impl)
        built = {s: build(model, policy[s], s.codec, s.controller, *budgets, **impl) for s in waiting}
        timing.measure(built, prompts, values.new_tokens, values.repeats, keep)

    if reused:
        common.say(f"{reused} of {len(records)} systems were already in {values.out}; --rerun runs them again")
    found = list(records.values())
    common.emit(found, report(found), values.json)
    if values.plot:
        common.say(drawing.rates(found, Path(values.plot)))


def _work(values, shaped, machine) -> Work:
    """What every system is given."""
    platform = "gpu" if values.simulate else None  # a machine that is priced computes in the file's type
    dtype, batch = inputs.resolved(values.model, values.dtype, platform), values.batch
    if values.prompt_tokens + values.new_tokens > shaped.max_positions:
        raise UserError(
            f"--new_tokens: the model has {shaped.max_positions} positions, and {values.prompt_tokens} + "
            f"{values.new_tokens} are asked for"
        )
    lengths = [values.prompt_tokens] * batch
    if values.ragged:
        half = -(-values.prompt_tokens // 2)
        lengths = np.random.default_rng(values.seed).integers(half, values.prompt_tokens, batch, endpoint=True).tolist()
    device = host = math.inf
    if machine is not None:
        shape = shapes.shape(shaped, shapes.codec("raw", dtype), dtype)
        taken = shape.weight_bytes + shape.activation_bytes(batch, values.prompt_tokens)
        device, host = machine.device_bytes - taken, machine.host_bytes
        if device <= 0:
            raise UserError(
                f"--hardware: weights and activations need {machines.bytes_text(taken)}, and the device has "
                f"{machines.bytes_text(machine.device_bytes)}"
            )
    whole = systems.dense_kv_bytes(shaped, dtype, batch, values.prompt_tokens + values.new_tokens - 1)
    if values.device_kv_bytes is not None:
        device = machines.read_bytes(values.device_kv_bytes, whole, "--device_kv_bytes")
    if values.host_kv_bytes is not None:
        host = machines.read_bytes(values.host_kv_bytes, whole, "--host_kv_bytes")
    return Work(shaped, dtype, tuple(lengths), values.new_tokens, device, host, values.read == "rows")


def _check_host(chosen: Sequence[System]) -> None:
    """Refuse controllers that offload where the machine cannot."""
    if any(placement.parse(system.controller).offloads for system in chosen):
        try:
            mover.self_test()
        except RuntimeError as error:
            raise UserError(f"--system: {error}") from None


def _cell(values, system: System, card, work: Work, machine, traced, source) -> dict:
    """What identifies a record. A trace is of no account to a policy that it cannot change."""
    traced = traced if isinstance(policies.parse(system.policy), policies.Swa) else None
    prompts = None if values.simulate else "text" if systems.has_tokenizer(values.model) else "drawn ids"
    source = source if traced is not None or prompts == "text" else None
    return {
        "script": "eval.throughput",
        **card.fields(),
        **system.fields(),
        "dtype": work.dtype,
        "batch": values.batch,
        "prompt_tokens": values.prompt_tokens,
        "ragged": values.ragged,
        "new_tokens": values.new_tokens,
        "device_kv_bytes": work.device_kv_bytes,
        "host_kv_bytes": work.host_kv_bytes,
        "prompts": prompts,
        "data": None if source is None else source.name,
        "data_sha256": None if source is None else source.sha256,
        "trace": None if traced is None else traced.name,
        "trace_sha256": None if traced is None else traced.sha256,
        "hardware": None if machine is None else machine.name,
        "read": values.read if values.simulate else None,
        "repeats": None if values.simulate else values.repeats,
        "seed": values.seed,
        **common.impl_field(values.attention_impl),
    }


def _cost(machine, system: System, work: Work) -> Cost:
    shape = shapes.shape(work.config, shapes.codec(system.codec, work.dtype), work.dtype)
    return Cost(machine, shape, selection_s=SELECTION_US * 1e-6)


def _how(values) -> dict:
    """How the values were got."""
    if values.simulate:
        return {"measured": False, "selection_us": SELECTION_US}
    return {"warmup": 1}


def _prompts(seed: int, work: Work, model, source) -> list[list[int]]:
    """Token ids of every prompt."""
    lengths = work.prompt_tokens
    if source is None or model.tokenizer is None:
        rng = np.random.default_rng([seed, 1])
        return [rng.integers(0, work.config.vocab_size, n).tolist() for n in lengths]
    cut = traces.cut(source, model, max(lengths), len(lengths))
    if len(cut) < len(lengths):
        raise UserError(f"--text: {source.name} has {len(cut)} windows of {max(lengths)} tokens, fewer than --batch")
    return [row[:n] for row, n in zip(cut, lengths, strict=True)]


def report(records: Sequence[dict]) -> str:
    """The table for people, what holds for all rows above it and what a row is about below."""
    first = records[0]
    head = ["system", "tokens/s", "ratio", "prefill s", "decode s", "batch", "device", "host", "loaded", "stored"]
    bounded = any("belady_rows" in r for r in records)
    head += ["loaded rows", "recomputed", *["Belady"] * bounded, "p1", "p2"]
    rates = [r["tokens_per_s"] for r in records]
    base = next((rate for rate in rates if rate != "OOM"), None)
    rows, notes = [], []
    for r in records:
        name = " | ".join(r[key] for key in ("placement", "policy", "codec"))
        if r["note"]:
            notes.append(f"{name}: {r['note']}")
        if r["tokens_per_s"] == "OOM":
            rows.append([name, "OOM", *["-"] * (len(head) - 2)])
            continue
        phases = ["-" if r[p] == r["new_tokens"] else str(r[p]) for p in ("p1", "p2")]
        amounts = [machines.bytes_text(r[f"{key}_bytes"]) for key in ("device_peak", "host_peak", "load", "store")]
        rows.append(
            [
                name,
                common.number(r["tokens_per_s"], ".4g"),
                common.number(r["tokens_per_s"] / base, ".2f") + "x",
                common.number(r["prefill_s"], ".3f"),
                common.number(r["decode_s"], ".3f"),
                str(r["effective_batch"]),
                *amounts,
                common.number(r.get("loaded_rows"), ".0f"),
                common.number(r.get("recomputed_rows"), ".0f"),
                *[common.number(r.get("belady_rows"), ".0f")] * bounded,
                *phases,
            ]
        )
    limits = ", ".join(f"{side} {machines.bytes_text(float(first[f'{side}_kv_bytes']))}" for side in ("device", "host"))
    shape = f"prompts of {first['prompt_tokens']} tokens" + (" at most" if first["ragged"] else "")
    how = f"modelled on {first['hardware']}"
    if first["hardware"] is None:
        how = f"measured on {first['device_kind']}, medians of {first['repeats']} runs after a warm-up"
    trace = next((f"; swa attends as in {r['trace']}" for r in records if r["trace"] is not None), "")
    return "\n".join(
        [
            f"{first['model']} in {first['dtype']}, {first['batch']} {shape}, {first['new_tokens']} new ones{trace}",
            f"{how}; KV budgets: {limits}; tokens/s = {timing.FORMULA['tokens_per_s_formula']}",
            common.table(head, rows),
            *notes,
        ]
    )


if __name__ == "__main__":
    sys.exit(common.run(main))
