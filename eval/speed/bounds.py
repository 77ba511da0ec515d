"""What Belady's oracle would load of the rows that a trace attends, beside what a system loaded."""

import functools

from alisa_jax import placement, policies
from alisa_jax.placement.modelled import belady
from eval.speed import systems, traces
from eval.speed.systems import System, Work


def fields(system: System, work: Work, trace: traces.Trace, brought_rows: int) -> dict:
    """`belady_rows`, and how many times as many `brought_rows` are, which the system loaded or computed again; None where
    the oracle needs none."""
    rows = least_rows(system, work, trace)
    return {"belady_rows": rows, "rows_over_belady": brought_rows / rows if rows else None}


def least_rows(system: System, work: Work, trace: traces.Trace) -> int:
    """The rows that any placement loads of what `system` attends under `trace`, with as many rows on the device.

    Sequences that stay whole there need none.
    """
    controller, setting = placement.parse(system.controller), systems.setting(system, work)
    heads = policies.parse(system.policy).selection_heads(work.config.n_kv_heads)
    return sum(_of_part(part, controller.layout(part), trace, heads) for part in controller.groups(setting))


def _of_part(part, layout, trace: traces.Trace, heads: int) -> int:
    room = belady.held_rows(part, layout, heads)

    @functools.cache  # layers and sequences share what was recorded
    def least(layer: int, sequence: int, prompt_tokens: int) -> int:
        sets = trace.sets(layer, sequence, prompt_tokens, part.new_tokens - 1, heads)
        return belady.least_rows(sets, prompt_tokens, room)

    away = part.prompt_tokens[layout.whole :]
    layers = [trace.layer(i, part.layers) for i in range(part.layers)]
    return sum(least(layer, b % trace.sequences, n) for layer in layers for b, n in enumerate(away))
