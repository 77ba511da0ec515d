"""alisa-jax: sparsity-aware KV caching in JAX.

model = alisa_jax.load("bundled")
engine = alisa_jax.Engine(model, policy="swa(kv_sparsity=0.8)")
engine.generate([model.encode("def fibonacci(n):")], max_new_tokens=32)
print(alisa_jax.plan(model, "h100_80gb"))
"""

from alisa_jax.engine import Batch, Engine, Generated, Sampling, Scores
from alisa_jax.models.checkpoint import Model, load
from alisa_jax.planning import DEVICES, Hardware, Planned, plan

__all__ = [
    "DEVICES",
    "Batch",
    "Engine",
    "Generated",
    "Hardware",
    "Model",
    "Planned",
    "Sampling",
    "Scores",
    "load",
    "plan",
]
