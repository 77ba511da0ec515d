"""Running a model under a policy: batches, jitted steps, generation and scoring."""

from alisa_jax.engine.batch import Batch
from alisa_jax.engine.engine import Engine
from alisa_jax.engine.generate import Generated
from alisa_jax.engine.programs import Programs
from alisa_jax.engine.sampling import Sampling, sequence_keys
from alisa_jax.engine.scoring import Scores

__all__ = ["Batch", "Engine", "Generated", "Programs", "Sampling", "Scores", "sequence_keys"]
