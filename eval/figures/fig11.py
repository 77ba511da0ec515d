"""Figure 11: one attention module, a single decode query, split by operation; the paper's way and ours on this device."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from eval.drawing import costs
from eval.figures import base
from eval.modelled import shapes
from eval.script import common, inputs, resume
from eval.script.common import UserError
from eval.script.resume import Found, Setup
from eval.script.tables import Table, Versus, device
from eval.speed import breakdown, systems, traces
from eval.speed.breakdown import PAPER_WAY, PARTS, Shape
from eval.text import windows

TITLE = "Attention of one decode query, split by operation"
NAMES = ("QK", "softmax", "AV", "window sum", "gather")  # of PAPER_WAY
LABELLED = ("qk", "awv", "local_sum")  # operations whose bars have a rate on them
PUBLISHED = "alisa_fig11"


def check(setup: Setup) -> None:
    """Raise UserError for random weights, a model without tokenizer, and shapes that it cannot stand in for."""
    config, paper = setup.config("fig11"), base.paper(PUBLISHED)
    if setup.model.startswith("random:"):
        raise UserError("--model: Figure 11 takes its queries and keys from a trained model, got random weights")
    model, _ = shapes.config(setup.model), inputs.card(setup.model)
    if not systems.has_tokenizer(setup.model):
        raise UserError(f"--model: {setup.model} has no tokenizer, which a text needs")
    for name in config["shapes"]:
        if name not in paper["shapes"]:
            raise UserError(f"shapes are those of {', '.join(paper['shapes'])}, got {name!r}")
        breakdown.check(model, config["layer"], _shape(config, paper, name), config["repeats"])


def records(setup: Setup) -> Found:
    """One record a shape and sparsity, dense first."""
    config, paper, card = setup.config("fig11"), base.paper(PUBLISHED), setup.card()
    source = windows.read(setup.text)
    device = jax.devices()[0]
    cells = []
    for name in config["shapes"]:
        shape = _shape(config, paper, name)
        for sparsity in (0.0, *config["sparsities"]):
            cells.append(
                {
                    "script": "eval.reproduce",
                    "figure": "fig11",
                    **card.fields(),
                    "data": source.name,
                    "data_sha256": source.sha256,
                    "shape": name,
                    **shape._asdict(),
                    "kv_sparsity": sparsity,
                    "layer": config["layer"],
                    "dtype": breakdown.dtype(),
                    "seed": setup.seed,
                    "measured_on": f"{device.platform}: {device.device_kind}",
                    "repeats": config["repeats"],
                }
            )

    @functools.cache
    def past():
        model = inputs.model(setup.load, setup.model)
        tokens = breakdown.context_tokens(cells[0]["tokens"], config["repeats"])
        rows = traces.cut(source, model, tokens, config["batch"])
        if len(rows) < config["batch"]:
            raise UserError(f"--text has {len(rows)} windows of {tokens} tokens, and {config['batch']} are needed")
        return breakdown.recorded(model, np.asarray(rows, np.int32), config["layer"])

    def run(cell: dict) -> tuple[dict, dict]:
        shape = Shape(*(cell[name] for name in Shape._fields))
        return breakdown.measure(shape, cell["kv_sparsity"], past(), config["repeats"]), {"warmup": breakdown.WARM_UP}

    return resume.collect(setup, cells, run, "fig11")


def tables(setup: Setup, records: Sequence[dict]) -> list[Table]:
    """Three a shape: the paper's way beside the paper, our step, and every operation with its bytes and rates."""
    found = []
    for name in setup.config("fig11")["shapes"]:
        mine = {_key(r["kv_sparsity"]): r for r in records if r["shape"] == name}
        published = base.paper(PUBLISHED)
        found += [_paper_way(name, mine, published), _ours(name, mine, published), _details(name, mine, published)]
    return found


def draw(setup: Setup, records: Sequence[dict], path: Path) -> str:
    """Stacked bars: the paper, its way here, and our step."""
    panels = {}
    for name in setup.config("fig11")["shapes"]:
        mine = {_key(r["kv_sparsity"]): r for r in records if r["shape"] == name}
        panels[name] = mine, base.paper(PUBLISHED)["data"][name]
    return costs.breakdown(panels, dict(zip(PAPER_WAY, NAMES, strict=True)), path)


