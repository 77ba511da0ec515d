"""The numbers of a model by name: its configuration, weights, FLOPs and the bytes of a token. No weights are read.

What is wrong raises UserError with one sentence.
"""

from alisa_jax import codecs
from alisa_jax.models import hf, shapes
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.placement.modelled.cost import Shape
from eval.script import inputs
from eval.script.common import UserError
from eval.script.tables import Table

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
CAPTION = """The shapes of `alisa_jax/models/shapes.py`, for `--model=random:NAME` and `alisa_jax.load("random:NAME")`.
Weights and KV are in 16 bits; the KV of a full context is that of one sequence.
Sources: OPT, arXiv 2205.01068, table 1; LLaMA, arXiv 2302.13971, table 2; Llama 3, arXiv 2407.21783, table 3; Pythia,
arXiv 2304.01373, table 1. This page is what `python -m eval.plan --models` prints."""


def config(name: str) -> ModelConfig:
    """The configuration behind random:NAME, NAME, or what `inputs.locate` knows; weights are not read."""
    if name.removeprefix("random:") in shapes.SHAPES:
        return shapes.SHAPES[name.removeprefix("random:")]
    folder, _ = inputs.locate(name)
    if not folder.exists():
        raise UserError(f"--model: {name!r} is no folder; known shapes: {', '.join(shapes.SHAPES)}")
    try:
        return hf.config_from_hf(inputs.configuration(folder))
    except OSError as error:
        raise UserError(f"--model: {name!r} has no readable config.json: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def codec(text: str, dtype: str):
    """The codec that `text` names, for a model that computes in `dtype`."""
    return codecs.parse(inputs.codec(text)).resolve(dtype)


def shape(config: ModelConfig, codec, dtype: str) -> Shape:
    """The numbers of a model whose weights are `dtype` and whose cache is stored by the resolved `codec`."""
    decoder = Decoder(config)
    return Shape(
        weight_bytes=decoder.count_params() * ELEMENT_BYTES[dtype],
        weight_flops=decoder.flops_per_token(0),
        attention_flops=decoder.flops_per_token(1) - decoder.flops_per_token(0),
        layers=config.n_layers,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=config.vocab_size,
        kv_token_bytes=codec.token_bytes(config.n_kv_heads, config.head_dim),
        element_bytes=ELEMENT_BYTES[dtype],
    )


def named() -> Table:
    """The named shapes: a row each of what a model holds and what a token of its cache takes."""
    head = (
        "name",
        "parameters",
        "weights",
        "KV per token",
        "KV of a full context",
        "layers",
        "width",
        "heads",
        "kv heads",
    )
    head += ("head dim", "vocabulary", "context", "else")
    rows = []
    for name, c in shapes.SHAPES.items():
        decoder = Decoder(c)
        parameters, token_bytes = decoder.count_params(), decoder.kv_bytes_per_token(2)
        row = [name, f"{parameters:,}", f"{2 * parameters / 2**30:.2f} GiB", f"{token_bytes:,} bytes"]
        row.append(f"{token_bytes * c.max_positions / 2**30:.3f} GiB")
        numbers = (c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size, c.max_positions)
        rows.append([*row, *(f"{number:,}" for number in numbers), _else(c)])
    return Table(CAPTION, head, rows)


def _else(c: ModelConfig) -> str:
    """How a shape differs from the plain model of its family."""
    said = []
    if 0 < c.rotary_dims < c.head_dim:
        said.append(f"{c.rotary_dims} channels of each head rotated")
    if c.embed_dim is not None:
        said.append(f"token table of width {c.embed_dim}")
    if not c.norm_before:
        said.append("norms after each half")
    return ", ".join(said) or "-"
