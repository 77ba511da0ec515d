"""Before a run: what it needs, whether it fits, where its tokens would live, and what each controller would reach.

    python -m eval.plan --model=opt_30b --hardware=h100_80gb --batch=64 --prompt_tokens=128 --new_tokens=512
    python -m eval.plan --model=opt_6.7b --hardware=v100_16gb --batch=16 --codec='int8(axis=token)' --json
    python -m eval.plan --model=FOLDER --hardware=this_machine --device_kv_bytes=0.33x --host_kv_bytes=2GB
    python -m eval.plan --profile --out=this_machine.json
    python -m eval.plan --models > configs/models.md

Nothing is loaded and nothing runs: all numbers are modelled (`alisa_jax/placement/modelled/cost.py`) from the shape of
the model and the rates of a page of `configs/hardware`, times --matmul_efficiency and --read_efficiency, or of a profile
of this machine. Tokens per second are b n / time, prefill included. Byte flags take 2GB, 512MiB, or a multiple of the
dense KV such as 0.33x; the default device budget is what weights and activations leave, the default host budget is the
host's memory.

The greedy search over the cost model finds p1, p2, alpha and beta (a share is 0 if its phase never begins). `alisa` derives
its phases from the budgets, `alisa searched` takes the searched phases, and `alisa paper` has the traffic of the paper's
model, which loads the selected tokens at every step. The others attend densely. All layers share one selection, except
where tokens are deleted and only entering tokens are copied: there each layer has its own, because a deleted token is
recomputed as soon as one layer wants it. `offload_wins_from_batch` is the smallest batch, up to --batch * 8 and 512, at
which `alisa` is at least as fast as `waves`, the device alone; below it offloaded sparsity loses.

--profile measures this machine (copies both ways, a product of matrices, a read) and writes what --hardware reads. --models
prints the named shapes with their parameters, weights and KV as Markdown; `configs/models.md` is that page.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from absl import flags

from alisa_jax import placement
from alisa_jax.placement.controllers.alisa import least_device_bytes
from alisa_jax.placement.modelled import planner
from alisa_jax.placement.modelled.cost import Cost, kv_bytes
from alisa_jax.placement.modelled.simulate import ENTERING_TOKENS, Simulated, Trace, simulate, swa_trace
from eval.modelled import hardware_profile, machines, shapes, workload
from eval.script import common, inputs, tables
from eval.script.common import UserError

DENSE = ("resident", "waves", "accelerate", "flexgen")


@dataclass(frozen=True)
class Run:
    """A workload with everything that prices it: the sparse and the dense setting, the cost of a step, and what is
    selected, in all layers alike and in each of its own."""

    sparse: placement.Setting
    dense: placement.Setting
    cost: Cost
    trace: Trace | None
    by_layer: Trace | None


def config(argv: Sequence[str]) -> flags.FlagValues:
    """The flags, checked one by one; raises UserError."""
    values = flags.FlagValues()
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    share = {"lower_bound": 0.001, "upper_bound": 1.0, "flag_values": values}
    flags.DEFINE_string("model", "bundled", "A shape such as opt_30b, bundled, or a folder.", **where)
    flags.DEFINE_string("hardware", "h100_80gb", "A page of configs/hardware, this_machine, or a profile.", **where)
    flags.DEFINE_integer("batch", 1, "Sequences.", **one)
    flags.DEFINE_integer("prompt_tokens", 128, "Tokens of each prompt.", **one)
    flags.DEFINE_integer("new_tokens", 512, "New tokens of each sequence.", **one)
    flags.DEFINE_float("kv_sparsity", 0.8, "Share of the context that SWA leaves out.", **where)
    flags.DEFINE_string("window", "k", "SWA's window: k, 2k or a number of rows; it decides the statistics.", **where)
    flags.DEFINE_string("codec", "raw", "How K and V are stored.", **where)
    flags.DEFINE_enum("dtype", "float16", tuple(shapes.ELEMENT_BYTES), "Type of weights and of raw K and V.", **where)
    flags.DEFINE_string("device_kv_bytes", None, "Device budget of the cache. Default: what is left.", **where)
    flags.DEFINE_string("host_kv_bytes", None, "Host budget of the cache. Default: the host's memory.", **where)
    flags.DEFINE_multi_string("placement", [], "Further controllers to price under SWA, such as alisa(lag=1).", **where)
    flags.DEFINE_enum("read", "rows", ("rows", "pages"), "What can be read from host pages.", **where)
    flags.DEFINE_enum("traffic", "delta", ("delta", "paper"), "Which traffic the search assumes.", **where)
    flags.DEFINE_float("entering_tokens", ENTERING_TOKENS, "Tokens that enter a selection per step.", 0.0, **where)
    flags.DEFINE_float("selection_us", 50.0, "Microseconds that selecting adds to each layer and step.", 0.0, **where)
    flags.DEFINE_float("matmul_efficiency", 0.6, "Reached share of the published operations per second.", **share)
    flags.DEFINE_float("read_efficiency", 0.8, "Reached share of the published memory rate.", **share)
    flags.DEFINE_bool("models", False, "Print the page of the named shapes.", **where)
    flags.DEFINE_bool("profile", False, "Measure this machine and write --out.", **where)
    flags.DEFINE_string("out", None, f"Records; with --profile the file, default {machines.THIS_MACHINE}.", **where)
    flags.DEFINE_bool("json", False, "The record on stdout, one JSON line; the table on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    return common.parse(values, argv, __doc__)


def main(argv: Sequence[str]) -> None:
    """flags -> numbers -> plan -> record."""
    values = config(argv)
    if values.models:
        return print(models(), end="")
    if values.profile:
        return _profile(values.out or machines.THIS_MACHINE)
    start = time.perf_counter()
    make = _maker(values)
    run, cell, totals = make(values.batch)
    results = inputs.results(values.out)
    least = _check(run, totals, values.placement)
    found = planner.search(_problem(run, values))
    rows = _controllers(run, found, values.placement)
    record = inputs.record(
        results,
        cell,
        {
            **totals,
            **least,
            "fits": _fits(run.dense),
            "p1": found.p1,
            "p2": found.p2,
            "alpha": found.alpha if found.p1 < values.new_tokens else 0.0,
            "beta": found.beta if found.p2 < values.new_tokens else 0.0,
            "search_total_s": found.seconds,
            "search_excess_tokens": found.excess_tokens,
            **_values(rows),
            "offload_wins_from_batch": _crossover(make, values.batch),
        },
        time.perf_counter() - start,
        {"measured": False},
    )
    common.emit([record], _table(record, rows), values.json)


def models() -> str:
    """The page `configs/models.md`."""
    return f"# Shapes of models\n\n{tables.markdown(shapes.named())}\n"


def _maker(values):
    """make(batch) -> (Run, the record's cell, bytes): everything that depends on the batch."""
    machine, shaped = machines.hardware(values.hardware), shapes.config(values.model)
    stored, chosen = shapes.codec(values.codec, values.dtype), workload.policy(values.kv_sparsity, values.window)
    context = values.prompt_tokens + values.new_tokens
    if context > shaped.max_positions:
        raise UserError(f"--new_tokens: the model has {shaped.max_positions} positions, and {context} are asked for")
    try:
        chosen.validate(context)
    except ValueError as error:
        raise UserError(f"--kv_sparsity: {error}") from None
    inputs.check_codec(inputs.codec(values.codec), values.prompt_tokens, "prompts")
    model = shapes.shape(shaped, stored, values.dtype)
    cost = Cost(
        machine, model, values.matmul_efficiency, values.read_efficiency, selection_s=values.selection_us * 1e-6
    )
    traces = (None, None)
    if values.kv_sparsity:
        counts = chosen.counts(context)
        sizes_of = (lambda n: int(counts.local[n]), lambda n: int(counts.top[n]), values.entering_tokens)
        traces = swa_trace(*sizes_of), swa_trace(*sizes_of, layers=shaped.n_layers)
    if values.entering_tokens > values.prompt_tokens:
        raise UserError(f"--entering_tokens must be at most the prompt, {values.prompt_tokens} tokens")

    def make(batch: int):
        sparse, dense = (
            workload.setting(shaped, stored, policy, batch, values.prompt_tokens, values.new_tokens)
            for policy in (chosen, workload.policy(0.0))
        )
        activations = model.activation_bytes(batch, values.prompt_tokens)
        whole = kv_bytes(dense)
        asked = whole / batch * values.batch  # a share is of the dense KV of --batch, whatever batch is tried
        left = machine.device_bytes - model.weight_bytes - activations
        if values.device_kv_bytes is not None:
            left = machines.read_bytes(values.device_kv_bytes, asked, "--device_kv_bytes")
        host = machine.host_bytes
        if values.host_kv_bytes is not None:
            host = machines.read_bytes(values.host_kv_bytes, asked, "--host_kv_bytes")
        limits = dict(device_kv_bytes=left, host_kv_bytes=host, gather=values.read == "rows")
        sparse, dense = (dataclasses.replace(one, **limits) for one in (sparse, dense))
        cell = {
            "script": "eval.plan",
            "model": values.model,
            "hardware": machine.name,
            "codec": inputs.codec(values.codec),
            **{
                name: getattr(values, name)
                for name in "prompt_tokens new_tokens kv_sparsity window dtype read traffic entering_tokens selection_us "
                "matmul_efficiency read_efficiency".split()
            },
            "batch": batch,
        }
        totals = {
            "device_bytes": machine.device_bytes,
            "weight_bytes": model.weight_bytes,
            "activation_bytes": activations,
            "kv_bytes": whole,
            "working_set_bytes": batch * sparse.layers * sparse.slots * sparse.token_bytes,
            "statistics_bytes": batch * sparse.stats_bytes,
            "device_kv_bytes": left,
            "host_kv_bytes": host,
        }
        return Run(sparse, dense, cost, *traces), cell, totals

    return make


def _check(run: Run, totals: dict, specs: Sequence[str]) -> dict:
    """Refuse what cannot run at all; what the smallest budgets are."""
    if totals["device_kv_bytes"] <= 0:
        need = totals["weight_bytes"] + totals["activation_bytes"]
        raise UserError(
            f"--hardware: weights and activations need {machines.bytes_text(need)}, and the device has "
            f"{machines.bytes_text(totals['device_bytes'])}"
        )
    least = least_device_bytes(run.sparse)
    try:
        placement.Alisa().check(run.sparse)
    except ValueError as error:
        flag = "--host_kv_bytes" if "host_kv_bytes" in str(error) else "--device_kv_bytes"
        working, statistics = (machines.bytes_text(totals[f"{name}_bytes"]) for name in ("working_set", "statistics"))
        part = f"working set {working}, statistics {statistics}"
        raise UserError(f"{flag}: {error} ({part}; a smaller --window has smaller statistics)") from None
    for text in specs:
        try:
            placement.parse(text).check(run.sparse)
        except ValueError as error:
            raise UserError(f"--placement: {error}") from None
    return {"least_device_kv_bytes": least}


def _fits(setting) -> bool:
    try:
        placement.Resident().check(setting)
    except ValueError:
        return False
    return True


def _problem(run: Run, values) -> planner.Problem:
    return planner.problem(run.sparse, run.cost, values.kv_sparsity, values.traffic, values.entering_tokens)


def _controllers(run: Run, found: planner.Phases, specs: Sequence[str]) -> dict[str, Simulated | str]:
    """Each controller's modelled run, or the sentence with which it refuses."""
    cases = {name: (placement.parse(name), run.dense) for name in DENSE}
    cases["alisa"] = (placement.Alisa(), run.sparse)
    cases["alisa_searched"] = (searched(found, run.sparse.new_tokens), run.sparse)
    cases["alisa_paper"] = (placement.Alisa(traffic="paper"), run.sparse)
    cases |= {text: (placement.parse(text), run.sparse) for text in specs}
    return {name: _simulated(*case, run) for name, case in cases.items()}


def searched(found: planner.Phases, new_tokens: int) -> placement.Controller:
    """The controller with the phases that a search gave; all on the device, or no deletion, where it found that."""
    if found.p1 >= new_tokens:
        return placement.Alisa()
    if found.p2 >= new_tokens:
        return placement.Alisa(alpha=found.alpha, p1=found.p1)
    return placement.Alisa(alpha=found.alpha, beta=found.beta, p1=found.p1, p2=found.p2)


def _simulated(controller, setting, run: Run) -> Simulated | str:
    try:
        found = simulate(controller, setting, run.cost, run.trace)
        if found.p2 < setting.new_tokens and not controller.reads_wanted:
            found = simulate(controller, setting, run.cost, run.by_layer)
        return found
    except ValueError as error:
        return str(error)


def _crossover(make, batch: int) -> int | None:
    """The smallest batch from which offloaded sparsity is not slower than the device alone; None: at none that was tried."""

    def wins(size: int) -> bool:
        run, _, totals = make(size)
        if totals["device_kv_bytes"] <= 0:
            return False
        alone, ours = _simulated(placement.Waves(), run.dense, run), _simulated(placement.Alisa(), run.sparse, run)
        return not isinstance(ours, str) and (isinstance(alone, str) or ours.total_s <= alone.total_s)

    top = min(max(512, batch), 8 * batch)
    size = 1
    while not wins(size):
        if size == top:
            return None
        size = min(2 * size, top)
    low = size // 2
    while size - low > 1:
        middle = (low + size) // 2
        low, size = (low, middle) if wins(middle) else (middle, size)
    return size


def _values(rows: dict[str, Simulated | str]) -> dict:
    """Flat values of each controller."""
    values = {}
    for name, run in rows.items():
        refused = isinstance(run, str)
        values[f"{name}_tokens_per_s"] = "OOM" if refused else run.tokens_per_s
        for field in ("device_peak_bytes", "host_peak_bytes", "load_bytes", "store_bytes", "p1", "p2"):
            values[f"{name}_{field}"] = None if refused else getattr(run, field)
    return values


def _table(record: dict, rows: dict[str, Simulated | str]) -> str:
    """What is needed, the phases, and a line for each controller."""
    n = record["new_tokens"]
    names = "weight activation kv working_set statistics device_kv host_kv least_device_kv".split()
    parts = [f"{name.replace('_', ' ')} {machines.bytes_text(record[f'{name}_bytes'])}" for name in names]
    phases = "everything stays on the device"
    if record["p1"] < n:
        phases = f"p1 {record['p1']}, p2 {record['p2']} of {n}, alpha {record['alpha']:.2f}, beta {record['beta']:.2f}"
    if record["search_excess_tokens"]:
        phases += f" (budgets are exceeded by {record['search_excess_tokens']:.0f} tokens summed over the steps)"
    head = ("controller", "tokens/s", "prefill s", "compute s", "load s", "store s", "recompute s", "device", "host")
    lines = []
    for name, run in rows.items():
        label = name.replace("_", " ")
        if isinstance(run, str):
            lines.append((label, "OOM", *["-"] * 7))
        else:
            times = (run.prefill_s, run.compute_s, run.load_s, run.store_s, run.recompute_s)
            peaks = (run.device_peak_bytes, run.host_peak_bytes)
            lines.append(
                (label, f"{run.tokens_per_s:.1f}", *(f"{t:.2f}" for t in times), *map(machines.bytes_text, peaks))
            )
    wins = record["offload_wins_from_batch"]
    notes = sorted({note for run in rows.values() if not isinstance(run, str) for note in run.notes})
    notes += [f"{name.replace('_', ' ')}: {run}" for name, run in rows.items() if isinstance(run, str)]
    return "\n".join(
        [
            f"{record['model']} on {record['hardware']}, batch {record['batch']}: all numbers are modelled",
            ", ".join(parts),
            f"dense KV {'fits' if record['fits'] else 'does not fit'} on the device",
            f"searched phases: {phases}",
            common.table(head, lines),
            "offloaded sparsity does not win at any batch tried"
            if wins is None
            else f"offloaded sparsity wins from batch {wins}",
            *notes,
        ]
    )


def _profile(path: str) -> None:
    found = hardware_profile.profile()
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from None
    rows = [(name, value if isinstance(value, str) else f"{value:.4g}") for name, value in found.items()]
    print(common.table(("measured", "value"), rows))


if __name__ == "__main__":
    sys.exit(common.run(main))
