"""The decoder's own contract: types, shapes, purity, and its arithmetic against float64 NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from alisa_jax.models import Decoder, ModelConfig, RopeScaling
from alisa_jax.models.layers import LayerNorm, RMSNorm
from alisa_jax.ops.rope import rotate

LLAMA = ModelConfig(
    arch="llama",
    vocab_size=61,
    d_model=23,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=14,
    d_ff=37,
    max_positions=97,
)
OPT = ModelConfig(
    arch="opt",
    vocab_size=61,
    d_model=33,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=11,
    d_ff=41,
    max_positions=97,
    tie_embeddings=True,
    act="relu",
    attention_bias=True,
    mlp_bias=True,
)
NEOX = ModelConfig(
    arch="gpt_neox",
    vocab_size=61,
    d_model=42,
    n_layers=2,
    n_heads=3,
    n_kv_heads=3,
    head_dim=14,
    d_ff=37,
    max_positions=97,
    act="gelu",
    attention_bias=True,
    mlp_bias=True,
    rotary_frac=0.3,
    parallel_residual=True,
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 13), dtype=np.int32)


@pytest.fixture(params=[LLAMA, OPT, NEOX], ids=["llama", "opt", "gpt_neox"], scope="module")
def decoder(request):
    return Decoder(request.param)


@functools.partial(jax.jit, static_argnums=0)
def initial(decoder, seed):
    return decoder.init(jax.random.key(seed))


@pytest.fixture(scope="module")
def params(decoder):
    return initial(decoder, 5)


def rows(shape, scale=1.0, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def test_params_are_plain_dicts_with_one_entry_a_layer(decoder, params):
    assert set(params) == {"embed", "blocks", "unembed"}
    assert isinstance(params["blocks"], list) and len(params["blocks"]) == decoder.config.n_layers
    assert decoder.count_params() == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert ("head" in params["unembed"]) != decoder.config.tie_embeddings


def test_matrices_are_stored_out_by_in(decoder, params):
    c = decoder.config
    assert params["blocks"][0]["q"]["weight"].shape == (c.n_heads * c.head_dim, c.d_model)
    assert params["blocks"][0]["k"]["weight"].shape == (c.n_kv_heads * c.head_dim, c.d_model)
    assert params["blocks"][0]["down"]["weight"].shape == (c.d_model, c.d_ff)


def test_init_is_a_function_of_the_key(decoder, params):
    again, other = initial(decoder, 5), initial(decoder, 6)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, again)))
    q = [p["blocks"][0]["q"]["weight"] for p in (params, other)] + [params["blocks"][1]["q"]["weight"]]
    assert not np.allclose(q[0], q[1]) and not np.allclose(q[0], q[2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_activations_keep_the_type_of_the_weights_and_logits_are_float32(decoder, dtype, causal_attend):
    params = jax.eval_shape(lambda key: decoder.init(key, dtype), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    index = jax.ShapeDtypeStruct((2, 13), jnp.int32)
    x = jax.eval_shape(decoder.embed, params, index, index)
    assert (x.shape, x.dtype) == ((2, 13, decoder.config.d_model), dtype)
    x, (k, v) = jax.eval_shape(lambda p, x, i: decoder.block(p["blocks"][1], x, i, causal_attend), params, x, index)
    assert (x.shape, x.dtype) == ((2, 13, decoder.config.d_model), dtype)
    assert k.shape == v.shape == (2, 13, decoder.config.n_kv_heads, decoder.config.head_dim)
    assert k.dtype == v.dtype == dtype
    logits = jax.eval_shape(decoder.unembed, params, x)
    assert (logits.shape, logits.dtype) == ((2, 13, 61), jnp.float32)


def test_bfloat16_logits_are_near_those_of_float32(decoder, params, dense_forward):
    exact = dense_forward(decoder, params, jnp.asarray(TOKENS))
    low = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p))(params)
    error = np.abs(np.asarray(dense_forward(decoder, low, jnp.asarray(TOKENS)) - exact))
    assert error.max() < 0.15 and error.mean() < 0.02 * np.abs(np.asarray(exact)).mean() + 0.01


def test_one_token_at_a_time_gives_what_one_pass_gives(decoder, params, dense_forward):
    """A list of past keys and values, kept by `attend`, is all the state that a decode step needs."""
    past = [([], []) for _ in range(decoder.config.n_layers)]

    def attend_to(store):
        def attend(q, k, v):
            store[0].append(np.asarray(k)), store[1].append(np.asarray(v))
            keys, values = np.concatenate(store[0], 1), np.concatenate(store[1], 1)
            keys, values = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (keys, values))
            logits = np.einsum("btnh,bsnh->bnts", np.asarray(q), keys) * q.shape[-1] ** -0.5
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            return np.einsum("bnts,bsnh->btnh", weights, values).astype(q.dtype)

        return lambda q, k, v: (io_callback(attend, jax.ShapeDtypeStruct(q.shape, q.dtype), q, k, v, ordered=True), ())

    @jax.jit
    def step(params, token, index):
        x = decoder.embed(params, token, index)
        for layer, store in enumerate(past):
            x, _ = decoder.block(params["blocks"][layer], x, index, attend_to(store))
        return decoder.unembed(params, x)

    steps = []
    for position in range(5):
        token = jnp.asarray(TOKENS[:, position : position + 1])
        index = jnp.full((2, 1), position, jnp.int32)
        steps.append(np.asarray(step(params, token, index)))
    want = dense_forward(decoder, params, jnp.asarray(TOKENS))[:, :5]
    np.testing.assert_allclose(np.concatenate(steps, 1), want, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits(decoder, params, dense_forward):
    changed = TOKENS.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    first, second = (np.asarray(dense_forward(decoder, params, jnp.asarray(t))) for t in (TOKENS, changed))
    np.testing.assert_array_equal(first[:, :7], second[:, :7])
    assert np.abs(first[:, 7:] - second[:, 7:]).max() > 1e-2


def test_padding_indices_give_finite_rows(decoder, params):
    index = jnp.asarray([[-40, -1, 0, 96, 97, 4096]], jnp.int32)
    assert np.isfinite(np.asarray(decoder.embed(params, index, index))).all()


def test_every_parameter_gets_a_finite_gradient(decoder, params, dense_forward):
    def loss(p):
        return -jax.nn.log_softmax(dense_forward(decoder, p, jnp.asarray(TOKENS)))[..., 3].mean()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(np.asarray(grad)).all(), path
        # A bias of the keys moves all logits of a row alike, so only its gradient vanishes.
        if "'k'" not in str(path) or "bias" not in str(path):
            assert np.abs(np.asarray(grad)).max() > 0, path


def test_attend_is_called_once_and_its_aux_is_returned(decoder, params):
    calls = []

    def attend(q, k, v):
        calls.append((q.shape, k.shape, v.shape))
        return q, {"seen": jnp.float32(7)}

    index = jnp.zeros((2, 3), jnp.int32)
    run = jax.jit(lambda p: decoder.block(p["blocks"][1], decoder.embed(p, index, index), index, attend))
    _, aux = run(params)
    N, K, H = decoder.config.n_heads, decoder.config.n_kv_heads, decoder.config.head_dim
    assert calls == [((2, 3, N, H), (2, 3, K, H), (2, 3, K, H))] and aux["seen"] == 7


def test_wrong_shapes_are_refused(decoder, params):
    index = jnp.zeros((2, 3), jnp.int32)
    x = jnp.zeros((2, 3, decoder.config.d_model))
    with pytest.raises(ValueError, match="positions"):
        decoder.embed(params, index, index[:1])
    with pytest.raises(ValueError, match="output of attend"):
        jax.eval_shape(lambda x: decoder.block(params["blocks"][0], x, index, lambda q, k, v: (q[:, :, 1:], ())), x)
    with pytest.raises(ValueError, match="x has shape"):
        decoder.unembed(params, x[..., 1:])


def test_a_decoder_is_a_static_argument(decoder):
    assert hash(decoder) == hash(Decoder(dataclasses.replace(decoder.config))) and decoder != Decoder(
        dataclasses.replace(decoder.config, n_layers=3)
    )


def test_rms_norm_equals_float64():
    x, scale = rows((2, 3, 11), 5.0), rows((11,), seed=1)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    got = RMSNorm(1e-3).apply({"params": {"scale": jnp.float32(scale)}}, jnp.float32(x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_layer_norm_equals_float64():
    x, scale, bias = rows((2, 3, 11), 5.0) + 7.0, rows((11,), seed=1), rows((11,), seed=2)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale + bias
    weights = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    np.testing.assert_allclose(LayerNorm(1e-3).apply({"params": weights}, jnp.float32(x)), want, rtol=1e-4, atol=1e-5)


def test_rotary_dims_are_the_channels_that_positions_change(decoder, params, causal_attend):
    c = decoder.config
    assert c.rotary_dims == {"llama": 14, "opt": 0, "gpt_neox": 4}[c.arch]
    x = jnp.float32(np.tile(rows((1, 1, c.d_model)), (1, 2, 1)))  # one row at two positions
    step = jax.jit(lambda p, x, at: decoder.block(p["blocks"][0], x, at, causal_attend)[1][0])
    keys = np.asarray(step(params, x, jnp.asarray([[0, 1]], jnp.int32)))[0]
    np.testing.assert_array_equal(np.abs(keys[0] - keys[1]).max(axis=0) > 1e-6, np.arange(c.head_dim) < c.rotary_dims)


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=lambda c: c.arch)
def test_the_cache_does_the_rest_of_a_rotation_and_none_of_its_gain(config, random_params):
    """Under YaRN, whose gain is the model's part; positions that are not given are 0 .. T - 1."""
    yarn = RopeScaling("yarn", 4.0, original_max_positions=24, attention_factor=1.25)
    decoder = Decoder(dataclasses.replace(config, rope_scaling=yarn))
    block, x = random_params(decoder.config)["blocks"][0], jnp.float32(rows((2, 7, config.d_model)))
    attend = lambda q, k, v: (q, (q, k))

    @jax.jit
    def both(block, x):
        at = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))
        later = decoder.block(block, x, None, attend, rotate=False)[1]
        rotated = [rotate(y, at[:, :, None], decoder.cache_rotation) for y in later]
        return decoder.block(block, x, at, attend)[1], decoder.block(block, x, None, attend)[1], rotated

    for want, same, got in zip(*both(block, x), strict=True):
        np.testing.assert_array_equal(same, want)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "base, change, message",
    [
        (LLAMA, {"arch": "gpt"}, "allowed are llama, opt"),
        (LLAMA, {"n_kv_heads": 4}, "not a multiple of n_kv_heads=4"),
        (LLAMA, {"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
        (LLAMA, {"n_layers": 0}, "n_layers is 0"),
        (LLAMA, {"d_ff": 2.5}, "d_ff is 2.5"),
        (LLAMA, {"act": "tanh"}, "allowed are gelu, gelu_tanh, relu, silu"),
        (LLAMA, {"rotary_frac": 0.5}, "rotary_frac is of gpt_neox models; for llama it must be 1.0"),
        (LLAMA, {"norm_before": False}, "norm_before is of opt models"),
        (LLAMA, {"norm_eps": 0.0}, "must both be above 0"),
        (OPT, {"n_kv_heads": 1}, "n_kv_heads = n_heads"),
        (OPT, {"head_dim": 10}, "n_heads \\* head_dim = d_model"),
        (OPT, {"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling must be None"),
        (OPT, {"parallel_residual": True}, "parallel_residual is of gpt_neox models"),
        (OPT, {"embed_dim": 33}, "embed_dim is 33; .* other than d_model=33"),
        (OPT, {"embed_dim": 0}, "embed_dim is 0"),
        (NEOX, {"n_kv_heads": 1}, "n_kv_heads = n_heads"),
        (NEOX, {"rotary_frac": 0.0}, "above 0 and at most 1"),
        (NEOX, {"rotary_frac": 0.25}, "a share of 0.25 is rotated; rotary positions need an even"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(base, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(base, **change)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("longrope", 2.0), "allowed are linear, llama3, yarn"),
        (("linear", 0.0), "must be above 0"),
        (("llama3", 8.0, 4.0, 1.0), "in this order"),
        (("llama3", 8.0, 1.0, 4.0, 0), "at least 1"),
        (("yarn", 8.0, 1.0, 4.0, 0), "at least 1"),
        (("yarn", 8.0, 1.0, 4.0, 32, 1.0, 2.0), "beta_slow=2.0 and beta_fast=1.0"),
        (("yarn", 8.0, 1.0, 4.0, 32, 32.0, 1.0, 0.0), "attention_factor=0.0; it must be above 0"),
        (("linear", 8.0, 1.0, 4.0, 32, 32.0, 1.0, 1.2), "attention_factor=1.2; it must be 1"),
    ],
)
def test_a_rope_scaling_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*arguments)
