"""Running a model under a policy: batches, jitted steps, generation and scoring."""

from alisa_jax.engine.batch import Batch
from alisa_jax.engine.engine import Engine, Generated, Scores

__all__ = ["Batch", "Engine", "Generated", "Scores"]
