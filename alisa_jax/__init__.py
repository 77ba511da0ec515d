"""alisa-jax: sparsity-aware KV caching in JAX.

model = alisa_jax.load("bundled")
engine = alisa_jax.Engine(model, policy="swa(kv_sparsity=0.8)")
engine.generate([model.encode("def fibonacci(n):")], max_new_tokens=32)
"""

from alisa_jax.engine import Batch, Engine, Generated, Sampling, Scores
from alisa_jax.models.checkpoint import Model, load

__all__ = ["Batch", "Engine", "Generated", "Model", "Sampling", "Scores", "load"]
