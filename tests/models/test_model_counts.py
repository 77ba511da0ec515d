"""Analytic counts against arrays, against the traced computation and against published numbers."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from alisa_jax.models import SHAPES, Decoder, ModelConfig

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "configs" / "models.md"
LLAMA = ModelConfig(
    arch="llama",
    vocab_size=61,
    d_model=23,
    n_layers=3,
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
    n_layers=5,
    n_heads=3,
    n_kv_heads=3,
    head_dim=11,
    d_ff=41,
    max_positions=97,
    act="relu",
)
NEOX = ModelConfig(
    arch="gpt_neox",
    vocab_size=61,
    d_model=42,
    n_layers=3,
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


def changed(config, **fields):
    return ModelConfig(**({f: getattr(config, f) for f in config.__dataclass_fields__} | fields))


SMALL = [
    LLAMA,
    changed(LLAMA, tie_embeddings=True),
    changed(LLAMA, attention_bias=True),
    changed(LLAMA, mlp_bias=True),
    OPT,
    changed(OPT, tie_embeddings=True, attention_bias=True, mlp_bias=True),
    changed(OPT, tie_embeddings=True, norm_before=False),
    changed(OPT, embed_dim=17, norm_before=False),
    changed(OPT, embed_dim=17, tie_embeddings=True, mlp_bias=True),
    NEOX,
    changed(NEOX, tie_embeddings=True, attention_bias=False, parallel_residual=False),
]


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def abstract(decoder):
    return jax.eval_shape(decoder.init, jax.random.key(0))


@pytest.mark.parametrize("config", SMALL)
def test_parameter_count_is_the_size_of_the_arrays(config):
    decoder = Decoder(config)
    params = abstract(decoder)
    assert decoder.count_params() == size(params)
    norm = size(params["unembed"].get("norm", {}))
    assert decoder.count_params(embedding=False) == size(params["blocks"]) + norm


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_of_a_named_shape_is_the_size_of_its_arrays(name):
    decoder = Decoder(SHAPES[name])
    assert decoder.count_params() == size(abstract(decoder))


@pytest.mark.parametrize(
    "name, published",
    [
        ("opt_125m", 125_239_296),
        ("opt_350m", 331_196_416),
        ("opt_1.3b", 1_315_758_080),
        ("opt_6.7b", 6_658_473_984),
        ("llama_7b", 6_738_415_616),
        ("llama_13b", 13_015_864_320),
        ("llama_33b", 32_528_943_616),
        ("llama3_8b", 8_030_261_248),
        ("pythia_70m", 70_426_624),
        ("pythia_160m", 162_322_944),
        ("pythia_410m", 405_334_016),
        ("pythia_1b", 1_011_781_632),
        ("pythia_1.4b", 1_414_647_808),
        ("pythia_2.8b", 2_775_208_960),
        ("pythia_6.9b", 6_857_302_016),
        ("pythia_12b", 11_846_072_320),
    ],
)
def test_named_shapes_have_the_published_size(name, published):
    assert Decoder(SHAPES[name]).count_params() == published


@pytest.mark.parametrize("config", SMALL)
@pytest.mark.parametrize("dtype, element_bytes", [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_kv_bytes_are_those_of_the_arrays_that_attend_receives(config, dtype, element_bytes):
    decoder, seen = Decoder(config), []

    def attend(q, k, v):
        seen.append(k.size * k.dtype.itemsize + v.size * v.dtype.itemsize)
        return q, ()

    def step(params, index):
        x = decoder.embed(params, index, index)
        for layer in range(config.n_layers):
            x, _ = decoder.block(params["blocks"][layer], x, index, attend)

    params = jax.eval_shape(lambda key: decoder.init(key, dtype), jax.random.key(0))
    jax.eval_shape(step, params, jnp.zeros((2, 5), jnp.int32))
    assert sum(seen) == 2 * 5 * decoder.kv_bytes_per_token(element_bytes)


def dot_flops(jaxpr):
    """2 * output size * contracted size, over every matrix product of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                total += dot_flops(inner)
    return total


@pytest.mark.parametrize("config", SMALL)
def test_flops_are_those_of_the_traced_matrix_products(config):
    decoder, S = Decoder(config), 19

    def attend(q, k, v):  # one query over S positions, grouped heads
        B, T, N, H = q.shape
        K = k.shape[2]
        keys = jnp.broadcast_to(k, (B, S, K, H))
        grouped = q.reshape(B, T, K, N // K, H)
        weights = jnp.einsum("btkgh,bskh->bkgts", grouped, keys)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, jnp.broadcast_to(v, (B, S, K, H)))
        return out.reshape(B, T, N, H), ()

    def step(params, index):
        x = decoder.embed(params, index, index)
        for layer in range(config.n_layers):
            x, _ = decoder.block(params["blocks"][layer], x, index, attend)
        return decoder.unembed(params, x)

    traced = jax.make_jaxpr(step)(abstract(decoder), jnp.zeros((1, 1), jnp.int32))
    assert decoder.flops_per_token(S) == dot_flops(traced.jaxpr)


@pytest.mark.parametrize("name", SHAPES)
def test_the_page_of_the_shapes_states_the_numbers_of_each(name):
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]
    decoder, config = Decoder(SHAPES[name]), SHAPES[name]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert f"{decoder.count_params():,}" in cells
    assert f"{2 * decoder.count_params() / 2**30:.2f} GiB" in cells
    assert f"{decoder.kv_bytes_per_token(2):,} bytes" in cells
    assert f"{decoder.kv_bytes_per_token(2) * config.max_positions / 2**30:.3f} GiB" in cells


def test_every_row_of_the_page_is_of_a_named_shape():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows == ["name", "---", *SHAPES]
