"""A lane: prompts read in any cut give the outputs and the state that the whole prompts give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_jax import attention, codecs
from alisa_jax.codecs import Raw, Rotation
from alisa_jax.kv.state import LayerSpec
from alisa_jax.policies import Dense, Local, SnapKV, Streaming
from alisa_jax.testing import streams
from alisa_jax.testing.streams import QUICK, B, H, K, N
from tests.attention.test_attention_codecs import CODECS, TURNS
from tests.policies.test_policy_contract import EXAMPLES, label

pytestmark = pytest.mark.slow

S = 32  # of the state, of the padded prompts and of the lane
SIZES = (1, 5, 40)  # of chunks: one token, no multiple of a prompt, longer than any
LENGTHS = ((5, 29, 16), (32, 8, 11))  # fixed, as the tokens are: no two of their scores are near a tie
Q, KEYS, VALUES = (x[:, :S] for x in streams.stream(23, B, S, N, K, H))
TEXTS = ("raw(dtype=float32)", *CODECS)
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


POLICIES = (
    *(p for p in EXAMPLES if not isinstance(p, SnapKV)),
    SnapKV(tokens=12, window=8, kernel=3),
)  # by default it keeps all


def spec_of(text, policy, route, rotation=None) -> LayerSpec:
    codec = Raw("float32") if text == TEXTS[0] else codecs.parse(text).resolve(jnp.float32, TURNS)
    return LayerSpec(policy, codec, route, rotation=rotation)


def goes(spec) -> bool:
    try:
        attention.check(spec, S, N, K)
    except ValueError:
        return False
    return True


def kind(spec):
    """What a lane holds: lanes of one kind are read by one program."""
    policy = spec.policy
    W = policy.seed_rows(S) if policy.seed_kind == "rows" else 0
    return policy.seed_kind, W, policy.mass_heads(N, K), spec.rotation


CASES = [
    (text, policy, route)
    for text in TEXTS
    for policy in POLICIES
    for route in policy.routes
    if goes(spec_of(text, policy, route))
]
CACHE = Streaming(sinks=3, tokens=11, positions="cache")
TURNED = [(p.seed_kind, p) for p in (*POLICIES, CACHE) if not p.compacts]


def dims_of(spec):
    dims = attention.dims_of(spec, B, N, K, S, H)
    return attention.prompt_dims(dims, spec, 0)


@functools.cache
def reader(key):
    """The spec that all lanes of a kind are read with."""
    found = [spec_of(TEXTS[0], p, "masked", key[-1]) for p in (*POLICIES, CACHE)]
    return next(spec for spec in found if kind(spec) == key)


@functools.partial(jax.jit, compiler_options=dict(QUICK))
def extend(lane, q, k, v, n):
    return attention.extend(lane, q, k, v, n)


@functools.partial(jax.jit, compiler_options=dict(QUICK))
def finish(lane):
    """The state of the lane's spec, and what its codes stand for."""
    spec = lane.spec
    state = attention.finish(lane, attention.init(spec, dims_of(spec), H))
    return state, decoded(state)


def decoded(state):
    """Values of K and V, head-major: of the working set, and of the store; None for a home that is not there."""
    codec, every = state.spec.codec, jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, 1, S))
    ws = None if state.ws is None else [codec.values(x) for x in (state.ws.k, state.ws.v)]
    store = None if state.store is None else [codec.values(x) for x in state.store.take(codec, every)]
    return ws, store


def poisoned(x, n):
    """`x` [B, C, *, H] with NaN from `n` [B] on."""
    gone = np.arange(x.shape[1])[None] >= np.asarray(n)[:, None]
    return jnp.asarray(np.where(gone[..., None, None], np.float32(np.nan), x))


@functools.cache
def whole(spec, lengths):
    """Outputs, state and decoded values of whole prompts, whose padding is NaN: the three steps of `prefill`."""
    lane = attention.begin(reader(kind(spec)), dims_of(spec), jnp.float32)
    tokens = (poisoned(x, lengths) for x in (Q, KEYS, VALUES))
    out, lane = extend(lane, *tokens, jnp.asarray(lengths, jnp.int32))
    return np.asarray(out), *finish(lane.replace(spec=spec))


def read(spec, size, cut):
    """The outputs [B, S, N, H], 0 behind a prompt, and the lane: chunks of `size`, cut [chunks][B] tokens of each."""
    lane = attention.begin(reader(kind(spec)), dims_of(spec), jnp.float32, room=S)
    outs, seen = np.zeros((B, S, N, H), np.float32), np.zeros(B, np.int32)
    for n in cut:
        at = np.minimum(seen[:, None] + np.arange(size), S - 1)[..., None, None]
        chunk = [poisoned(np.take_along_axis(x, at, 1), n) for x in (Q, KEYS, VALUES)]
        out, lane = extend(lane, *chunk, jnp.asarray(n, jnp.int32))
        for b in range(B):
            outs[b, seen[b] : seen[b] + n[b]] = np.asarray(out)[b, : n[b]]
        seen = seen + n
    return outs, lane.replace(spec=spec)


@st.composite
def cuts(draw, size):
    """(lengths, size, cut): every sequence is cut by itself, and may wait while others are read."""
    lengths = draw(st.sampled_from(LENGTHS))
    rows = []
    for length in lengths:
        row = []
        while length:
            row.append(draw(st.integers(1, min(size, length))))
            length -= row[-1]
        for at in draw(st.lists(st.integers(0, len(row)), max_size=2)):
            row.insert(at, 0)
        rows.append(row)
    chunks = max(map(len, rows))
    return lengths, size, np.array([row + [0] * (chunks - len(row)) for row in rows], np.int32).T


