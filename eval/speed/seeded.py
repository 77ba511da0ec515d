"""A policy's state after a prompt that nobody read: seeded with rows of attention that are drawn."""

import jax
import jax.numpy as jnp


class Seeded:
    """A policy in whose place a layer is filled: it is seeded with rows that are drawn, and attention is not asked."""

    seed_kind = "none"

    def __init__(self, policy, key):
        self.policy, self.key = policy, key

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def seed(self, stats, rows, length, dims):
        if self.policy.seed_kind == "none":
            return self.policy.seed(stats, rows, length, dims)
        P = self.policy.selection_heads(dims.K)
        drawn = jax.random.uniform(self.key, (dims.B, P, self.policy.seed_rows(dims.S), dims.S))
        past = jnp.arange(dims.S, dtype=jnp.int32)[None] < length[:, None]
        drawn = jnp.where(past[:, None, None], drawn, jnp.float32(0.0))
        mass = jnp.float32(dims.N // P) / jnp.sum(drawn, axis=-1, keepdims=True)
        return self.policy.seed(stats, drawn * mass, length, dims)
