"""What an engine compiles: how many programs, and that no step copies the cache or the window."""

import math
import weakref

import jax
import jax.numpy as jnp
import pytest

import alisa_jax
from alisa_jax.engine.step import CHUNK_STEPS
from alisa_jax.kv.buckets import next_bucket
from alisa_jax.kv.state import tree_bytes

SWA = "swa(kv_sparsity=0.8)"
MIB = 2**20
# The buckets of 1 .. 1536 tokens: 1.25 times the one before, up to a multiple of 32.
BUCKETS = (32, 64, 96, 128, 160, 224, 288, 384, 480, 608, 768, 960, 1216, 1536)


@pytest.fixture
def backend_compiles():
    """A list that gets one entry for every program that XLA compiles."""
    seen = []

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.full(sample=1)
@pytest.mark.parametrize("policy, prompt_tokens", [("dense", 100), (SWA, 400)])
def test_a_thousand_tokens_compile_one_program_per_bucket(random_model, backend_compiles, policy, prompt_tokens):
    engine = alisa_jax.Engine(random_model(max_positions=1400), policy)
    del backend_compiles[:]
    first = engine.generate([[1] * prompt_tokens], 1000)
    assert len(first.tokens[0]) == 1000
    met = [S for i, S in enumerate(BUCKETS) if S >= prompt_tokens and (i == 0 or BUCKETS[i - 1] < prompt_tokens + 999)]
    prefill, first_token, chunks, grows = 1, 1, len(met), len(met) - 1
    assert first.compiles == prefill + first_token + chunks + grows
    assert first.compiles <= len(backend_compiles) <= first.compiles + 16  # XLA's own count, a few tiny ones beside
    del backend_compiles[:]
    assert engine.generate([[3] * (prompt_tokens - 1)], 1000).compiles == 0
    assert not backend_compiles


def test_the_number_of_buckets_is_logarithmic():
    size, count = 32, 1
    while size < 10**7:
        grown = next_bucket(size)
        assert grown >= 1.25 * size and grown % 32 == 0
        size, count = grown, count + 1
    assert count <= 1 + math.log(10**7 / 32) / math.log(1.25) + 1


def test_a_layer_is_freed_before_the_next_one_grows(random_model):
    engine = alisa_jax.Engine(random_model(n_layers=3), "dense")
    grow, old = engine.programs.grow, []

    def watched(state, *S):
        assert all(ref() is None for ref in old)
        old.append(weakref.ref(state.ws.k))
        return grow(state, *S)

    engine.programs.grow = watched
    engine.generate([[1] * 32], 2)
    assert len(old) == 3


@pytest.mark.full(sample=1, per=("policy", "program", "B"))
@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize(
    "policy, layers, program",
    [
        ("dense", 2, "generate"),
        ("dense", 2, "score"),
        (SWA, 2, "generate"),
        (SWA, 2, "score"),
        ("swa(kv_sparsity=0.8,window=2k,shared_heads=false,refresh_every=8)", 1, "generate"),
    ],
)
def test_no_step_copies_the_cache_or_the_window(random_model, policy, layers, program, B):
    S, N = 18944 // B, 8
    model = random_model(n_layers=layers, n_heads=N, n_kv_heads=4, head_dim=64, max_positions=S)
    engine = alisa_jax.Engine(model, policy)
    struct = jax.ShapeDtypeStruct
    params, kv = jax.eval_shape(lambda: (model.params, engine.init(B, S)))
    n = struct((), jnp.int32)
    if program == "generate":
        rest = (struct((B,), jnp.int32), struct((B,), jnp.bool_), struct((1,), jnp.int32), n)
        lowered = engine.programs.generate.lower(params, kv, *rest)
    else:
        tokens = struct((B, CHUNK_STEPS), jnp.int32)
        lowered = engine.programs.score.lower(params, kv, tokens, tokens, struct((B, CHUNK_STEPS), jnp.bool_), n)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == tree_bytes(kv)  # all of the state is updated in place
    (state,) = kv.layers[-1]
    cache = [x.k for x in (state.ws, state.store) if x is not None]
    assert min(tree_bytes(x) for x in cache) > 1.5 * MIB  # a copy of any of them would show
    slots = state.ws.k.shape[2]
    activations = 2 * B * N * slots * 4  # logits and weights of one layer's attention
    if "refresh_every" in policy:
        activations += 2 * B * N * S * 4
    assert memory.temp_size_in_bytes - activations < MIB
