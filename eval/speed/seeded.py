"""Attention that a prompt might have got, drawn: it seeds the policies of layers that are filled and not computed."""

import jax
import jax.numpy as jnp


def rows(policy, dims, length, key):
    """What `Policy.seed` reads of prompts of `length` [B] tokens, drawn; None for a policy that reads nothing.

    dims: of the layer's state. Raises ValueError for a policy that is seeded from sums, which nothing here fills.
    """
    if policy.seed_kind == "none":
        return None
    if policy.seed_kind != "rows":
        raise ValueError(f"drawn attention is by rows, and {policy} is seeded from {policy.seed_kind}")
    P = policy.mass_heads(dims.N, dims.K)
    drawn = jax.random.uniform(key, (dims.B, P, policy.seed_rows(dims.S), dims.S))
    past = jnp.arange(dims.S, dtype=jnp.int32)[None] < length[:, None]
    drawn = jnp.where(past[:, None, None], drawn, jnp.float32(0.0))
    return drawn * (jnp.float32(dims.N // P) / jnp.sum(drawn, axis=-1, keepdims=True))
