"""Every policy with every codec that encodes: routes agree, and outputs are attention over what the codes stand for."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from alisa_jax import attention, codecs
from alisa_jax.attention import reference
from alisa_jax.codecs import NO_ROTATION, Rotation
from alisa_jax.kv.state import LayerSpec, tree_bytes
from alisa_jax.policies import POLICIES, parse
from alisa_jax.testing.streams import QUICK, Driver, H
from tests.policies.test_policy_contract import EXAMPLES, label

pytestmark = pytest.mark.slow

TURNS = Rotation((1.0,), 96)  # one rotated pair of the 5 channels
CODECS = {
    "int8(calibration_tokens=5)": ("empty",),
    "int8(axis=token)": ("full_bucket",),
    "int4(group=2)": ("full_bucket",),  # of the 5 channels: the last group has one
    "skvq(group=4,window=7,sinks=2)": ("prompt",),  # as a user: keys before their rotation, here without any
    "skvq(k_bits=3,group=4,window=7,sinks=2,span=head)": ("prompt",),
}
SOME = {  # what codecs are tried on whose moves are those of another one, or that serve policies with one set alone
    "int8(axis=token)": ("dense", "local(", "swa(", "h2o(", "merge", "double_sparsity("),
    "int4(group=2)": ("swa(", "h2o("),
    "skvq(group=4,window=7,sinks=2)": ("swa(",),
    "skvq(k_bits=3,group=4,window=7,sinks=2,span=head)": ("h2o(",),
}
CASES = [(t, p) for t in CODECS for p in EXAMPLES if label(p).startswith(SOME.get(t, ""))]
NAMED = [
    (t, p) for t, p in CASES if not p.compacts or CODECS[t] == ("empty",)
]  # slots hold the tokens they are named by
TOLERANCE = 1e-5


@functools.cache
def driver(text: str) -> Driver:
    return Driver(codec=codecs.parse(text).resolve(jnp.float32, TURNS))


@functools.cache
def stood_for(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The driver's K and V as the codec keeps them, [B, T, K, H] float64: ranges and codes worked out in NumPy."""
    _, k, v = driver(text).tokens
    if text == "int8(axis=token)":
        return _by_token(k), _by_token(v)
    if text.startswith("skvq"):
        asked = codecs.parse(text)
        return tuple(_by_group(x, bits, asked) for x, bits in ((k, asked.k_bits), (v, asked.v_bits)))
    if text == "int4(group=2)":
        return tuple(np.concatenate([_by_token(x[..., i : i + 2], 15) for i in (0, 2, 4)], -1) for x in (k, v))
    return _by_channel(k, 5, TURNS), _by_channel(v, 5, NO_ROTATION)


def _by_token(x, levels=255):
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = np.asarray(jnp.asarray((high - low) / np.float32(levels) * np.float32(1 + 2**-8), jnp.bfloat16), np.float32)
    zero = np.round(-low / scale)
    return (scale * (np.clip(np.round(x / scale + zero), 0, levels) - zero)).astype(np.float64)


def _by_group(x, bits, asked):
    """SKVQ's equations, group by group: ends and steps are rounded to float8 after the codes are made."""
    flat = x.reshape(*x.shape[:2], 1 if asked.span == "layer" else x.shape[2], -1)
    out = []
    for i in range(0, flat.shape[-1], asked.group):
        y, clip = flat[..., i : i + asked.group], np.float32(asked.clip)
        low, high = clip * y.min(-1, keepdims=True), clip * y.max(-1, keepdims=True)
        step = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-5))
        stored = [np.asarray(e.astype(ml_dtypes.float8_e4m3fn), np.float64) for e in (step, low)]
        out.append(np.round(np.clip((y - low) / step, 0, 2**bits - 1)) * stored[0] + stored[1])
    return np.concatenate(out, -1).reshape(x.shape)


def _by_channel(x, first: int, rotation):
    swept = x[:, :first].astype(np.float64)
    if rotation.angles:
        (angle,) = rotation.angles
        w = np.linspace(-angle * (first - 1), angle * rotation.positions, 20001)[:, None, None, None]
        a, b = swept[None, ..., 0], swept[None, ..., 1]
        turned = [a * np.cos(w) - b * np.sin(w), a * np.sin(w) + b * np.cos(w)]
        low = np.stack([*(t.min((0, 2)) for t in turned), *np.moveaxis(swept.min(1), -1, 0)[2:]], -1)
        high = np.stack([*(t.max((0, 2)) for t in turned), *np.moveaxis(swept.max(1), -1, 0)[2:]], -1)
    else:
        low, high = swept.min(1), swept.max(1)
    low, high = low - (high - low) / 2, high + (high - low) / 2  # headroom 1
    scale = ((high - low) / 255)[:, None]
    zero = np.round(-low[:, None] / scale)
    return scale * (np.clip(np.round(x / scale + zero), 0, 255) - zero)


