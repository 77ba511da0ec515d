"""The decoder: the only model type that the rest of the library sees.

A `Decoder` is a frozen dataclass of pure functions of (params, inputs); it holds a `ModelConfig`
and no arrays. A step of any kind (training, prefill, decode) is the same three calls:

    x = decoder.embed(params, tokens, positions)                      # [B, T, D]
    for block in params["blocks"]:
        x, aux = decoder.block(block, x, positions, attend)           # attend owns the KV cache
    logits = decoder.unembed(params, x)                               # [B, T, V] float32

`params` is {"embed": dict, "blocks": [dict] * L, "unembed": dict} of arrays in one type; a layer's
dict may live in any memory until its block is called. Layers are a list, not a stacked array, so
that each can be placed by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alisa_jax.axes import check
from alisa_jax.models import llama, neox, opt
from alisa_jax.models.config import ModelConfig, RopeScaling
from alisa_jax.ops import rope

__all__ = ["Decoder", "ModelConfig", "RopeScaling"]

Params = dict[str, Any]
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

_FAMILIES = types.MappingProxyType({"llama": llama, "opt": opt, "gpt_neox": neox})


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Pure functions of one architecture; hashable, so it can be a static argument of `jax.jit`."""

    config: ModelConfig

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Random parameters in `dtype`, a function of `key` alone (and of the shape)."""
        c = self.config
        first, last, *keys = jax.random.split(key, c.n_layers + 2)
        embed = _init_embed(c, dtype, first)
        # One compiled function serves all layers, which keeps a large model quick to make.
        blocks = [_init_block(c, dtype, k) for k in keys]
        unembed = _init_unembed(c, dtype, last, self._table({"embed": embed}))
        return {"embed": embed, "blocks": blocks, "unembed": unembed}

    def embed(
        self, params: Params, tokens: jax.Array, positions: jax.Array | None = None
    ) -> jax.Array:
        """tokens [B, T] int32, positions [B, T] int32 -> x [B, T, D] in the type of the parameters.

        positions: None for 0 .. T - 1. Out-of-range indices (padding) are clipped; raises
        ValueError where the two shapes differ.
        """
        positions = _positions(positions, check("B T", tokens, name="tokens"))
        return (
            _FAMILIES[self.config.arch]
            .Embed(self.config)
            .apply({"params": params["embed"]}, tokens, positions)
        )

    def block(
        self,
        block: Params,
        x: jax.Array,  # [B, T, D]
        positions: jax.Array | None,  # [B, T] int32; None: 0 .. T - 1
        attend: Attend,
        rotate: bool = True,
    ) -> tuple[jax.Array, Any]:
        """One layer -> (x [B, T, D], aux); aux is what `attend` returned beside its output.

        block: the layer's parameters, an entry of `params["blocks"]`.
        `attend(q [B, T, N, H], k [B, T, K, H], v [B, T, K, H]) -> (out [B, T, N, H], aux)`. It is
        called once. q and k carry their positions (rotated, but for opt); with rotate=False they
        are as they were before their rotation, times its gain: `cache_rotation` is what is left to
        do. q is not scaled: `attend` multiplies logits by H ** -0.5. Raises ValueError where x,
        positions or the output of `attend` have the wrong shape.
        """
        c = self.config
        sizes = check("B T D", x, {"D": c.d_model}, name="x")
        positions = _positions(positions, sizes)[:, :, None]
        turn = functools.partial(rope.rotate, positions=positions) if rotate else rope.apply_gain
        turn = functools.partial(turn, rotation=self.rotation)
        expected = {**sizes, "N": c.n_heads, "H": c.head_dim}

        def checked(q, k, v):
            out, aux = attend(q, k, v)
            check("B T N H", out, expected, name="output of attend")
            return out, aux

        return _FAMILIES[c.arch].Block(c).apply({"params": block}, x, turn, checked)

    def unembed(self, params: Params, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> logits [B, T, V] float32."""
        check("B T D", x, {"D": self.config.d_model}, name="x")
        module = _FAMILIES[self.config.arch].Unembed(self.config)
        return module.apply({"params": params["unembed"]}, x, self._table(params))

    def count_params(self, embedding: bool = True) -> int:
        """Number of parameters.

        embedding=False leaves out token and position tables, their projections and an untied head.
        """
        c = self.config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        norm = c.d_model if c.arch == "llama" else 2 * c.d_model
        biases = (c.attention_bias or c.qkv_bias) * (q + 2 * kv) + c.attention_bias * c.d_model
        biases += c.mlp_bias * self._mlp_maps() * c.d_ff
        if c.mlp_bias:
            biases += c.d_model - c.d_ff  # the last map's bias is as wide as the model
        total = c.n_layers * (self._block_weights() + biases + 2 * norm) + c.norm_before * norm
        total += c.qk_norm * c.n_layers * 2 * c.head_dim
        if embedding:
            total += (
                c.vocab_size * c.table_dim * (1 if c.tie_embeddings else 2) + self._projections()
            )
            if c.arch == "opt":
                total += (c.max_positions + opt.POSITION_OFFSET) * c.d_model
        return total

    @functools.cached_property
    def rotation(self) -> rope.Rotation:
        """How `block` rotates q and k; it has no angles for opt."""
        c = self.config
        return rope.Rotation.of(c.rotary_dims, c.rope_theta, c.max_positions, c.rope_scaling)

    @property
    def cache_rotation(self) -> rope.Rotation:
        """What is left of `rotation` for q and k of `block(rotate=False)`, which have the gain."""
        return dataclasses.replace(self.rotation, gain=1.0)

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of K and V of one token over all layers: 2 L K H element_bytes."""
        c = self.config
        return 2 * c.n_layers * c.n_kv_heads * c.head_dim * element_bytes

    def flops_per_token(self, context_tokens: int) -> int:
        """Operations of one token's forward pass when it attends `context_tokens` positions.

        A multiply-add is two. Matrix products only: 2 per weight of the blocks, of the head and of
        projections to and from narrower embeddings, and 4 L N H per attended position; norms,
        softmax and elementwise work are left out.
        """
        c = self.config
        weights = (
            c.n_layers * self._block_weights() + c.vocab_size * c.table_dim + self._projections()
        )
        return 2 * weights + 4 * c.n_layers * c.n_heads * c.head_dim * context_tokens

    def _mlp_maps(self) -> int:
        return 3 if self.config.arch == "llama" else 2

    def _block_weights(self) -> int:
        c = self.config
        attention = 2 * c.d_model * (c.n_heads + c.n_kv_heads) * c.head_dim
        return attention + self._mlp_maps() * c.d_model * c.d_ff

    def _projections(self) -> int:
        c = self.config
        return 0 if c.embed_dim is None else 2 * c.embed_dim * c.d_model

    def _table(self, params: Params) -> jax.Array | None:
        return params["embed"]["tokens"]["table"] if self.config.tie_embeddings else None


def _positions(positions: jax.Array | None, sizes: dict[str, int]) -> jax.Array:
    """positions [B, T], checked; without them [1, T]: 0 .. T - 1."""
    if positions is None:
        return jnp.arange(sizes["T"], dtype=jnp.int32)[None]
    check("B T", positions, sizes, name="positions")
    return positions


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_embed(config: ModelConfig, dtype: Any, key: jax.Array) -> Params:
    index = jnp.zeros((1, 1), jnp.int32)
    return _FAMILIES[config.arch].Embed(config, dtype).init(key, index, index)["params"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_block(config: ModelConfig, dtype: Any, key: jax.Array) -> Params:
    x = jnp.zeros((1, 1, config.d_model), dtype)
    return (
        _FAMILIES[config.arch]
        .Block(config, dtype)
        .init(key, x, lambda y: y, lambda q, k, v: (q, ()))["params"]
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_unembed(
    config: ModelConfig, dtype: Any, key: jax.Array, table: jax.Array | None
) -> Params:
    x = jnp.zeros((1, 1, config.d_model), dtype)
    return _FAMILIES[config.arch].Unembed(config, dtype).init(key, x, table).get("params", {})
