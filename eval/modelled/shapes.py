"""A model by name: its configuration, its numbers (`shape`), and the page of the named ones. No weights are read.

What is wrong raises UserError with one sentence.
"""

from alisa_jax import codecs
from alisa_jax.models import checkpoint, shapes
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder
from alisa_jax.planning import workload
from eval.script import inputs
from eval.script.common import UserError
from eval.script.tables import Table

CAPTION = """The shapes of `alisa_jax/models/shapes.py`, for `--model=random:NAME` and `alisa_jax.load("random:NAME")`.
Weights and KV are in 16 bits; the KV of a full context is that of one sequence.
Sources: OPT, arXiv 2205.01068, table 1; LLaMA, arXiv 2302.13971, table 2; Llama 3, arXiv 2407.21783, table 3; Pythia,
arXiv 2304.01373, table 1. This page is what `python -m eval.plan --models` prints."""
shape = workload.shape


def config(name: str) -> ModelConfig:
    """The configuration behind NAME, random:NAME, or what `alisa_jax.load` knows; weights are not read."""
    try:
        return checkpoint.config_of(name)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None


def codec(text: str, dtype: str):
    """The codec that `text` names, for a model that computes in `dtype`."""
    return codecs.parse(inputs.codec(text)).resolve(dtype)


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
