"""Modelled beside published: ALISA's Figure 9 (tokens/s by batch) and the phase switches of Figure 12a.

    python -m eval.plan_tables
    python -m eval.plan_tables --link_gb_s=47 --json

Every number of ours is modelled: the controllers of this project, priced with a step time that does not depend on the batch
(Figure 12b: compute at batch 64 takes no longer than the whole step at batch 4) and the link that the paper states. Of
each model one cell per implementation is used to calibrate, batch 4, marked `=`: ALISA's for the three systems on its code
base, vLLM's own. The other cells are predictions, each with its error. That vLLM leads ALISA at batch 4 is no prediction.

    alisa      alisa(traffic=paper), int8, 80 % sparsity, no separate working set
    flexgen    flexgen(cache_device_frac=0.1): Figure 12a has 90 % of its cache on the CPU
    vllm       waves: as many sequences at a time as the GPU holds
    accelerate accelerate

Figure 12a: the greedy search on OPT-30B, batch 64, one H100, with Figure 12b's compute for each sparsity. `prefix`
recomputes what exactness needs, the whole deleted prefix; `wanted` prices the wanted tokens alone.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from alisa_jax import placement
from alisa_jax.placement import planner
from alisa_jax.placement.cost import Cost
from alisa_jax.placement.simulate import simulate, swa_trace
from eval import common, sizes

PAPER = Path(__file__).resolve().parent / "paper" / "alisa_throughput.json"
# Which V100 stands behind which bar is not published: 16 GB for the 7B models, 32 GB for 13B is the reading used here.
MODELS = (
    ("OPT-6.7B", "opt_6.7b", "v100_16gb"),
    ("OPT-13B", "opt_13b", "v100_32gb"),
    ("OPT-30B", "opt_30b", "h100_80gb"),
    ("LLaMA-7B", "llama_7b", "v100_16gb"),
    ("LLaMA-13B", "llama_13b", "v100_32gb"),
    ("LLaMA-33B", "llama_33b", "h100_80gb"),
)
SYSTEMS = (
    ("hf_accelerate", "accelerate", False, "alisa"),  # name in the paper, controller, selects, calibrated on
    ("flexgen", "flexgen(cache_device_frac=0.1)", False, "alisa"),
    ("vllm", "waves", False, "vllm"),
    ("alisa", "alisa(traffic=paper)", True, "alisa"),
)
FIG12_ACTIVATIONS_BYTES = 6.15 * 2**30  # Figure 12a


def main(argv: Sequence[str]) -> None:
    """flags -> both figures -> records."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_float("link_gb_s", 20.0, "CPU-GPU bandwidth each way; the paper states 20.", 0.001, **where)
    flags.DEFINE_bool("json", False, "One record a cell on stdout; the tables on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    common.parse(values, argv, __doc__)
    published = json.loads(PAPER.read_text())
    cells = figure_9(published, values.link_gb_s * 1e9)
    phases = figure_12a(published, values.link_gb_s * 1e9)
    common.emit([*cells, *phases], f"{_table_9(cells)}\n\n{_table_12a(phases)}", values.json)


def figure_9(published: dict, link: float) -> list[dict]:
    """A record for each cell: modelled and published tokens per second, and the error."""
    cells, work = [], published["workload"]
    for name, shape, machine in MODELS:
        bars = published["fig9_tokens_per_s"][name]
        for system, spec, selects, from_ in SYSTEMS:
            step_s = 4 / bars[from_][0]
            for batch, bar in zip(published["fig9_tokens_per_s"]["batch"], bars[system], strict=True):
                modelled = _tokens_per_s(shape, machine, batch, placement.parse(spec), selects, step_s, link, work)
                error = None if bar is None or isinstance(modelled, str) else modelled / bar - 1
                cells.append(
                    {
                        "figure": "9",
                        "model": name,
                        "hardware": machine,
                        "system": system,
                        "batch": batch,
                        "calibrated": batch == 4 and from_ == system,
                        "modelled_tokens_per_s": modelled,
                        "published_tokens_per_s": bar,
                        "error_frac": error,
                        "basis": "modelled",
                    }
                )
    return cells


def _machine(name: str, link: float):
    return dataclasses.replace(sizes.hardware(name), to_device_bytes_per_s=link, to_host_bytes_per_s=link)


def _tokens_per_s(shape, machine, batch, controller, selects, step_s, link, work) -> float | str:
    config, machine = sizes.model(shape), _machine(machine, link)
    codec = sizes.codec("int8(axis=token)" if selects else "raw", "float16")
    model = sizes.shape(config, codec, "float16")
    run = sizes.setting(config, codec, sizes.policy(0.0), batch, work["prompt_tokens"], work["new_tokens"])
    room = machine.device_bytes - model.weight_bytes - model.activation_bytes(batch, work["prompt_tokens"])
    run = dataclasses.replace(run, device_kv_bytes=room, host_kv_bytes=machine.host_bytes, selects=selects)
    half = (1 - work["kv_sparsity"]) / 2
    trace = swa_trace(lambda n: int(n * half + 0.5), lambda n: int(n * half + 0.5))
    try:
        return simulate(controller, run, Cost(machine, model, step_s=(step_s, 0.0)), trace).tokens_per_s
    except ValueError:
        return "OOM"


def figure_12a(published: dict, link: float) -> list[dict]:
    """A record for each sparsity and way to recompute: modelled and published switches and seconds."""
    work, config = published["workload"], sizes.model("opt_30b")
    codec, machine = sizes.codec("raw", "float16"), _machine("h100_80gb", link)
    model = sizes.shape(config, codec, "float16")
    run = sizes.setting(config, codec, sizes.policy(0.0), 64, work["prompt_tokens"], work["new_tokens"])
    room = machine.device_bytes - model.weight_bytes - FIG12_ACTIVATIONS_BYTES
    run = dataclasses.replace(run, device_kv_bytes=room, host_kv_bytes=machine.host_bytes, selects=True)
    found = []
    for percent, steps in published["fig12a_steps"].items():
        times = published["fig12b_s"][percent]
        compute = (times["without_recompute"]["mha_s"] + times["without_recompute"]["ffn_s"]) / work["new_tokens"]
        cost = Cost(machine, model, step_s=(compute, 0.0))
        for rebuild in ("prefix", "wanted"):
            problem = planner.problem(run, cost, int(percent) / 100, "paper", rebuild=rebuild, share_step=0.02)
            best = planner.search(problem)
            found.append(
                {
                    "figure": "12a",
                    "kv_sparsity": int(percent) / 100,
                    "rebuild": rebuild,
                    "modelled_p1": best.p1,
                    "published_p1": steps["p1"],
                    "modelled_p2": best.p2,
                    "published_p2": steps["p2"],
                    "modelled_s": best.seconds,
                    "published_s": times["with_recompute"]["total_s"],
                    "error_frac": best.seconds / times["with_recompute"]["total_s"] - 1,
                    "basis": "modelled",
                }
            )
    return found


def _table_9(cells: list[dict]) -> str:
    rows = {}
    for cell in cells:
        ours = common.number(cell["modelled_tokens_per_s"], ".0f")
        mark = "=" if cell["calibrated"] else common.number(cell["error_frac"], "+.0f", 100)
        text = f"{ours} / {common.number(cell['published_tokens_per_s'], '.0f')} ({mark})"
        rows.setdefault((cell["model"], cell["system"]), []).append(text)
    batches = dict.fromkeys(f"batch {cell['batch']}" for cell in cells)
    lines = [(*key, *row) for key, row in rows.items()]
    title = "Figure 9, tokens/s: modelled / published (error in %; = is the cell that was calibrated on)"
    return f"{title}\n{common.table(('model', 'system', *batches), lines, left=2)}"


def _table_12a(cells: list[dict]) -> str:
    head = ("sparsity", "recompute", "p1", "published", "p2", "published", "seconds", "published", "error %")
    lines = [
        (
            f"{cell['kv_sparsity']:.0%}",
            cell["rebuild"],
            *(str(cell[name]) for name in ("modelled_p1", "published_p1", "modelled_p2", "published_p2")),
            *(f"{cell[name]:.0f}" for name in ("modelled_s", "published_s")),
            f"{100 * cell['error_frac']:+.0f}",
        )
        for cell in cells
    ]
    return f"Figure 12a, modelled and published phase switches\n{common.table(head, lines, left=2)}"


if __name__ == "__main__":
    sys.exit(common.run(main))