def attended_to(text: str, run, b: int, i: int) -> np.ndarray:
    """Float64 attention of one step over its own set: [N, H]."""
    q, raw_k, raw_v = driver(text).tokens
    n = int(run.first[b]) + i
    k, v = stood_for(text)
    if run.prompt is None and "calibration" in text and n < 5:
        k, v = raw_k, raw_v
    if text.startswith("skvq"):
        asked, t = codecs.parse(text), np.arange(k.shape[1])
        as_they_came = ((t < asked.sinks) | (t > n - asked.window))[None, :, None, None]
        k, v = np.where(as_they_came, raw_k, k), np.where(as_they_came, raw_v, v)
    K = k.shape[2]
    heads = q[b, n].astype(np.float64).reshape(K, -1, H)
    out = np.empty_like(heads)
    for head in range(K):
        at = sorted(run.sets[b][i][head if len(run.sets[b][i]) > 1 else 0])
        z = heads[head] @ k[b, at, head].T / np.sqrt(H)
        p = np.exp(z - z.max(-1, keepdims=True))
        out[head] = p / p.sum(-1, keepdims=True) @ v[b, at, head]
    return out.reshape(-1, H)


@pytest.mark.full(sample=1, per=("text", "policy"))
@pytest.mark.parametrize("text, policy", CASES, ids=label)
def test_the_routes_agree_on_codes(text, policy):
    for start in CODECS[text]:
        first, *others = (driver(text).shared_run(policy, route, start) for route in policy.routes)
        for other in others:
            assert other.sets == first.sets
            np.testing.assert_allclose(other.out, first.out, atol=TOLERANCE)


@pytest.mark.full(sample=1, per=("text", "policy"))
@pytest.mark.parametrize("text, policy", NAMED, ids=label)
def test_the_output_is_attention_over_what_the_codes_stand_for(text, policy):
    for start in CODECS[text]:
        run = driver(text).shared_run(policy, policy.routes[0], start)
        B, steps = run.out.shape[:2]
        for b in range(B):
            for i in (*range(0, steps, 9), steps - 1):
                np.testing.assert_allclose(run.out[b, i], attended_to(text, run, b, i), atol=2e-4)


@pytest.mark.full(sample=1, per="text")
@pytest.mark.parametrize("text, policy", [c for c in CASES if label(c[1]).startswith(("swa", "local"))], ids=label)
def test_scoring_under_the_mask_equals_decoding_with_codes(text, policy):
    """The first tokens are attended raw in both, and the same elements are clipped."""
    run = driver(text)
    tokens = [jnp.asarray(x) for x in run.tokens]
    spec = LayerSpec(policy, run.codec, "masked")
    score = jax.jit(functools.partial(reference.score, spec), compiler_options=dict(QUICK))
    out, attended, clipped = score(*tokens)
    decoded = run.shared_run(policy, policy.routes[0], "empty")
    np.testing.assert_allclose(out, decoded.out, atol=TOLERANCE)
    np.testing.assert_allclose(attended, decoded.attended, rtol=1e-6)
    # the taps of the decode path, from the state at the end of the run: every token judged by the frozen range
    home = decoded.state.home
    k, v = (jnp.swapaxes(x, 1, 2) for x in tokens[1:])
    want = np.array(run.codec.clipped(home.k, k) + run.codec.clipped(home.v, v))
    want[:, : run.codec.frozen_after] = 0
    np.testing.assert_array_equal(clipped, want)
    assert (want.sum() > 0) == ("calibration" in text or "skvq" in text)


@functools.cache
def step(policy: str, codec: str):
    """Memory of a donated step in bfloat16, bytes of its K and V, and its state: (B, S, N, K, H) = (4, 4096, 12, 12, 64)."""
    B, S, N, K, H = 4, 4096, 12, 12, 64
    spec = LayerSpec(parse(policy), codecs.parse(codec).resolve(jnp.bfloat16), "working_set")

    def start():
        return attention.freeze(attention.init(spec, attention.dims_of(spec, B, N, K, S), H))

    state = jax.eval_shape(start)
    q, k = (jax.ShapeDtypeStruct((B, heads, H), jnp.bfloat16) for heads in (N, K))
    lowered = jax.jit(lambda *a: attention.step(*a)[:2], donate_argnums=0).lower(state, q, k, k)
    homes = [h for h in (state.ws, state.store) if h is not None]
    return lowered.compile(dict(QUICK)).memory_analysis(), tree_bytes([(h.k, h.v) for h in homes]), state


@pytest.mark.full(sample=1, per=("text", "policy"))
@pytest.mark.parametrize("policy", ["dense", "local(kv_sparsity=0.8)", "swa(kv_sparsity=0.8)"])
@pytest.mark.parametrize("text", ["int8", "int8(axis=token)"])
def test_an_int8_step_needs_less_temporary_memory_than_a_bfloat16_step_and_half_the_state(text, policy):
    half, half_bytes, _ = step(policy, "raw")
    memory, kv_bytes, state = step(policy, text)
    assert kv_bytes <= 0.53 * half_bytes
    assert memory.temp_size_in_bytes < half.temp_size_in_bytes
    codes = state.ws.k.codes.size
    assert memory.temp_size_in_bytes < codes, "room enough for a copy of the codes; one in float32 is four times that"
    assert memory.alias_size_in_bytes == tree_bytes(state)


def test_every_registered_policy_and_codec_is_here():
    assert {type(policy) for policy in EXAMPLES} == set(POLICIES.values())
    assert {text.split("(")[0] for text in CODECS} == set(codecs.CODECS) - {"raw"}  # raw: every other test