def _shape(config: dict, paper: dict, name: str) -> Shape:
    """The paper's shape; `tokens`, `heads` and `head_dim` of a config replace its numbers, for tests."""
    published, n = paper["shapes"][name], paper["workload"]["tokens"]
    heads = config.get("heads", published["n_heads"])
    return Shape(
        config["batch"],
        config.get("tokens", n),
        heads,
        config.get("head_dim", published["d_model"] // published["n_heads"]),
    )


def _key(kv_sparsity: float) -> str:
    """How the paper's data calls a sparsity."""
    return f"{100 * kv_sparsity:g}" if kv_sparsity else "dense"


def _get(record: dict | None, name: str):
    return None if record is None else record.get(name)


def _over(x: float | None, y: float | None) -> float | None:
    return None if x is None or not y else x / y


def _paper_way(name: str, mine: dict, paper: dict) -> Table:
    """Shares of the dense time, ours / the paper's."""
    bars, dense = paper["data"][name], mine.get("dense")
    whole, published = _get(dense, "paper_way_s"), bars["dense"]["total_us"]
    rows, versus = [], []
    for key, bar in bars.items():
        record = mine.get(key)
        kept = _implied(bar, "qk", paper, name)
        pairs = [(_over(_get(record, f"{op}_s"), whole), _over(bar[f"{op}_us"], published)) for op in PAPER_WAY]
        total = _over(_get(record, "paper_way_s"), whole), _over(bar["total_us"], published)
        cells = [f"{common.number(a, '.2f')} / {common.number(b, '.2f')}" for a, b in (*pairs, total)]
        cells.append(common.number(_over(_get(record, "selection_s"), whole), ".2f"))
        rows.append(
            [_label(key), common.number(_get(record, "kept_tokens"), ".0f"), common.number(kept, ".1f"), *cells]
        )
        about = f"{name}, {_label(key)}"
        versus.append(Versus(f"{about}: kept tokens", "tokens", _get(record, "kept_tokens"), kept, "measured"))
        if key != "dense":
            versus.append(Versus(f"{about}: attention over dense attention, the paper's way", "x", *total, "measured"))
            adds = _over(_get(record, "local_sum_adds"), _get(record, "batch") and record["batch"] * record["heads"])
            implied = _implied(bar, "local_sum", paper, name)
            versus.append(Versus(f"{about}: additions per sequence and head", "additions", adds, implied, "measured"))
    caption = (
        f"Figure 11, {name}: times of single operations, the paper's way, as shares of dense QK + softmax + AV "
        f"(here {_us(whole)} us, paper {published} us): ours / the paper's. {_caption(mine, paper)}"
    )
    head = ("KV sparsity", "kept", "kept, paper", *(f"{n}" for n in NAMES), "sum of these", "selection (ours only)")
    return Table(caption, head, rows, versus=versus, why=_why(mine))


def _ours(name: str, mine: dict, paper: dict) -> Table:
    """Our step in us: its parts, their sum, the whole in one program."""
    bars, whole = paper["data"][name], _get(mine.get("dense"), "step_s")
    rows, versus = [], []
    for key, bar in bars.items():
        record = mine.get(key)
        ratio, published = _over(_get(record, "step_s"), whole), _over(bar["total_us"], bars["dense"]["total_us"])
        low, high = _get(record, "step_s_quartiles") or (None, None)
        rows.append(
            [
                _label(key),
                common.number(_get(record, "slots"), ".0f"),
                *(_us(_get(record, f"{part}_s")) for part in (*PARTS, "parts", "step")),
                "-" if low is None else f"{_us(low)} to {_us(high)}",
                common.number(ratio, ".2f"),
                common.number(published, ".2f"),
                common.number(_get(record, "moved_rows"), ".2f"),
                common.number(_get(record, "gathered_rows"), ".0f"),
            ]
        )
        if key != "dense":
            what = f"{name}, {_label(key)}: attention over dense attention, our whole step"
            versus.append(Versus(what, "x", ratio, published, "measured"))
    caption = (
        f"Figure 11, {name}: our decode step of one layer in us, in parts and as one program (median, quartiles); what it "
        "takes over the dense step; the paper's SWA over its dense attention; rows that an exchange moves and that the "
        f"paper's way gathers, per step and sequence. {_caption(mine, paper)}"
    )
    head = ("KV sparsity", "slots", "append", "attend", "window sum", "exchange", "parts", "step", "quartiles")
    return Table(caption, (*head, "step / dense", "paper", "rows moved", "rows gathered"), rows, versus=versus)


def _details(name: str, mine: dict, paper: dict) -> Table:
    """Every operation that was run: time, bytes, operations, rates, and the paper's count."""
    rows = []
    for key, record in mine.items():
        bar = paper["data"][name].get(key)
        for op in (*PAPER_WAY, "selection", *PARTS, "step"):
            if f"{op}_s" not in record:
                continue
            seconds, moved = record[f"{op}_s"], record[f"{op}_bytes"]
            macs, adds = record[f"{op}_macs"] or None, record[f"{op}_adds"] or None
            count, implied = macs or adds, _implied(bar, op, paper, name) if op in LABELLED else None
            per_sequence = _over(count, record["batch"])
            if implied is not None:  # from kept tokens, or additions of a head, to operations of a sequence
                shape = paper["shapes"][name]
                implied *= shape["n_heads"] if op == "local_sum" else shape["d_model"]
            rows.append(
                [
                    _label(key),
                    "our whole step" if op == "step" else op,
                    _us(seconds),
                    common.number(moved, ".3g", 1e-6),
                    common.number(_over(moved, seconds), ".3g", 1e-9),
                    common.number(_over(count, seconds), ".3g", 1e-9),
                    "MAC" if macs else "add" if adds else "-",
                    common.number(per_sequence, ".4g", 1e-3),
                    common.number(implied, ".4g", 1e-3),
                ]
            )
    caption = (
        f"Figure 11, {name}: operations with what they cannot do without: bytes read once and written once, multiply-adds "
        "(MAC) or additions, whole batch; thousands of operations per sequence beside those that the paper's labels imply. "
        f"{_caption(mine, paper)}"
    )
    head = ("KV sparsity", "operation", "us", "MB", "GB/s", "G operations/s", "of", "k per sequence", "paper")
    return Table(caption, head, rows, left=2)


def _implied(bar: dict, op: str, paper: dict, name: str) -> float | None:
    """What a label implies: kept tokens, or for the sum additions of a sequence and head; None without a label.

    operations = label * 1e10 / s * time; QK and AV do b d_model of them a kept token.
    """
    if bar[f"label_{op}"] is None:
        return None
    shape, batch = paper["shapes"][name], paper["workload"]["batch"]
    operations = bar[f"label_{op}"] * paper["label_ops_per_s"] * bar[f"{op}_us"] * 1e-6
    return operations / (batch * (shape["n_heads"] if op == "local_sum" else shape["d_model"]))


def _label(key: str) -> str:
    return key if key == "dense" else f"{key} %"


def _us(seconds: float | None) -> str:
    return common.number(seconds, ".0f", 1e6)


def _caption(mine: dict, paper: dict) -> str:
    first = next(iter(mine.values()), None)
    if first is None:
        return "Nothing was run."
    return (
        f"{first['heads']} heads of {first['head_dim']}, {first['tokens']} tokens, batch {first['batch']} (paper: "
        f"{paper['workload']['batch']}), {first['dtype']}, median of {first['repeats']} after {first['warmup']}, on "
        f"{device(mine.values())}. Queries, keys and values are those of layer {first['layer']} of {first['model']} on "
        f"{first['data']}, heads and channels repeated."
    )


def _why(mine: dict) -> list[str]:
    first = next(iter(mine.values()), None)
    if first is None:
        return []
    return [
        f"the device is another one ({first['device_kind']}; the paper does not name its own, and its times imply memory "
        "rates at or above the peak of its GPUs), so shares of the dense time are compared and not times;",
        "kept tokens are floor(r n) as the labels imply; Algorithm 1, which our step follows, keeps 2 round(r n / 2);",
        "the labels of the window's sum imply (r n)^2 additions before rounding, ours are floor(r n)^2.",
        "a gather reads token-major rows and writes new head-major arrays at every call; our working set stays in place.",
    ]
