"""OPT-125M (arXiv 2205.01068, table 1).

12 layers of width 768, 12 heads of 64, vocabulary 50,272,
context 2,048.

    parameters            125,239,296
    weights, 16 bits      0.23 GiB
    KV per token, 16 bits 36,864 bytes
    KV of a full context  0.070 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_125m"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_125m"]
