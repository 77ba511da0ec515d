"""StreamingLLM at places in the cache: rings against concatenation in NumPy, streams beyond a model's context, codecs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import attention
from alisa_jax.codecs import NO_ROTATION, Rotation
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models import Decoder, Model, ModelConfig
from alisa_jax.policies import Dense, Local, Streaming, parse
from tests import oracle, replay

H, T = 6, 60
TURNS = Rotation((1.0, 0.3), T)  # four of the six channels are rotated
HEADS = {1: (2, 2), 4: (4, 1)}  # G: query heads, kv heads
CACHE = Streaming(sinks=3, tokens=11, positions="cache")
TRUE = Streaming(sinks=3, tokens=11)


@functools.cache
def tokens(G):
    """Queries, keys and values of one sequence, not rotated."""
    return replay.stream(70 + G, 1, T, *HEADS[G], H)


def states(policy, G, route="working_set"):
    """The state of a layer that keeps its keys as they were projected."""
    spec = LayerSpec(policy, replay.CODEC, route, rotation=TURNS)
    return attention.init(spec, attention.dims_of(spec, 1, *HEADS[G], T), H)


@functools.partial(jax.jit, compiler_options=dict(replay.QUICK))
def decoded(state, q, k, v):
    """Steps over q [B, T, N, H], k and v [B, T, K, H]: the state behind them and the outputs [B, T, N, H]."""

    def step(state, token):
        out, state, _ = attention.step(state, *token)
        return state, out

    with jax.default_matmul_precision("highest"):
        state, out = jax.lax.scan(step, state, tuple(jnp.moveaxis(jnp.asarray(x), 1, 0) for x in (q, k, v)))
    return state, jnp.moveaxis(out, 0, 1)


@functools.cache
def run(policy, G, route="working_set"):
    return np.asarray(decoded(states(policy, G, route), *tokens(G))[1][0])


def turned(x, place):
    """x [..., H] float64 turned to `place`, in complex numbers."""
    R = len(TURNS.angles)
    pairs = (x[..., :R] + 1j * x[..., R : 2 * R]) * np.exp(1j * place * np.array(TURNS.angles))
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * R :]], -1)


def concatenated(G, sinks, window):
    """The authors' cache: concatenate, turn each key to its index, attend, and cut: [T, N, H]."""
    (q, k, v), cache, outs = (x[0].astype(np.float64) for x in tokens(G)), [], []
    for t in range(T):
        cache = [*cache, (k[t], v[t])]
        keys = np.stack([turned(key, i) for i, (key, _) in enumerate(cache)])
        values = np.stack([value for _, value in cache])
        everything = np.ones((len(q[t]), len(cache)), bool)
        outs.append(oracle.attention(turned(q[t], len(cache) - 1), keys, values, everything)[0])
        if len(cache) > sinks + window:
            cache = cache[:sinks] + cache[-window:]
    return np.stack(outs)


@pytest.mark.parametrize("G, route", [(1, "working_set"), (4, "working_set"), (4, "indexed"), (4, "masked")])
def test_the_ring_is_a_cache_that_is_concatenated_and_turned_anew_at_every_step(G, route):
    assert T >= 5 * CACHE.tokens
    np.testing.assert_allclose(run(CACHE, G, route), concatenated(G, 3, 8), atol=1e-5)


def test_a_stream_that_fits_is_dense_and_one_that_does_not_is_neither_dense_nor_at_true_positions():
    dense, cache, true = (run(policy, 4) for policy in (Dense(), CACHE, TRUE))
    fits = slice(0, CACHE.tokens + 1)  # the query at position 11 attends 11 others
    np.testing.assert_allclose(cache[fits], dense[fits], atol=1e-5)
    np.testing.assert_allclose(true[fits], dense[fits], atol=1e-5)
    for one, other in ((cache, dense), (true, dense), (cache, true)):
        assert (np.abs(one - other).max((1, 2))[fits.stop :] > 1e-3).mean() > 0.5


def test_without_sinks_it_is_window_attention_at_true_positions():
    np.testing.assert_allclose(
        run(Streaming(sinks=0, tokens=9, positions="cache"), 4), run(Local(tokens=9), 4), atol=1e-5
    )


