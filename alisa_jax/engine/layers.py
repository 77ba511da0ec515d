"""The layers of an engine: policy, codec, route and what attends, checked before weights load."""

from __future__ import annotations

from typing import NamedTuple

from alisa_jax import attention, codecs, policies
from alisa_jax.attention import compute
from alisa_jax.codecs import NO_ROTATION
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models.decoder import Decoder


class Assembled(NamedTuple):
    """What `assemble` returns."""

    policy: policies.Policy  # resolved for the model
    codec: codecs.Codec  # resolved for the model
    layers: tuple[LayerSpec, ...]
    choice: compute.Choice  # what attends, and why


def assemble(
    decoder: Decoder,
    policy,
    codec,
    dtype,
    route: str = "auto",
    attention_impl: str = "auto",
    calibration=None,
) -> Assembled:
    """Layers of `decoder`, which computes in `dtype`, under a policy and a codec.

    policy, codec: specs or objects. calibration: the `Calibration` of the model, for methods that
    need one. Raises ValueError or `spec.SpecError`, in one sentence, for what does not go together.
    """
    c = decoder.config
    policy = policies.parse(policy) if isinstance(policy, str) else policy
    policy = policy.resolve(c, calibration)
    asked = codecs.parse(codec) if isinstance(codec, str) else codec
    each = [policy.for_layer(i) for i in range(c.n_layers)]
    rotation = decoder.cache_rotation
    raw_keys = asked.raw_keys or any(p.raw_keys for p in each)
    more = {"calibration": calibration, "config": c} if asked.calibrates else {}
    stored = asked.resolve(dtype, NO_ROTATION if raw_keys else rotation, **more)
    delayed = rotation if raw_keys and rotation.angles else None
    choice = compute.choose(attention_impl, stored, dtype, c.head_dim, _xla_only(each, delayed, c))
    layers = tuple(
        LayerSpec(
            policy=p,
            codec=stored.for_layer(i),
            route=p.routes[0] if route == "auto" else route,
            impl=choice.impl,
            rotation=delayed,
        )
        for i, p in enumerate(each)
    )
    for spec in layers:
        attention.check(spec, 1, c.n_heads, c.n_kv_heads)
    return Assembled(policy, stored, layers, choice)


def _xla_only(each, delayed, config) -> str | None:
    """Why no kernel can attend for these policies, or None."""
    N, K = config.n_heads, config.n_kv_heads
    if delayed is not None:
        return "keys that are stored before their rotation are turned by XLA"
    if any(p.mass_heads(N, K) != p.selection_heads(K) for p in each):
        return "the kernels do not tell the attention of single query heads"
    return None
