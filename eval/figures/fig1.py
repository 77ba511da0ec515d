"""Figure 1: seconds and memory of dense inference with FlexGen, its KV cache on the CPU, half on it, or on the GPU.

W1 and W2 are batch 64, 128 + 256 and 128 + 512 tokens of OPT-6.7B on a V100 with 32 GB. Modelled for these
(`eval/modelled/paper_system.py`), and measured in small on the device at hand: `accelerate`, `flexgen` with half of the
sequences on the device, `resident`, under a device budget that is the same share of W2's cache as the figure's GPU leaves.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from alisa_jax import placement
from alisa_jax.placement.modelled.simulate import simulate
from eval.drawing import systems
from eval.figures import base, modelled, stand_in
from eval.modelled import machines, paper_system
from eval.modelled.paper_cells import GIB, cell, pick
from eval.modelled.paper_fits import FIGURE_1, MANY
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus

TITLE = "Execution time and memory by placement of the KV cache"
PAPER = "alisa_fig1"
RUN = MappingProxyType(
    {
        "cpu_only": "accelerate | dense",
        "half_half": "flexgen(cache_device_frac=0.5) | dense",
        "gpu_only": "resident | dense",
    }
)
ON_DEVICE = MappingProxyType({"cpu_only": 0.0, "half_half": 0.5, "gpu_only": 1.0})
NAMES = MappingProxyType({"cpu_only": "CPU only", "half_half": "half", "gpu_only": "GPU only"})
TIMES = ("compute_s", "memory_s", "total_s")
SIZES = ("weights_gib", "activations_gib", "kv_on_gpu_gib", "required_total_gib")


def check(setup: Setup) -> None:
    """Raise UserError where the model or the machine cannot serve the measured rows."""
    stand_in.check(setup, _jobs(setup))


def records(setup: Setup) -> Found:
    """One record of all that is modelled; one a workload and placement, measured."""
    ours = modelled.collect(setup, "fig1", ["times and sizes"], lambda part: cells(), PAPER)
    here = stand_in.collect(setup, "fig1", _jobs(setup), setup.config("fig1")["repeats"])
    return Found(ours.records + here.records, ours.reused + here.reused)


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Seconds, memory, and what was measured here."""
    found, here = modelled.cells(records), [one for one in records if one["basis"] == "measured"]
    return [_times(found), _sizes(found), *([_measured(here)] if here else [])]


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Seconds and the GPU's memory by placement."""
    found, paper, panels = modelled.cells(records), base.paper(PAPER), []
    for key, label in (("total_s", "seconds of the run"), ("required_total_gib", "GPU memory needed, GiB")):
        series = []
        for name in ("W1", "W2"):
            theirs = [_published(one, key) for one in paper[name].values()]
            ours = [pick(found, quantity=key, workload=name, placement=where) for where in RUN]
            series.append((name, list(NAMES.values()), theirs, [one[0]["modelled"] if one else None for one in ours]))
        panels.append(systems.Panel(label, "KV cache", series))
    return systems.curves(panels, "ALISA's Figure 1: OPT-6.7B, batch 64, V100 32 GB; no point: out of memory", path)


