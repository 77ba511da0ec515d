"""OPT-13B (arXiv 2205.01068, table 1).

40 layers of width 5,120, 40 heads of 128, vocabulary 50,272,
context 2,048.

    parameters            12,853,473,280
    weights, 16 bits      23.94 GiB
    KV per token, 16 bits 819,200 bytes
    KV of a full context  1.562 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_13b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_13b"]
