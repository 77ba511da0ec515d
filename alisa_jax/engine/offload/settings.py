"""What a placed run needs, from shapes alone: the `Setting`, and what cannot be offloaded."""

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
from alisa_jax.policies.base import Policy


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
    whole and count as fixed. Raises ValueError for a length out of its range.
    """
    placed = placed_layers(layers)
    chosen = [layers[i] for i in placed]
    codec = chosen[0].codec
    token_bytes = codec.token_bytes(config.n_kv_heads, config.head_dim)
    selects = chosen[0].policy.selects
    by_query = chooses(chosen[0])
    sets = [spec for spec in chosen if selects and spec.route == "working_set"]
    evicts = any(spec.policy.evicts for spec in sets)
    longest = max(prompt_tokens)
    context = PAGE_TOKENS * pages(longest + new_tokens - 1)
    slots = max((_slots(spec.policy, context, longest, new_tokens) for spec in sets), default=0)
    most = max(min(context, spec.policy.capacity(context)) for spec in chosen) if by_query else 0
    fixed = sum(
        _fixed_bytes(config, spec, context, slots, i in placed, evicts)
        for i, spec in enumerate(layers)
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
        refreshes=_refreshes(chosen),
        stays=_stays(chosen),
        gather=gather,
        chosen=most,
        heads=config.n_kv_heads if by_query else 1,
    )


def placed_layers(layers: tuple[LayerSpec, ...]) -> tuple[int, ...]:
    """The layers whose tokens a controller places: those that select, or all where none does."""
    selecting = tuple(i for i, spec in enumerate(layers) if spec.policy.selects)
    return selecting or tuple(range(len(layers)))


def chooses(spec: LayerSpec) -> bool:
    """Whether the query itself, and nothing that was attended, chooses the tokens of a layer."""
    policy = spec.policy
    by_query = policy.needs_query and type(policy).observe is Policy.observe
    return spec.route == "indexed" and by_query


def check(controller: Controller, setting: Setting) -> None:
    """Raise ValueError, in one sentence, for what `controller` cannot run."""
    controller.check(setting)
    if setting.stays and any(
        controller.layout(part).kept_pages for part in controller.groups(setting)
    ):
        raise ValueError(setting.stays)


def _refreshes(layers: Sequence[LayerSpec]) -> bool:
    return any(spec.policy.without_refresh() != spec.policy for spec in layers)


def _stays(layers: Sequence[LayerSpec]) -> str:
    """Why no token of these layers can leave the device, in one sentence; "" if they can."""
    for spec in layers:
        if spec.route != "working_set" and not chooses(spec):
            return (
                "offloading serves the route working_set, and indexed where the query alone "
                f"chooses; the policy is run by the route {spec.route}: give the controller "
                "resident or waves, or a device budget that holds everything"
            )
    return ""


def _slots(policy, context: int, prompt_tokens: int, new_tokens: int) -> int:
    """Slots of a working set from its first step on: a set that grows has its last size."""
    most = policy.capacity(context)
    if not policy.appends:
        return most
    return min(most, policy.prompt_capacity(prompt_tokens) + new_tokens - 1)


def layout_of(layout: Layout, setting: Setting, placed: bool) -> tuple[Part, ...]:
    """The parts of a layer; a layer that is not placed has one, whole."""
    finals, B = setting.final_tokens, setting.batch
    context = lambda first, stop: PAGE_TOKENS * pages(max(finals[first:stop]))
    whole = layout.whole if placed else B
    slots = setting.slots if placed else 0
    found = [Part(0, whole, context(0, whole), 0, slots)] if whole else []
    if whole < B:
        found.append(Part(whole, B, context(whole, B), PAGE_TOKENS * layout.kept_pages, slots))
    return tuple(found)


def _fixed_bytes(
    config: ModelConfig, spec: LayerSpec, context: int, slots: int, placed: bool, evicts: bool
) -> int:
    """Bytes of one sequence in one layer beside the rows of its store."""
    stores = placed and not evicts
    ring = PAGE_TOKENS if stores and (slots or chooses(spec)) else 0
    part = Part(0, 1, context, ring, slots if placed else 0)
    empty = lambda: attention.freeze(
        parts.init(spec, part, config.n_heads, config.n_kv_heads, config.head_dim)
    )
    state = jax.eval_shape(empty)
    home = state.ws if state.store is None else state.store
    rows = [*spec.codec.leaves(home.k), *spec.codec.leaves(home.v)] if stores else []
    return tree_bytes(state) - tree_bytes(rows)