def cells() -> list[dict]:
    """Seconds and GiB by workload and placement. The fits are on the seconds of W2 with the cache on the CPU."""
    published, fits, paper, found = modelled.published(), modelled.fits(), base.paper(PAPER), []
    whole, cost = paper_system.run(FIGURE_1, MANY, published, fits)
    for name, new in paper["workload"]["new_tokens"].items():
        setting = dataclasses.replace(whole, new_tokens=new)
        for where, frac in ON_DEVICE.items():
            theirs, controller = paper[name][where], placement.FlexGen(frac)
            free = simulate(controller, dataclasses.replace(setting, device_kv_bytes=float("inf")), cost)
            fits_in = free.device_peak_bytes <= setting.device_kv_bytes
            seconds = paper_system.added(free)
            at = dict(model=FIGURE_1.model, hardware=FIGURE_1.machine, batch=MANY, workload=name, placement=where)
            for key, ours in zip(TIMES, (*seconds, seconds.total_s), strict=True):
                # the figure's compute of W2 is the same bar wherever the cache is
                fitted = name == "W2" and (where == "cpu_only" or key == "compute_s")
                published_s = "OOM" if theirs["oom"] else _published(theirs, key)
                found.append(_cell(key, ours if fits_in else "OOM", published_s, fitted and fits_in, at))
            activations = cost.shape.activation_bytes(MANY, setting.prompt_tokens[0])
            parts = [cost.shape.weight_bytes, activations, free.device_peak_bytes]
            for key, ours in zip(SIZES, (*parts, sum(parts)), strict=True):
                found.append(_cell(key, ours / GIB, _published(theirs, key), False, at))
    return found


def _cell(key: str, ours, theirs, fitted: bool, at: dict) -> dict:
    """A cell; no error where the published number is 0, or out of memory."""
    number = theirs if isinstance(theirs, int | float) and theirs else None
    return cell("1", key, ours, number, fitted, **at) | {"published": theirs}


def _published(theirs: dict, key: str):
    """A number of the figure; sums are of its parts."""
    if key == "compute_s":
        return None if theirs["mha_s"] is None else round(theirs["mha_s"] + theirs["ffn_s"], 1)
    if key == "required_total_gib" and key not in theirs:
        return round(sum(theirs[one] for one in SIZES[:3]), 1)
    return theirs[key]


def _jobs(setup: Setup) -> list[stand_in.Job]:
    size, paper = setup.config("fig1"), base.paper(PAPER)
    work = {name: dict(prompt_tokens=size["prompt_tokens"], new_tokens=new) for name, new in size["new_tokens"].items()}
    most = paper["W2"]["gpu_only"]
    left = paper["workload"]["device_gib"] - most["weights_gib"] - most["activations_gib"]
    budget = left / most["kv_on_gpu_gib"] * stand_in.kv_bytes(setup, size["batch"], work["W2"])
    return [
        stand_in.job(setup, f"{name} {where}", RUN[where], size["batch"], budget, work[name])
        for name, where in size["measured"]
    ]


def _rows(found: Sequence[dict], keys: Sequence[str], form: str):
    """(workload, placement, texts, published) of every bar."""
    paper = base.paper(PAPER)
    for name in ("W1", "W2"):
        for where in RUN:
            theirs, texts = paper[name][where], []
            for key in keys:
                number = "OOM" if theirs["oom"] and key in TIMES else _published(theirs, key)
                texts.append(modelled.beside(number, pick(found, quantity=key, workload=name, placement=where), form))
            yield (name, NAMES[where], *texts), theirs


def _name(one: dict) -> str:
    return f"{one['workload']}, {NAMES[one['placement']]}, {one['quantity'].rsplit('_', 1)[0].replace('_', ' ')}"


def _times(found: Sequence[dict]) -> Table:
    split = lambda one: "-" if one["mha_s"] is None else f"{one['mha_s']:g} and {one['ffn_s']:g}"
    rows = [(*row, split(theirs)) for row, theirs in _rows(found, TIMES, ".1f")]
    caption = (
        f"Figure 1, seconds of a run, {modelled.NOTE}; modelled for OPT-6.7B, batch 64, 128 + 256 (W1) and 128 + 512 "
        "(W2) tokens on a V100 "
        "with 32 GB. The link and a step at batch 64 are fitted on W2 with the cache on the CPU. The model does not "
        "split compute, so the "
        "paper's MHA and FFN stand apart."
    )
    why = [
        "W1 is half of W2's steps; its published compute is less than half of W2's, and a step of the model does not "
        "grow with the context."
    ]
    head = ("workload", "KV cache", "MHA and FFN, s", "copies, s", "total, s", "paper's MHA and FFN, s")
    versus = modelled.versus([one for one in found if one["quantity"] in TIMES], _name)
    return Table(caption, head, rows, left=2, versus=versus, why=why if found else ())


