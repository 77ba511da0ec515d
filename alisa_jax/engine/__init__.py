"""Running a model under a policy: batches, jitted steps, generation and scoring."""

from alisa_jax.engine.batch import Batch
from alisa_jax.engine.engine import Engine, Scores
from alisa_jax.engine.generate import Generated
from alisa_jax.engine.sampling import Sampling, sequence_keys

__all__ = ["Batch", "Engine", "Generated", "Sampling", "Scores", "sequence_keys"]