def steps_apart(content, a, b, real):
    """How many of the values a, b [B, K, M, H] are more than 1e-5 apart, as none is by more than a step of its codes.

    real [B, K or 1, M] bool: the rows that are compared; content: of the codes.
    """
    a, b = np.asarray(a), np.asarray(b)
    apart = (np.abs(a - b) > 1e-5) & np.broadcast_to(real, a.shape[:3])[..., None]
    if apart.any():
        scale = np.asarray(content.scale, np.float32)
        step = scale[..., None] if content.axis == "token" else scale[:, :, None]
        assert (np.abs(a - b) <= 1.01 * step + 1e-5)[apart].all()
    return int(apart.sum())


def check(spec, lengths, size, cut) -> int:
    """Assert that the cut gives what the whole prompts give; returns how many codes are a step apart."""
    want_out, want, (want_ws, want_store) = whole(spec, lengths)
    outs, lane = read(spec, size, cut)
    got, (ws, store) = finish(lane)
    seen = np.arange(S) < np.array(lengths)[:, None]
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(outs[b, :n], want_out[b, :n], **TOLERANCE)
    np.testing.assert_array_equal(got.length, lengths)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    apart = 0
    if ws is not None:
        pos = np.asarray(got.ws.pos)
        np.testing.assert_array_equal(pos, want.ws.pos)
        np.testing.assert_allclose(got.ws.bias, want.ws.bias, **TOLERANCE)
        homes = (want.ws.k, want.ws.v)
        apart += sum(
            steps_apart(spec.codec.content(x), a, b, pos >= 0) for x, a, b in zip(homes, ws, want_ws, strict=True)
        )
    for a, b in zip(store or (), want_store or (), strict=True):
        assert steps_apart(None, a, b, seen[:, None]) == 0  # a store holds what came
    for a, b in zip(jax.tree.leaves(got.stats), jax.tree.leaves(want.stats), strict=True):
        if spec.policy.takes_keys:  # what is kept of the keys of padding may be anything
            real = seen.reshape(B, 1, S, *[1] * (a.ndim - 3))
            a, b = np.where(real, a, np.zeros((), a.dtype)), np.where(real, b, np.zeros((), b.dtype))
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, **TOLERANCE)
    return apart


@pytest.mark.full(sample=1, per=("text", "policy", "route", "size"))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text, policy, route", CASES, ids=label)
def test_any_cut_of_a_prompt_gives_what_the_whole_prompt_gives(text, policy, route, size, record_property):
    """Codes are of the same values, unless prompts are merged by weights that sum in another order."""
    spec, found = spec_of(text, policy, route), []

    @settings(max_examples=3)
    @given(cuts(size))
    def run(drawn):
        found.append(check(spec, *drawn))

    run()
    record_property("codes_a_step_apart", sum(found))
    print(f"{sum(found)} codes a step apart in {len(found)} prompts of {spec}")
    if not policy.compacts:
        assert sum(found) == 0


@pytest.mark.full(sample=1, per="kind")
@pytest.mark.parametrize("kind, policy", TURNED, ids=label)
def test_keys_that_are_stored_before_their_rotation_are_read_in_any_cut(kind, policy):
    spec = spec_of(TEXTS[0], policy, policy.routes[0], Rotation((1.0, 0.3), S))

    @settings(max_examples=3)
    @given(cuts(5))
    def run(drawn):
        check(spec, *drawn)

    run()
    plain = np.asarray(whole(spec_of(TEXTS[0], policy, policy.routes[0]), LENGTHS[0])[0])
    assert np.abs(plain[1, :29] - whole(spec, LENGTHS[0])[0][1, :29]).max() > 1e-2  # the rotation is seen


def test_all_kinds_of_lanes_are_met():
    assert {p.seed_kind for p in EXAMPLES} == {"none", "rows", "sum"} == {name for name, _ in TURNED}
    assert {route for _, _, route in CASES} == set(attention.ROUTES)


@functools.partial(jax.jit, compiler_options=dict(QUICK))
def prefill(state, q, k, v, length):
    return attention.prefill(state, q, k, v, length)


def test_the_whole_prompt_is_that_of_prefill():
    """And NaN in the padding of the one is garbage in that of the other."""
    spec, lengths = spec_of(TEXTS[0], POLICIES[-1], "working_set"), LENGTHS[0]
    state = attention.init(spec, dims_of(spec), H)
    out, state = prefill(state, *(jnp.asarray(x) for x in (Q, KEYS, VALUES)), jnp.asarray(lengths, jnp.int32))
    want_out, want, _ = whole(spec, lengths)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(out[b, :n], want_out[b, :n], **TOLERANCE)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


@functools.partial(jax.jit, compiler_options=dict(QUICK))
def step(state, q, k, v):
    return attention.step(state, q, k, v)[:2]


@pytest.mark.parametrize("policy", [Dense(), Local(kv_sparsity=0.6)], ids=label)
def test_for_dense_alone_one_more_token_of_a_prompt_is_a_decoded_one(policy):
    spec, one = spec_of(TEXTS[0], policy, "masked"), np.ones(B, np.int32)
    lengths = np.array(LENGTHS[0], np.int32)
    _, lane = read(spec, SIZES[-1], [lengths])
    out, after = step(finish(lane)[0], *(jnp.asarray(x[np.arange(B), lengths]) for x in (Q, KEYS, VALUES)))
    outs, lane = read(spec, SIZES[-1], [lengths, one])
    read_out, (state, _) = outs[np.arange(B), lengths], finish(lane)
    if policy.selects:
        assert np.abs(read_out - out).max() > 1e-3
        return
    np.testing.assert_allclose(read_out, out, **TOLERANCE)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)