@pytest.mark.parametrize(
    "policy, moves", [(CACHE, False), (TRUE, True), (Streaming(sinks=0, tokens=11), False)], ids=str
)
def test_the_same_kept_tokens_at_another_time_give_the_same_output(policy, moves):
    """The state after 40 tokens, as if more tokens had come and gone between sinks and window."""
    before, after = ([x[:, part] for x in tokens(4)] for part in (slice(0, 40), slice(40, T)))
    state, _ = decoded(states(policy, 4), *before)
    pos, later = state.ws.pos, 1000
    far = state.replace(
        ws=state.ws.replace(pos=jnp.where(pos >= policy.sinks, pos + later, pos)), length=state.length + later
    )
    here, there = (decoded(s, *after) for s in (state, far))
    assert int(there[0].length[0]) == T + later
    error = np.abs(here[1] - there[1]).max((0, 2, 3))
    if policy is CACHE:
        np.testing.assert_array_equal(here[1], there[1])  # to the last bit: no angle grows with the stream
    assert (error > 1e-3).mean() > 0.5 if moves else (error < 1e-4).all()


@pytest.mark.parametrize("budget", ["tokens=9", "kv_sparsity=0.8"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_places_are_ranks_by_age_less_the_number_of_kept_tokens(sinks, budget):
    policy, S = parse(f"streaming(sinks={sinks},{budget},positions=cache)"), 300
    rng, M = np.random.default_rng(4), policy.capacity(S) + 2
    lengths = jnp.array([0, 1, 3, 5, 9, 10, 137, 299], jnp.int32)
    slots, ranks = np.full((len(lengths), 1, M), -1, np.int32), np.zeros((len(lengths), 1, M), np.int32)
    for b, keep in enumerate(np.asarray(policy.select((), lengths, S))[:, 0]):
        kept = np.flatnonzero(keep)
        at = rng.permutation(M)[: len(kept) + 1]
        slots[b, 0, at] = [*kept, lengths[b]]
        ranks[b, 0, at] = np.arange(len(kept) + 1) - len(kept)
        assert len(kept) < policy.capacity(S)
    got = policy.places(jnp.asarray(slots), lengths)
    np.testing.assert_array_equal(np.where(slots < 0, 0, got), ranks)
    np.testing.assert_array_equal(policy.place(lengths), np.zeros(len(lengths)))


@functools.cache
def model(arch):
    """One layer of random weights; 37 tokens, 48 positions."""
    sizes = dict(vocab_size=37, n_layers=1, n_heads=4, head_dim=6, d_ff=26, max_positions=48)
    other = dict(d_model=22, n_kv_heads=2) if arch == "llama" else dict(d_model=24, n_kv_heads=4)
    other |= {"gpt_neox": dict(rotary_frac=0.67, act="gelu"), "opt": dict(act="relu"), "llama": {}}[arch]
    decoder, rng = Decoder(ModelConfig(arch=arch, **sizes, **other)), np.random.default_rng(3)

    def draw(like):
        return jnp.asarray(
            rng.normal(0, 1.5 * like.shape[0] ** -0.5 if len(like.shape) == 2 else 0.5, like.shape), like.dtype
        )

    params = jax.tree.map(draw, jax.eval_shape(decoder.init, jax.random.key(0)))
    return Model(decoder, params, None, "random", None, (), "random")


@functools.cache
def made(policy, arch, codec):
    return alisa_jax.Engine(model(arch), policy, codec)


def engine(policy, arch="llama", codec="raw"):
    """The same call gives the same engine, with what it has compiled."""
    return made(policy, arch, codec)


def ids(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, n).tolist() for n in lengths]


CODECS = ("raw", "int8(calibration_tokens=6)", "int8(axis=token)", "int4(group=4)")


@pytest.mark.slow
@pytest.mark.full(sample=1, per="arch")
@pytest.mark.parametrize("arch, codec", [("gpt_neox", "raw"), *(("llama", codec) for codec in CODECS)])
def test_both_protocols_agree_beyond_the_context_of_the_model(arch, codec):
    """Codes may differ by one step where a value lies on the border between two: hence the mean."""
    over, batch = engine(CACHE, arch, codec), ids(5, 64, 50)
    assert len(batch[0]) > over.model.decoder.config.max_positions
    decode, masked = (over.score(batch, protocol) for protocol in ("decode", "prefill_mask"))
    for a, b in zip(decode.logprobs, masked.logprobs, strict=True):
        assert np.isfinite(a).all() and np.abs(a - b).mean() < 1e-4
    share = [(min(n, 11) + 1) / (n + 1) for length in (64, 50) for n in range(length - 1)]
    np.testing.assert_allclose(decode.attended_frac, [np.mean(share)], rtol=1e-5)


def test_ranges_of_channels_are_those_of_keys_before_their_rotation():
    over, true = (engine(policy, "llama", "int8(calibration_tokens=6)") for policy in (CACHE, TRUE))
    assert over.layers[0].rotation == true.layers[0].codec.rotation != NO_ROTATION
    assert over.layers[0].codec.rotation == NO_ROTATION and true.layers[0].rotation is None


def test_what_follows_depends_on_the_kept_tokens_and_not_on_what_was_between():
    """One layer, where keys and values follow from the token alone: 3 sinks, 7 or 20 lost tokens, the same 14 at the end.

    The query of the ninth of these is the first that has lost all of those between.
    """
    sinks, short, long, end = ids(9, 3, 7, 20, 14)
    for policy in (CACHE, TRUE):
        scores = engine(policy).score([sinks + lost + end for lost in (short, long)])
        differ = np.abs(scores.logprobs[0][-5:] - scores.logprobs[1][-5:]).max()
        assert differ < 1e-5 if policy is CACHE else differ > 1e-3


def test_generation_goes_on_beyond_the_context_of_the_model_as_it_is_scored():
    over, (prompt,) = engine(CACHE), ids(2, 40)
    new = over.generate([prompt], 20)
    assert len(prompt) + len(new.tokens[0]) == 60 > 48
    scored = over.score([prompt + new.tokens[0]], "prompt", last=[20])
    np.testing.assert_allclose(new.logprobs[0], scored.logprobs[0], atol=1e-4)
    assert scored.correct[0].all()


def test_memory_does_not_grow_with_a_stream_that_has_no_end():
    sizes = {S: engine(CACHE).state_bytes(2, S) for S in (40, 4_000, 400_000)}
    assert len(set(sizes.values())) == 1, sizes
    slots, K = CACHE.tokens + 1, 2
    assert sizes[40] == (2 * 2 * K * slots * H * 4, 2 * (slots * 8 + 4))  # K and V; positions, biases and the length
    new = [jnp.asarray(x[:, 0]) for x in tokens(4)]
    programs = [
        jax.jit(attention.step).lower(states(CACHE, 4).replace(context=S), *new).as_text() for S in (T, 400_000)
    ]
    assert len({len(program) for program in programs}) == 1, "a table of the whole stream"


@pytest.mark.parametrize(
    ("policy", "arch", "use", "sentence"),
    [
        (CACHE, "opt", None, "positions=cache needs a model with rotary positions; opt models learn theirs"),
        (Streaming(tokens=48, positions="cache"), "llama", None, "needs tokens below 48, the model's context; got 48"),
        (CACHE, "llama", lambda e: e.generate(ids(1, 49), 1), "the model's context is 48 tokens; got 49"),
        (TRUE, "llama", lambda e: e.score(ids(1, 49)), "the model's context is 48 tokens; got 49"),
        (Streaming(kv_sparsity=0.8, positions="cache"), "llama", lambda e: e.score(ids(1, 49)), "is 48 tokens; got 49"),
    ],
    ids=["opt", "budget", "prompt", "true", "share"],
)
def test_what_cannot_be_placed_is_refused_in_one_sentence(policy, arch, use, sentence):
    with pytest.raises(ValueError) as error:
        use(engine(policy, arch)) if use else engine(policy, arch)
    assert sentence in str(error.value) and "\n" not in str(error.value)
