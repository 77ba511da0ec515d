"""The cells of ALISA's Figures 9 and 12: each number modelled, published and their difference.

A cell is a record: figure, where it is (model, hardware, system, batch, kv_sparsity, step), quantity with its unit,
modelled, published (None: the paper has none), error_frac = modelled / published - 1, and fitted: it is no prediction.
"OOM": the memory of the device is not enough. Cells with traffic "delta" are this project's own controller.
"""

import dataclasses
from collections.abc import Iterable

from alisa_jax.placement.modelled import planner
from eval.modelled import paper_fits, paper_system
from eval.modelled.paper_system import INT8, MODELS, OPT_30B, RAW, SYSTEMS, Fits, Place, Seconds

BATCH = paper_fits.MANY  # of Figure 12
GIB = 2.0**30


def cell(figure: str, quantity: str, modelled, published=None, fitted: bool = False, **where) -> dict:
    """A record; see above."""
    error = None if published is None or isinstance(modelled, str) else modelled / published - 1
    values = dict(quantity=quantity, modelled=modelled, published=published, error_frac=error, fitted=fitted)
    return {"figure": figure, **where, **values, "basis": "modelled"}


def pick(cells: Iterable[dict], **where) -> list[dict]:
    """The cells with these values."""
    return [one for one in cells if all(one.get(key) == value for key, value in where.items())]


def figure_9(published: dict, fits: Fits, models: Iterable[Place] = MODELS) -> list[dict]:
    """Tokens per second by model, system and batch; ALISA's ratios; ALISA with traffic=delta."""
    bars, sparsity, cells = published["fig9_tokens_per_s"], published["workload"]["kv_sparsity"], []
    for place in models:
        at = dict(model=place.model, hardware=place.machine, kv_sparsity=sparsity)
        for system in SYSTEMS:
            for batch, bar in zip(bars["batch"], bars[place.model][system], strict=True):
                found = paper_system.seconds(system, place, batch, published, fits)
                fitted = (place.model, system, batch) in paper_fits.FITTED_CELLS
                where = dict(at, system=system, batch=batch)
                cells.append(cell("9", "tokens_per_s", _rate(found, batch, published), bar, fitted, **where))
        if place.gpu in fits.vllm_sequences:  # how much hangs on that fit
            free = dataclasses.replace(fits, vllm_sequences={})
            for batch, bar in zip(bars["batch"], bars[place.model]["vllm"], strict=True):
                found = paper_system.seconds("vllm", place, batch, published, free)
                where = dict(at, system="vllm_by_memory", batch=batch)
                cells.append(
                    cell("9", "tokens_per_s", _rate(found, batch, published), bar, batch == paper_fits.FEW, **where)
                )
        for batch in bars["batch"]:
            found = paper_system.delta(place, batch, sparsity, published, fits)
            where = dict(at, system="alisa", batch=batch, traffic="delta")
            cells.append(cell("9", "tokens_per_s", _rate(found, batch, published), **where))
        for other in ("flexgen", "vllm"):
            for batch in bars["batch"]:
                ours, theirs = (
                    pick(cells, model=place.model, system=name, batch=batch, quantity="tokens_per_s")[0]
                    for name in ("alisa", other)
                )
                modelled = (
                    "OOM" if "OOM" in (ours["modelled"], theirs["modelled"]) else ours["modelled"] / theirs["modelled"]
                )
                where = dict(at, system=f"alisa/{other}", batch=batch)
                cells.append(cell("9", "ratio", modelled, ours["published"] / theirs["published"], **where))
    return cells


def figure_12a(published: dict, fits: Fits) -> list[dict]:
    """p1 and p2 by sparsity, and this project's search for them under traffic=delta.

    The modelled p1 is the step at which the device is full of 16-bit rows beside Figure 12a's activations: Equation 5
    grows with every step of traffic. p2 is for the published p1.
    """
    cells = []
    setting, cost = paper_system.run(OPT_30B, BATCH, published, fits)
    used = cost.shape.weight_bytes + published["fig12a_gib"]["activations"] * GIB
    room = cost.hardware.device_bytes - used
    full = paper_system.full_step(dataclasses.replace(setting, device_kv_bytes=room))
    for key, steps in published["fig12a_steps"].items():
        at = _at(key)
        found = paper_system.alisa(OPT_30B, BATCH, at["kv_sparsity"], published, fits)
        cells.append(cell("12a", "p1", full, steps["p1"], system="alisa", **at))
        cells.append(cell("12a", "p2", found.p2, steps["p2"], system="alisa", **at))
        setting, cost = paper_system.run(OPT_30B, BATCH, published, fits, INT8, at["kv_sparsity"])
        best = planner.search(planner.problem(setting, cost, at["kv_sparsity"], "delta", share_step=0.02))
        for name in ("p1", "p2"):
            modelled = "OOM" if best.excess_tokens else getattr(best, name)
            cells.append(cell("12a", name, modelled, system="alisa", traffic="delta", **at))
    return cells


