"""The states of a layer: what goes together, sizes, and how a state is made, grown and frozen."""

from __future__ import annotations

import jax.numpy as jnp

from alisa_jax.kv.state import LayerSpec, LayerState, Store, WorkingSet
from alisa_jax.policies.base import Dims

ROUTES = ("working_set", "indexed", "masked")


def check(spec: LayerSpec, context: int, n_heads: int, n_kv_heads: int) -> None:
    """Raise ValueError, in one sentence and before any work, for parts that cannot run together."""
    policy = spec.policy
    codec = spec.codec
    route = spec.route
    if route not in ROUTES:
        raise ValueError(f"route must be auto or one of {', '.join(ROUTES)}; got {route!r}")
    if route not in policy.routes:
        raise ValueError(f"{policy} runs on {', '.join(policy.routes)}; got route {route!r}")
    if n_heads % n_kv_heads:
        raise ValueError(
            f"query heads must be a multiple of kv heads; got {n_heads} and {n_kv_heads}"
        )
    if policy.compacts and (policy.raw_keys or codec.raw_keys):
        raise ValueError(
            f"{policy} works on keys that carry their positions; {codec} keeps them as they were "
            "projected"
        )
    if (refused := codec.refuses(policy, route)) is not None:
        raise ValueError(refused)
    policy.validate(context)


def dims_of(spec: LayerSpec, B: int, N: int, K: int, S: int, H: int = 0) -> Dims:
    """Sizes of the state of one layer for a context bucket of S tokens."""
    return Dims(B, N, K, S, spec.policy.capacity(S) if spec.route == "working_set" else S, H)


def prompt_dims(dims: Dims, spec: LayerSpec, room: int) -> Dims:
    """`dims` of a state that starts with a prompt and has room for `room` further tokens."""
    if spec.route != "working_set" or not spec.policy.appends:
        return dims
    return dims._replace(M=min(dims.M, spec.policy.prompt_capacity(dims.S) + room))


def init(spec: LayerSpec, dims: Dims, H: int) -> LayerState:
    """The state of a layer that has seen no token."""
    B, _, K, S, M, _ = dims = dims._replace(H=H)
    policy = spec.policy
    codec = spec.codec
    P = policy.selection_heads(K)
    ws = None if spec.route == "indexed" else WorkingSet.empty(codec, B, K, M, H, P)
    keeps_store = spec.route == "indexed" or (spec.route == "working_set" and not policy.evicts)
    store = Store.empty(codec, B, S, K, H) if keeps_store else None
    return LayerState(ws, store, policy.init(dims), jnp.zeros((B,), jnp.int32), spec, S)


def grow(state: LayerState, S: int, room: int | None = None) -> LayerState:
    """The same state for a context of S tokens.

    room: the most tokens that may follow, where a set grows by each of them; None: up to S.
    """
    policy = state.spec.policy
    codec = state.spec.codec
    in_set = state.spec.route == "working_set"
    M = policy.capacity(S) if in_set else S
    if policy.appends and in_set:
        M = state.ws.pos.shape[-1] + min(S - state.context, S if room is None else room)
    return state.replace(
        ws=None if state.ws is None else state.ws.grow(codec, M),
        store=None if state.store is None else state.store.grow(codec, S),
        stats=policy.grow(state.stats, S, M),
        context=S,
    )


def freeze(state: LayerState) -> LayerState:
    """The same state with all tokens encoded, once the codec has seen its `frozen_after` tokens."""

    def frozen(home):
        return None if home is None else home.freeze(state.spec.codec)

    return state.replace(ws=frozen(state.ws), store=frozen(state.store))
