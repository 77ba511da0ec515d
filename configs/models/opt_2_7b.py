"""OPT-2.7B (arXiv 2205.01068, table 1).

32 layers of width 2,560, 32 heads of 80, vocabulary 50,272,
context 2,048.

    parameters            2,651,596,800
    weights, 16 bits      4.94 GiB
    KV per token, 16 bits 327,680 bytes
    KV of a full context  0.625 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_2.7b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_2.7b"]
