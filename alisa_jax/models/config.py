"""What a decoder is, as one frozen and hashable value.

A `ModelConfig` holds every number that fixes the shapes and the arithmetic of a decoder-only
transformer. It is checked when it is made, so that no later code has to ask whether it makes sense.
The letters in the comments are the axis alphabet of `alisa_jax.axes`.
"""

from __future__ import annotations

import dataclasses

from alisa_jax.ops.rope import RopeScaling

ARCHITECTURES = ("llama", "opt", "gpt_neox")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
_SIZES = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "max_positions",
)
# Folders that are llama models under a name of their own.
FAMILIES = ("mistral", "qwen2", "qwen3")
_FIELDS_OF_ONE = (
    ("qkv_bias", "llama"),
    ("qk_norm", "llama"),
    ("family", "llama"),
    ("rotary_frac", "gpt_neox"),
    ("parallel_residual", "gpt_neox"),
    ("norm_before", "opt"),
    ("embed_dim", "opt"),
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder.

    `arch` is "llama" (RMSNorm, rotary positions, gated MLP, grouped-query attention; arXiv
    2302.13971), "opt" (LayerNorm, learned positions, plain MLP; arXiv 2205.01068) or "gpt_neox"
    (LayerNorm, rotary positions on part of each head, plain MLP; arXiv 2204.06745, section 2, and
    Pythia, arXiv 2304.01373). `head_dim` need not be d_model / n_heads for "llama". A field that a
    comment gives to some architectures keeps its default in others.

    Raises ValueError, in one sentence, where a field is out of its range or two fields disagree.
    """

    arch: str
    vocab_size: int  # V
    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # N
    n_kv_heads: int  # K
    head_dim: int  # H
    d_ff: int  # hidden width of the MLP
    max_positions: int  # longest context in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # llama, gpt_neox
    rope_scaling: RopeScaling | None = None  # llama, gpt_neox
    tie_embeddings: bool = False  # the output head is the token table
    act: str = "silu"
    attention_bias: bool = False  # biases of the q, k, v and output projections
    mlp_bias: bool = False  # biases of the MLP projections
    rotary_frac: float = 1.0  # gpt_neox: share of a head's channels that are rotated
    parallel_residual: bool = False  # gpt_neox: attention and MLP both read the layer's input
    norm_before: bool = True  # opt: False has norms after each half and none at the end (opt-350m)
    embed_dim: int | None = None  # opt: width of a token table that is projected to D; None: D
    qkv_bias: bool = False  # llama: biases of q, k and v alone
    qk_norm: bool = False  # llama: RMSNorm of each head of q and k, before their rotation
    family: str | None = None  # llama: one of FAMILIES that its folder names; changes no arithmetic

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch is {self.arch!r}; allowed are {', '.join(ARCHITECTURES)}.")
        for name in _SIZES:
            value = getattr(self, name)
            if not _whole(value):
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; "
                "each kv head must serve equally many query heads."
            )
        if not self.norm_eps > 0 or not self.rope_theta > 0:
            raise ValueError(
                f"norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must both be above 0."
            )
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act is {self.act!r}; allowed are {', '.join(ACTIVATIONS)}.")
        if self.arch != "llama" and (
            self.n_kv_heads != self.n_heads or self.n_heads * self.head_dim != self.d_model
        ):
            raise ValueError(
                f"arch {self.arch} needs n_kv_heads = n_heads and n_heads * head_dim = d_model; "
                f"given are n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, "
                f"head_dim={self.head_dim}, d_model={self.d_model}."
            )
        if self.arch == "opt" and self.rope_scaling is not None:
            raise ValueError("an opt model has learned positions; rope_scaling must be None.")
        for name, arch in _FIELDS_OF_ONE:
            default = type(self).__dataclass_fields__[name].default
            if self.arch != arch and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is of {arch} models; for {self.arch} it must be {default}."
                )
        if self.family is not None and self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; allowed are {', '.join(FAMILIES)}.")
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias holds those of q, k and v; qkv_bias must be False.")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn":
            if not self.rope_theta > 1:
                raise ValueError(f"rope_theta is {self.rope_theta}; yarn needs one above 1.")
        if not 0 < self.rotary_frac <= 1:
            raise ValueError(
                f"rotary_frac is {self.rotary_frac}; it must be above 0 and at most 1."
            )
        if self.arch != "opt" and (self.rotary_dims % 2 or not self.rotary_dims):
            part = (
                ""
                if self.rotary_frac == 1
                else f" of which a share of {self.rotary_frac} is rotated"
            )
            raise ValueError(
                f"head_dim is {self.head_dim}{part}; rotary positions need an even number of "
                "channels, 2 or more."
            )
        if self.embed_dim is not None and (
            not _whole(self.embed_dim) or self.embed_dim == self.d_model
        ):
            raise ValueError(
                f"embed_dim is {self.embed_dim!r}; it must be a whole number of at least 1 other "
                f"than d_model={self.d_model}, or None for a table as wide as the model."
            )

    @property
    def rotary_dims(self) -> int:
        """Leading channels of a head that are rotated, in pairs (c, c + rotary_dims / 2); or 0."""
        return 0 if self.arch == "opt" else int(self.head_dim * self.rotary_frac)

    @property
    def table_dim(self) -> int:
        """Width of the token table."""
        return self.d_model if self.embed_dim is None else self.embed_dim


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
