"""Pieces of attention and how they are joined, against attention over the union in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from alisa_jax.attention.compute import slots as attend
from alisa_jax.codecs import Raw
from pallas_kernels.partial import Partial, empty, merge, softmax, weight

B, K, G, H, M = 2, 3, 2, 5, 11
CODEC = Raw("float32")
join = jax.jit(merge)
piece = jax.jit(lambda q, k, v, bias: attend(CODEC, q, k, v, bias)[0])


def inputs(seed, scale):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, K, G, H)) * scale
    k, v = rng.normal(size=(2, B, K, M, H))
    return [x.astype(np.float32) for x in (q, k, v)]


def oracle(q, k, v, allowed):
    """Float64 attention over the slots allowed [M]: out [B, K, G, H] and lse [B, K, G]."""
    if not allowed.any():
        return np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    z = np.einsum("bkgh,bkmh->bkgm", q, k)[..., allowed] / np.sqrt(H)
    top = z.max(-1, keepdims=True)
    e = np.exp(z - top)
    out = np.einsum("bkgm,bkmh->bkgh", e / e.sum(-1, keepdims=True), v[:, :, allowed])
    return out, top[..., 0] + np.log(e.sum(-1))


def close(a, b, scale):
    tolerance = 2e-6 * scale  # float32 logits as large as `scale`
    finite = np.isfinite(np.asarray(b[1]))
    np.testing.assert_array_equal(np.isfinite(np.asarray(a[1])), finite)
    np.testing.assert_allclose(a[0], b[0], atol=tolerance)
    np.testing.assert_allclose(np.asarray(a[1])[finite], np.asarray(b[1])[finite], atol=tolerance)
    assert not np.isnan(np.asarray(a[0])).any()


@given(
    seed=st.integers(0, 2**31),
    owner=st.lists(st.integers(0, 3), min_size=M, max_size=M),
    scale=st.sampled_from([1, 30]),
)
def test_pieces_join_to_attention_over_the_union_in_any_grouping_and_order(seed, owner, scale):
    q, k, v = inputs(seed, scale)
    owner = np.array(owner)  # slot m belongs to piece owner[m]; 3 belongs to none, and a piece may be empty
    parts = []
    for part in range(3):
        bias = np.broadcast_to(np.where(owner == part, 0, -np.inf), (B, 1, M)).astype(np.float32)
        parts.append(piece(q, k, v, bias))
        close(parts[-1], oracle(q, k, v, owner == part), scale)
    a, b, c = parts
    whole = oracle(q, k, v, owner < 3)
    left, right = join(join(a, b), c), join(a, join(b, c))
    for joined in (left, right, join(join(c, a), b)):
        close(joined, whole, scale)
    close(left, right, scale)


def test_the_empty_piece_is_the_identity_on_both_sides():
    part = piece(*inputs(1, 1), np.zeros((B, 1, M), np.float32))
    none = empty((B, K, G), H)
    for joined in (join(part, none), join(none, part)):
        np.testing.assert_array_equal(joined.out, part.out)
        np.testing.assert_allclose(joined.lse, part.lse, rtol=1e-7)
    nothing = join(none, none)
    assert (np.asarray(nothing.out) == 0).all() and (np.asarray(nothing.lse) == -np.inf).all()


def test_attention_over_no_slot_is_the_empty_piece():
    part = piece(*inputs(2, 1), np.full((B, 1, M), -np.inf, np.float32))
    assert (np.asarray(part.out) == 0).all() and (np.asarray(part.lse) == -np.inf).all()


def test_pieces_of_very_different_weight_join_without_overflow():
    ones = jnp.ones((1, H))
    joined = join(Partial(ones, jnp.array([1e4])), Partial(2 * ones, jnp.array([-1e4])))
    assert np.asarray(joined.out).tolist() == [[1.0] * H] and float(joined.lse[0]) == 1e4


def test_weight_is_the_share_of_the_softmax():
    got = weight(jnp.array([0.0, -np.inf, -np.inf, 700.0]), jnp.array([np.log(4.0), 2.0, -np.inf, 700.0]))
    np.testing.assert_allclose(got, [0.25, 0, 0, 1], rtol=1e-6)


def test_softmax_of_any_axis_gives_nothing_to_what_is_not_seen():
    z = np.random.default_rng(4).normal(size=(3, 5, 2)).astype(np.float32) * 50
    z[:, 1], z[0, 3:, 0], z[2, :, 1] = -np.inf, -np.inf, -np.inf
    for axis in (1, -1):
        e, total, lse = softmax(jnp.asarray(z), axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            want = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(axis, keepdims=True)
            want_lse = np.log(np.exp(z.astype(np.float64)).sum(axis))
        np.testing.assert_allclose(e / total, np.nan_to_num(want), atol=1e-6)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    e, total, lse = softmax(jnp.zeros((2, 0)))
    assert e.shape == (2, 0) and total.tolist() == [[1.0], [1.0]] and lse.tolist() == [-np.inf] * 2


def test_mass_is_summed_over_the_heads_that_share_a_selection():
    q, k, v = inputs(3, 1)
    allowed = np.random.default_rng(3).random((B, K, M)) < 0.6
    allowed[..., 0] = True
    bias = np.where(allowed, 0, -np.inf).astype(np.float32)
    z = np.einsum("bkgh,bkmh->bkgm", q, k) / np.sqrt(H)
    for P in (K, 1):
        part, mass = attend(CODEC, jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(bias[:, :P]))
        e = np.exp(z - z.max(-1, keepdims=True)) * allowed[:, :P, None]
        p = e / e.sum(-1, keepdims=True)
        want = p.sum(axis=(1, 2))[:, None] if P == 1 else p.sum(axis=2)
        np.testing.assert_allclose(mass, want, atol=1e-6)
        np.testing.assert_allclose(part.out, np.einsum("bkgm,bkmh->bkgh", p, v), atol=1e-6)
