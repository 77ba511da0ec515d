"""What the published figures say beyond their numbers, checked on the cells of `eval.modelled.paper_cells`."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from eval.modelled.paper_cells import pick

NEAR = 0.25
GAINS = (1.1, 1.35)  # of recomputation
STAGES = ("flexgen", "swa", "swa_ds", "alisa")
# Why a column has cells that are further off than NEAR; printed only where it has.
WHY = MappingProxyType(
    {
        "9 hf_accelerate": "LLaMA-13B is slower by the layer than LLaMA-33B, on which LLaMA's a is fitted",
        "9 flexgen": "LLaMA-13B is slower by the layer than LLaMA-33B, on which LLaMA's a is fitted",
        "9 vllm": "its published step grows by several ms a sequence where all still fits, which no common step does, and "
        "waves start a sequence only when a whole wave is done",
        "9 vllm_by_memory": "as for vLLM; how many sequences run at a time is fitted in its own row",
        "9 alisa/flexgen": "the errors of FlexGen",
        "9 alisa/vllm": "the errors of vLLM",
        "12a p1": "Figure 12a has rows on the CPU at the end of its own Phase I, so the room on the GPU did not set it",
        "12a p2": "recomputing pays from u (alpha + r beta) (s + j) = T on; a T a quarter above Figure 12b's compute gives "
        "all four, and smaller gains than are published",
        "12b compute_s": "Phase III is modelled to begin earlier, so more of it comes before the mark in Phase II",
        "12b memory_s": "the figure's Phase II copies more than r (s + j) the lower the sparsity, its Phase III less: a "
        "constant alpha gets the sum right and not the phases",
        "12b total_s": "as for the copies",
        "12c swa_ds": "the figure's INT8 saves nearly half of the copies at 80 % and little at 20 %, and a rate of rows "
        "that is common to all sparsities saves the same share",
    }
)


class Trend(NamedTuple):
    """A sentence with numbers, and whether the modelled cells agree; None: it only counts."""

    figure: str
    holds: bool | None
    text: str


def trends(cells: Sequence[dict]) -> list[Trend]:
    """Everything that can be said of the figures in `cells`."""
    found = []
    for figure, check in (("9", _figure_9), ("12a", _figure_12a), ("12b", _figure_12b), ("12c", _figure_12c)):
        mine = [one for one in cells if one["figure"] == figure and "traffic" not in one]
        if mine:
            found += check(mine) + list(near(figure, mine))
    return found


def _figure_9(cells: Sequence[dict]) -> list[Trend]:
    few, many = (pick(cells, system="alisa/vllm", batch=batch) for batch in (4, 64))
    leads = [pick(cells, system="alisa/flexgen", batch=batch) for batch in (4, 64)]
    grows = all(_number(b["modelled"]) > _number(a["modelled"]) for a, b in zip(*leads, strict=True))
    free = pick(cells, system="vllm_by_memory", batch=64)
    ours = [pick(cells, system="alisa", batch=64, model=one["model"])[0] for one in free]
    beaten = [_number(a["modelled"]) / _number(b["modelled"]) for a, b in zip(ours, free, strict=True)]
    listed = ", ".join(f"{one['model']} {ratio:.2f}" for one, ratio in zip(free, beaten, strict=True))
    return [
        Trend("9", _all(few, lambda x: x < 1), f"vLLM is ahead at batch 4: ALISA/vLLM {_span(few)}"),
        Trend("9", _all(many, lambda x: x > 1), f"ALISA is ahead at batch 64: ALISA/vLLM {_span(many)}"),
        Trend("9", all(one > 1 for one in beaten), f"the same with all that the H100's memory holds in vLLM: {listed}"),
        Trend("9", grows, f"ALISA/FlexGen grows from {_span(leads[0])} at batch 4 to {_span(leads[1])} at 64"),
    ]


def _figure_12a(cells: Sequence[dict]) -> list[Trend]:
    p1, p2 = ([one["modelled"] for one in _by_sparsity(pick(cells, quantity=name))] for name in ("p1", "p2"))
    once = lambda key: ", ".join(map(str, sorted({one[key] for one in pick(cells, quantity="p1")})))
    listed = lambda name, key: ", ".join(str(one[key]) for one in _by_sparsity(pick(cells, quantity=name)))
    return [
        Trend(
            "12a",
            len(set(p1)) == 1,
            f"p1 does not depend on sparsity: {once('modelled')} (published {once('published')})",
        ),
        Trend(
            "12a",
            all(a < b for a, b in pairwise(p2)),
            f"p2 rises with sparsity: {listed('p2', 'modelled')} from 20 to 80 % (published {listed('p2', 'published')})",
        ),
    ]


def _figure_12b(cells: Sequence[dict]) -> list[Trend]:
    gains = pick(cells, quantity="recompute_gain")
    low, high = GAINS
    text = f"recomputation gains {low} to {high} times: {_span(gains)}"
    return [Trend("12b", _all(gains, lambda x: low <= x <= high), text)]


def _figure_12c(cells: Sequence[dict]) -> list[Trend]:
    found, steps = [], {}
    for before, after in pairwise(STAGES):
        pairs = zip(*(_by_sparsity(pick(cells, system=name)) for name in (before, after)), strict=True)
        steps[after] = [
            {key: b[key] / a[key] for key in ("modelled", "published")}
            for a, b in pairs
            if "OOM" not in (a["modelled"], b["modelled"])
        ]
    names = dict(swa="SWA", swa_ds="dynamic scheduling", alisa="compression")
    every = [one for gains in steps.values() for one in gains]
    found.append(Trend("12c", _all(every, lambda x: x > 1), f"every step of the ablation helps: {_span(every)}"))
    for name, gains in steps.items():
        rises = all(a["modelled"] < b["modelled"] for a, b in pairwise(gains))
        listed = lambda key, gains=gains: ", ".join(f"{one[key]:.2f}" for one in gains)
        text = f"{names[name]} helps more at higher sparsity: {listed('modelled')} from 20 to 80 %"
        text += f" (published {listed('published')})"
        found.append(Trend("12c", rises, text))
    return found


def near(figure: str, cells: Sequence[dict]) -> Iterable[Trend]:
    """How many predictions of each column are within NEAR, the worst, and why."""
    by = "system" if figure in ("9", "12c") else "quantity"
    for name in dict.fromkeys(one[by] for one in cells):
        mine = [one for one in pick(cells, **{by: name}) if not one["fitted"] and one["published"] is not None]
        known = [one["error_frac"] for one in mine if one["error_frac"] is not None]
        if not known:
            continue
        near = sum(abs(error) <= NEAR for error in known)
        text = (
            f"{name}: {near} of {len(mine)} predictions within {NEAR:.0%} (from {min(known):+.0%} to {max(known):+.0%}"
        )
        text += f", {len(mine) - len(known)} OOM)" if len(mine) > len(known) else ")"
        if near < len(mine):
            text += f": {WHY.get(f'{figure} {name}', 'not understood')}"
        yield Trend(figure, None, text)


def _by_sparsity(cells: Iterable[dict]) -> list[dict]:
    return sorted(cells, key=lambda one: one["kv_sparsity"])


def _number(value) -> float:
    return float("nan") if isinstance(value, str) else value


def _all(cells: Sequence[dict], test) -> bool:
    return all(test(_number(one["modelled"])) for one in cells)


def _span(cells: Sequence[dict]) -> str:
    ours, theirs = ([_number(one[key]) for one in cells] for key in ("modelled", "published"))
    return f"{min(ours):.2f} to {max(ours):.2f} (published {min(theirs):.2f} to {max(theirs):.2f})"