def figure_12b(published: dict, fits: Fits) -> list[dict]:
    """Seconds of compute, copies and both up to the steps that Figure 12a marks; the whole run with and without
    recomputation, and the gain."""
    cells = []
    setting, cost = paper_system.run(OPT_30B, BATCH, published, fits)
    for mark in published["fig12a_s"]["flexgen"]:
        part = dataclasses.replace(setting, new_tokens=mark["step"])
        last = mark["step"] == setting.new_tokens
        cells += _marks(paper_system.added(paper_system.flexgen(part, cost)), mark, last, system="flexgen", **_at("0"))
    for key, times in published["fig12b_s"].items():
        at = dict(_at(key), system="alisa")
        ours = {True: paper_system.alisa(OPT_30B, BATCH, at["kv_sparsity"], published, fits)}
        ours[False] = paper_system.alisa(OPT_30B, BATCH, at["kv_sparsity"], published, fits, recompute=False)
        for mark in published["fig12a_s"][key]:
            cells += _marks(ours[True].until(mark["step"]), mark, False, **at)
        total = {}
        for name, recompute in (("with_recompute", True), ("without_recompute", False)):
            total[recompute] = cell("12b", f"{name}_s", ours[recompute].seconds.total_s, times[name]["total_s"], **at)
        cells += total.values()
        cells[-1]["fitted"] = key in ("80", "20")  # on its memory time alpha and the rate of rows are fitted
        gain = [total[False][name] / total[True][name] for name in ("modelled", "published")]
        cells.append(cell("12b", "recompute_gain", *gain, **at))
        found = paper_system.delta(OPT_30B, BATCH, at["kv_sparsity"], published, fits)
        where = dict(at, traffic="delta")
        cells.append(cell("12b", "with_recompute_s", "OOM" if found is None else found.total_s, **where))
    return cells


def figure_12c(published: dict, fits: Fits) -> list[dict]:
    """Tokens per second of the ablation.

    FlexGen, static; with SWA as FlexGen's sparse attention sends it, all keys and the wanted values, (1 + r) / 2 of the
    bytes; with ALISA's phases, 16-bit rows at the link's rate; with INT8 rows.
    """
    cells = []
    setting, cost = paper_system.run(OPT_30B, BATCH, published, fits)
    static = paper_system.flexgen(setting, cost)
    for key, bars in published["fig12c_tokens_per_s"].items():
        at, sparsity = _at(key), int(key) / 100
        swa = setting.layers * paper_system.swa_s(OPT_30B, sparsity, published) * (setting.new_tokens - 1)
        copies = static.load_s * (1.0 - sparsity / 2) + static.store_s
        stages = {
            "flexgen": paper_system.added(static),
            "swa": Seconds(static.compute_s + swa, copies),
            "swa_ds": paper_system.alisa(OPT_30B, BATCH, sparsity, published, fits, RAW).seconds,
            "alisa": paper_system.alisa(OPT_30B, BATCH, sparsity, published, fits).seconds,
        }
        for name, found in stages.items():
            modelled = _rate(found, BATCH, published)
            cells.append(cell("12c", "tokens_per_s", modelled, bars[name], name == "flexgen", system=name, **at))
        for name, codec in (("swa_ds", RAW), ("alisa", INT8)):
            found = paper_system.delta(OPT_30B, BATCH, sparsity, published, fits, codec)
            modelled = _rate(found, BATCH, published)
            cells.append(cell("12c", "tokens_per_s", modelled, system=name, traffic="delta", **at))
    return cells


def _at(key: str) -> dict:
    return dict(model=OPT_30B.model, hardware=OPT_30B.machine, batch=BATCH, kv_sparsity=int(key) / 100)


def _rate(found: Seconds | None, batch: int, published: dict) -> float | str:
    return "OOM" if found is None else batch * published["workload"]["new_tokens"] / found.total_s


def _marks(found: Seconds, mark: dict, fitted: bool, **where) -> list[dict]:
    """Compute, copies and both up to a step."""
    where = dict(where, step=mark["step"])
    both = mark["compute_s"] + mark["memory_s"]
    values = (
        ("compute_s", found.compute_s, mark["compute_s"]),
        ("memory_s", found.memory_s, mark["memory_s"] or None),
        ("total_s", found.total_s, both),
    )
    return [cell("12b", name, ours, theirs, fitted, **where) for name, ours, theirs in values]
