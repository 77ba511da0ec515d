"""What a placed run needs, from shapes alone: the `Setting`, and what cannot be placed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from alisa_jax import attention
from alisa_jax.attention import parts
from alisa_jax.attention.parts import Part
from alisa_jax.kv.state import LayerSpec, tree_bytes
from alisa_jax.models.config import ModelConfig
from alisa_jax.placement.plan import PAGE_TOKENS, Controller, Layout, Setting, pages


def setting_of(
    config: ModelConfig,
    layers: tuple[LayerSpec, ...],
    prompt_tokens: Sequence[int],
    new_tokens: int,
    device_kv_bytes: float = math.inf,
    host_kv_bytes: float = math.inf,
    gather: bool = True,
) -> Setting:
    """The run in numbers; bytes are those of the arrays that `parts.init` would make.

    Layers that attend everything beside layers that select (`dense_layers=`) stay on the device
    whole and count as fixed. Raises ValueError for what no controller can run.
    """
    check_layers(layers)
    placed = placed_layers(layers)
    codec = layers[placed[0]].codec
    token_bytes = codec.token_bytes(config.n_kv_heads, config.head_dim)
    policies = [layers[i].policy for i in placed]
    selects, evicts = policies[0].selects, policies[0].selects and any(p.evicts for p in policies)
    context = PAGE_TOKENS * pages(max(prompt_tokens) + new_tokens - 1)
    slots = max(p.capacity(context) for p in policies) if selects else 0
    fixed = sum(
        _fixed_bytes(config, spec, context, i in placed, evicts) for i, spec in enumerate(layers)
    )
    return Setting(
        layers=len(placed),
        prompt_tokens=tuple(int(n) for n in prompt_tokens),
        new_tokens=new_tokens,
        token_bytes=token_bytes,
        device_kv_bytes=device_kv_bytes,
        host_kv_bytes=host_kv_bytes,
        slots=slots,
        stats_bytes=fixed - len(placed) * slots * token_bytes,
        selects=selects,
        evicts=evicts,
        refreshes=any(getattr(p, "refresh_every", 0) for p in policies),
        gather=gather,
    )


def placed_layers(layers: tuple[LayerSpec, ...]) -> tuple[int, ...]:
    """The layers whose tokens a controller places: those that select, or all where none does."""
    selecting = tuple(i for i, spec in enumerate(layers) if spec.policy.selects)
    return selecting or tuple(range(len(layers)))


def check(controller: Controller, setting: Setting) -> None:
    """Raise ValueError, in one sentence, for what `controller` cannot run."""
    controller.check(setting)
    if setting.refreshes and any(
        controller.layout(part).kept_pages for part in controller.groups(setting)
    ):
        raise ValueError(
            "a policy that refreshes attends every token at times, and placement brings single "
            "rows to the policies that select: give refresh_every=0, or a device budget that "
            "holds everything"
        )


def check_layers(layers: tuple[LayerSpec, ...]) -> None:
    """Raise ValueError, in one sentence, for what no controller can run."""
    for spec in layers:
        if spec.route != "working_set":
            raise ValueError(
                f"placement serves the route working_set; {spec.policy} is run by the route "
                f"{spec.route}"
            )
        if spec.policy.appends:
            raise ValueError(
                f"placement plans sets of a known size; {spec.policy} keeps what its prompt "
                "leaves and all after it"
            )
        if spec.rotation is not None:
            raise ValueError(
                f"placement moves keys that carry their positions; {spec.policy} with "
                f"{spec.codec} turns them at every step"
            )


def layout_of(layout: Layout, setting: Setting, placed: bool) -> tuple[Part, ...]:
    """The parts of a layer; a layer that is not placed has one, whole."""
    finals, B = setting.final_tokens, setting.batch
    context = lambda first, stop: PAGE_TOKENS * pages(max(finals[first:stop]))
    whole = layout.whole if placed else B
    found = [Part(0, whole, context(0, whole))] if whole else []
    if whole < B:
        found.append(Part(whole, B, context(whole, B), PAGE_TOKENS * layout.kept_pages))
    return tuple(found)


def _fixed_bytes(
    config: ModelConfig, spec: LayerSpec, context: int, placed: bool, evicts: bool
) -> int:
    """Bytes of one sequence in one layer beside the rows of the store."""
    rings = placed and not evicts
    ring = PAGE_TOKENS if rings and spec.policy.selects else 0
    part = Part(0, 1, context, ring)
    empty = lambda: attention.freeze(
        parts.init(spec, part, config.n_heads, config.n_kv_heads, config.head_dim)
    )
    state = jax.eval_shape(empty)
    home = state.store if ring else state.ws
    rows = [*spec.codec.leaves(home.k), *spec.codec.leaves(home.v)] if rings else []
    return tree_bytes(state) - tree_bytes(rows)
