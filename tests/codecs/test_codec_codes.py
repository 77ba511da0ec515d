"""Products with int8 codes, tile by tile and in one, against float64 NumPy, and what they leave in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax.codecs import codes

# (B, K, G, M, H): all of a sequence in a tile; some of its heads; some tokens of all heads, the last tile overlapping; many
SHAPES = [(2, 6, 1, 7, 5), (2, 4, 3, 200, 150), (1, 3, 2, 1101, 128), (1, 3, 1, 17001, 64)]


def operands(B, K, G, M, H):
    rng = np.random.default_rng(M)
    q, p = rng.normal(size=(B, K, G, H)), rng.random((B, K, G, M))
    return q.astype(np.float32), p.astype(np.float32), rng.integers(-128, 128, (B, K, M, H)).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_codes_agree_with_float64(shape):
    q, p, c = operands(*shape)
    want = np.einsum("bkgh,bkmh->bkgm", q.astype(np.float64), c)
    for form in (codes.logits, lambda q, c: codes.logits(q, c, 8), lambda q, c: codes._logits(q, (c,), codes._plain)):
        np.testing.assert_allclose(jax.jit(form)(q, c), want, rtol=1e-5, atol=2e-3)
    want = np.einsum("bkgm,bkmh->bkgh", p.astype(np.float64), c)
    for form in (codes.mix, lambda p, c: codes.mix(p, c, 8), lambda p, c: codes._mix(p, (c,), codes._plain)):
        np.testing.assert_allclose(jax.jit(form)(p, c), want, rtol=1e-5, atol=2e-5 * p.shape[-1])


def test_the_tiles_cover_the_cases():
    tilings = [codes._tiling(B, K, M, H) for B, K, _, M, H in SHAPES]
    assert tilings == [(6, 7, 1), (2, 200, 1), (3, 158, 7), (3, 516, 33)]
    for (heads, tokens, across), (_, _, _, M, H) in zip(tilings, SHAPES):
        assert heads * tokens * H <= codes.SMALL_TILE * 2 and (across - 1) * tokens < M <= across * tokens


def test_a_larger_part_of_many_codes_is_a_larger_tile():
    assert codes._tiling(8, 12, 1216, 64, share=8) == (12, 1216, 1)
    assert codes._tiling(8, 12, 1216, 64, share=32) == (3, 1216, 1)
    assert codes._tiling(64, 12, 1216, 64, share=8) == (12, 1216, 1)  # no more than LARGE_TILE


@pytest.mark.parametrize("share", [8, 32])
def test_no_float_copy_of_the_codes_is_made_on_a_cpu(share):
    q, p, c = operands(2, 4, 1, 4096, 64)
    for form, x in ((codes.logits, q), (codes.mix, p)):
        temporary = (
            jax.jit(lambda x, c, form=form: form(x, c, share))
            .lower(x, jnp.asarray(c))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )
        assert temporary < c.size, temporary  # a float32 copy would be four times the codes
