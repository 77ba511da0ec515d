"""What the compiled decode step does to memory, and that a state keeps its shape and types: nothing is executed here."""

import functools

import jax
import jax.numpy as jnp
import pytest

from alisa_jax import attention
from alisa_jax.codecs import Raw
from alisa_jax.kv.state import LayerSpec, tree_bytes
from alisa_jax.policies import parse
from tests import replay

B, S, N, K, H = 4, 4096, 12, 12, 64
CODEC = Raw("float32")
MIB = 2**20
POLICIES = (
    "dense",
    "local(kv_sparsity=0.8)",
    "strided(kv_sparsity=0.8)",
    "swa(kv_sparsity=0.8)",
    "swa(kv_sparsity=0.8,window=2k)",
    "swa(kv_sparsity=0.8,window=16,shared_heads=false)",
    "swa(kv_sparsity=0.8,decay=0.9)",
    "swa(kv_sparsity=0.8,refresh_every=16)",
)


def shapes(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@functools.cache
def abstract(text, route, codec=CODEC, S=S, B=B):
    spec = LayerSpec(parse(text), codec, route)
    return jax.eval_shape(lambda: attention.init(spec, attention.dims_of(spec, B, N, K, S), H))


@pytest.mark.full(sample=1, per=("text", "B"))
@pytest.mark.parametrize("B", [1, B])
@pytest.mark.parametrize("text", POLICIES)
def test_a_donated_step_updates_the_state_in_place_and_copies_neither_cache_nor_window(text, B):
    state = abstract(text, "working_set", B=B)
    step = jax.jit(lambda *a: attention.step(*a)[:2], donate_argnums=0)
    lowered = step.lower(state, shapes(B, N, H), shapes(B, K, H), shapes(B, K, H))
    memory = lowered.compile(replay.QUICK).memory_analysis()  # buffers are assigned before LLVM comes in
    assert memory.alias_size_in_bytes == tree_bytes(state), "some part of the state is written to new memory"
    P, M = state.ws.pos.shape[1:]
    # logits and weights of the attended slots; of all tokens where steps are refreshed; scores of one selection
    activations = 2 * 4 * B * N * (S if "refresh" in text else M) + 3 * 4 * B * P * S * ("swa" in text)
    assert memory.temp_size_in_bytes < MIB + activations
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < largest / 4, "room enough for a copy of what must not be copied"


ROUTES = [
    (text, route) for text in (*POLICIES, "strided(kv_sparsity=0.8,anchor=query)") for route in parse(text).routes
]


@pytest.mark.parametrize("text, route", ROUTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_gives_back_a_state_of_the_same_types_so_nothing_is_traced_twice(text, route, dtype):
    state = abstract(text, route, Raw(dtype), 96)
    q, k = (jax.ShapeDtypeStruct((B, heads, H), jnp.dtype(dtype)) for heads in (N, K))
    out, after, taps = jax.eval_shape(attention.step, state, q, k, k)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state)):
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type)
        assert not old.weak_type
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert taps.mass.dtype == taps.attended.dtype == jnp.float32 and taps.loads.shape == (B,)


@pytest.mark.parametrize("text, route", ROUTES)
def test_growing_and_prefilling_give_the_types_of_a_state_of_that_size(text, route):
    small, large = abstract(text, route, S=96), abstract(text, route, S=128)
    tokens = shapes(B, 67, N, H), shapes(B, 67, K, H), shapes(B, 67, K, H)
    _, filled = jax.eval_shape(attention.prefill, small, *tokens, jax.ShapeDtypeStruct((B,), jnp.int32))
    for got, want in ((filled, small), (jax.eval_shape(functools.partial(attention.grow, S=128), small), large)):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