def _sizes(found: Sequence[dict]) -> Table:
    rows = [row for row, _ in _rows(found, SIZES, ".1f")]
    caption = (
        f"Figure 1, GiB on the GPU, {modelled.NOTE}; modelled: weights counted, activations those of a prompt's "
        "layer, KV with the layers on "
        f"their way; it has {base.paper(PAPER)['workload']['device_gib']}. Where the figure prints no sum it is that "
        "of its parts."
    )
    why = [
        "Activations are modelled as those of one layer of a prompt; what the figure counts as activations is not "
        "published.",
        "The paper shows no KV on the GPU where all is on the CPU; the layers on their way have to be somewhere.",
        "For W2 on the GPU only, the paper's 19.5 GiB are the KV of 624 tokens; 639 are cached at the end.",
    ]
    head = ("workload", "KV cache", "weights", "activations", "KV on GPU", "needed in all")
    versus = modelled.versus([one for one in found if one["quantity"] in SIZES], _name)
    return Table(caption, head, rows, left=2, versus=versus, why=why if found else ())


def _measured(records: Sequence[dict]) -> Table:
    """Seconds here, and how many times those of the device alone, beside the paper's."""
    paper, by, rows, versus = base.paper(PAPER), {one["part"]: one for one in records}, [], []
    whole = lambda one: None if one is None or one["tokens_per_s"] == "OOM" else one["prefill_s"] + one["decode_s"]
    for name in ("W1", "W2"):
        for where in RUN:
            one, theirs = by.get(f"{name} {where}"), paper[name]
            ours, least = whole(one), whole(by.get(f"{name} gpu_only"))
            ratio = ours / least if ours and least else None
            published = None if theirs["gpu_only"]["oom"] else theirs[where]["total_s"] / theirs["gpu_only"]["total_s"]
            shown = "OOM" if one is not None and ours is None else ours
            moved = [
                machines.bytes_text(one[key]) if one and key in one else None
                for key in ("load_bytes", "device_peak_bytes")
            ]
            published_s = "OOM" if theirs[where]["oom"] else theirs[where]["total_s"]
            texts = [common.number(shown, ".3g"), common.number(published_s, "g"), common.number(ratio, ".2f")]
            rows.append((name, NAMES[where], *texts, common.number(published, ".2f"), *map(common.number, moved)))
            if ratio is not None and published is not None and where != "gpu_only":
                what = f"{name}, {NAMES[where]}: seconds over those of GPU only, {one['model']} for OPT-6.7B"
                versus.append(Versus(what, "x", ratio, published, "measured"))
            elif shown == "OOM":
                what = f"{name}, {NAMES[where]}: seconds, {one['model']} for OPT-6.7B"
                versus.append(Versus(what, "s", shown, published_s, "measured"))
    first = records[0]
    runs = ", ".join(f"{NAMES[where]}: {text}" for where, text in RUN.items())
    caption = (
        f"Figure 1 in small: batch {first['batch']}, prompts of {first['prompt_tokens']} tokens. "
        f"{stand_in.caption(records)} Systems: {runs}. The "
        f"cache may take {machines.bytes_text(float(first['device_kv_bytes']))} of the device, the same share of W2's as "
        "on the figure's GPU; "
        f"-: not run at this size. {stand_in.COPIES}"
    )
    why = [f"{first['model']} is small: the host's work for each copy outweighs the copy and the step."]
    why += [f"{one['part']}: {one['note']}" for one in records if one["note"]]
    head = ("workload", "KV cache", "here, s", "paper, s", "to GPU only", "paper's", "to device", "device")
    return Table(caption, head, rows, left=2, versus=versus, why=why)
