"""Figure 9: tokens per second of Accelerate, FlexGen, vLLM and ALISA by batch, on six models; ALISA at 80 % KV sparsity.

Modelled for the paper's models and GPUs (`eval/modelled/paper_system.py`), and measured on the device at hand with
systems that place their caches in the same way: `accelerate`, `flexgen` with 10 % of the sequences on the device (Figure
12a), `waves` for vLLM, `alisa`. As on a GPU, one device budget holds for all batches: `device_kv_frac` of the dense cache
of the largest one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from eval.drawing import systems
from eval.figures import modelled, stand_in
from eval.modelled import machines, paper_cells
from eval.modelled.paper_cells import pick
from eval.modelled.paper_system import MODELS, SYSTEMS
from eval.modelled.paper_trends import trends
from eval.script import common
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus

TITLE = "Throughput by batch size"
RUN = MappingProxyType(
    {
        "hf_accelerate": "accelerate | dense",
        "flexgen": "flexgen(cache_device_frac=0.1) | dense",
        "vllm": "waves | dense",
        "alisa, raw": "alisa | swa(kv_sparsity=0.8)",
        "alisa": "alisa | swa(kv_sparsity=0.8) | int8",
    }
)

MOVED = ("load_bytes", "store_bytes", "device_peak_bytes")


def check(setup: Setup) -> None:
    """Raise UserError where the model or the machine cannot serve the measured rows."""
    stand_in.check(setup, _jobs(setup))


def records(setup: Setup) -> Found:
    """One record a model of the paper, modelled; one a system and batch, measured."""
    places = {place.model: place for place in MODELS if place.model in _config(setup).get("models", (place.model,))}
    run = lambda name: paper_cells.figure_9(modelled.published(), modelled.fits(), (places[name],))
    ours = modelled.collect(setup, "fig9", list(places), run)
    here = stand_in.collect(setup, "fig9", _jobs(setup), _config(setup)["repeats"])
    return Found(ours.records + here.records, ours.reused + here.reused)


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Tokens per second, the ratios of ALISA, the trends, the fitted numbers, and what was measured here."""
    cells, here = modelled.cells(records), [one for one in records if one["basis"] == "measured"]
    said = trends(cells)
    found = [_rates(cells, said), _ratios(cells)]
    if cells:
        found += [modelled.trends("Figure 9", said), modelled.fitted()]
    return [*found, _measured(here)] if here else found


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Modelled beside published tokens per second, a panel a model."""
    return systems.throughput(pick(modelled.cells(records), quantity="tokens_per_s"), path)


def _config(setup: Setup) -> dict:
    return setup.config("fig9")


def _jobs(setup: Setup) -> list[stand_in.Job]:
    size = _config(setup)
    batches = size["batches"]
    budget = size["device_kv_frac"] * stand_in.kv_bytes(setup, max(batches), size) if batches else math.inf
    return [stand_in.job(setup, name, text, batch, budget, size) for batch in batches for name, text in RUN.items()]


def _rates(cells: Sequence[dict], said) -> Table:
    bars, rows = modelled.published()["fig9_tokens_per_s"], []
    mine = [one for one in cells if "traffic" not in one and one["quantity"] == "tokens_per_s"]
    delta = pick(cells, traffic="delta")
    for place in MODELS:
        names = [*SYSTEMS[:3], "vllm_by_memory", SYSTEMS[3], "alisa, delta"]
        for name in names:
            theirs = bars[place.model].get(name.removesuffix("_by_memory"), [None] * len(bars["batch"]))
            at = dict(model=place.model, system=name.partition(",")[0])
            found = [pick(delta if "," in name else mine, batch=batch, **at) for batch in bars["batch"]]
            if name in SYSTEMS or any(found):
                texts = [modelled.beside(*pair, ".0f") for pair in zip(theirs, found, strict=True)]
                rows.append((place.model, name, *texts))
    free = [one for one in mine if one["system"] != "vllm_by_memory"]
    versus = modelled.versus(free, lambda one: f"{one['model']}, {one['system']}, batch {one['batch']}")
    caption = (
        f"Figure 9, tokens/s of 128 + 512 tokens by batch, {modelled.NOTE}. Modelled for the paper's models and GPUs "
        "from a step "
        "that is common to all systems; vllm_by_memory: vLLM without the fit of how many sequences it runs at a time; "
        "delta: "
        "this project's controller, which sends only what enters the selection, and of which nothing is published."
    )
    head = ("model", "system", *(f"batch {batch}" for batch in bars["batch"]))
    return Table(caption, head, rows, left=2, versus=versus, why=modelled.why(said))


def _ratios(cells: Sequence[dict]) -> Table:
    bars, rows = modelled.published()["fig9_tokens_per_s"], []
    mine = pick(cells, quantity="ratio")
    for place in MODELS:
        for other in ("flexgen", "vllm"):
            pairs = zip(bars["batch"], bars[place.model]["alisa"], bars[place.model][other], strict=True)
            at = dict(model=place.model, system=f"alisa/{other}")
            texts = [modelled.beside(round(a / b, 2), pick(mine, batch=batch, **at), ".2f") for batch, a, b in pairs]
            rows.append((place.model, f"alisa/{other}", *texts))
    caption = (
        f"Figure 9, throughput of ALISA over FlexGen's and over vLLM's, {modelled.NOTE}; modelled. The paper's text: "
        "1.4 to 3.0 "
        "times FlexGen's, up to 1.9 times vLLM's, which is ahead at small batch."
    )
    versus = modelled.versus(mine, lambda one: f"{one['model']}, {one['system']}, batch {one['batch']}")
    head = ("model", "ratio", *(f"batch {batch}" for batch in bars["batch"]))
    return Table(caption, head, rows, left=2, versus=versus)


def _measured(records: Sequence[dict]) -> Table:
    """Throughput here and its ratio to that of FlexGen's placement, beside the paper's ratios over its models."""
    rate = {(r["part"], r["batch"]): r["tokens_per_s"] for r in records}
    rows, versus = [], []
    for r in records:
        name, batch = r["part"], r["batch"]
        base = rate.get(("flexgen", batch))
        ratio = None if "OOM" in (r["tokens_per_s"], base) or base is None else r["tokens_per_s"] / base
        theirs = _paper_ratios(name, batch)
        mean = math.prod(theirs) ** (1 / len(theirs)) if theirs else None
        span = f"{min(theirs):.2f} - {max(theirs):.2f}" if theirs else "-"
        moved = [machines.bytes_text(r[key]) if key in r else None for key in MOVED]
        late = None if r.get("p1") == r["new_tokens"] else r.get("p1")
        rows.append(
            (
                name,
                str(batch),
                common.number(r["tokens_per_s"], ".4g"),
                common.number(ratio, ".2f"),
                span,
                common.number(mean, ".2f"),
                *(common.number(one) for one in moved),
                *(common.number(one, ".0f") for one in (r.get("effective_batch"), late)),
            )
        )
        if name != "flexgen" and ratio is not None and mean is not None:
            versus.append(
                Versus(
                    f"{name}/flexgen, batch {batch}, {r['model']} for the paper's six models",
                    "x",
                    ratio,
                    mean,
                    "measured",
                )
            )
    head = (
        "system",
        "batch",
        "tokens/s",
        "to FlexGen",
        "paper's",
        "their mean",
        "to device",
        "to host",
        "device",
        "at a time",
        "p1",
    )
    first = records[0]
    runs = ", ".join(f"{name}: {text}" for name, text in RUN.items())
    caption = (
        f"Figure 9 in small, {first['prompt_tokens']} + {first['new_tokens']} tokens. {stand_in.caption(records)} "
        f"Systems: {runs}. One KV budget of the device for all batches, "
        f"{machines.bytes_text(float(first['device_kv_bytes']))}; "
        "to FlexGen: tokens/s over those of flexgen at the same batch; paper's: the same over its six models and "
        "their geometric "
        f"mean; to device, to host: bytes moved in a run. {stand_in.COPIES}"
    )
    why = [
        f"{first['model']} is not one of the paper's models, and a decode step of it costs little beside the host's "
        "work for each copy.",
        *dict.fromkeys(f"{r['part']} at batch {r['batch']}: {r['note']}" for r in records if r["note"]),
    ]
    return Table(caption, head, rows, versus=versus, why=why)


def _paper_ratios(name: str, batch: int) -> list[float]:
    """To FlexGen, of the paper's models; empty where it has no such bar."""
    bars = modelled.published()["fig9_tokens_per_s"]
    if batch not in bars["batch"] or name not in SYSTEMS:
        return []
    at = bars["batch"].index(batch)
    return [bars[place.model][name][at] / bars[place.model]["flexgen"][at] for place in MODELS]
