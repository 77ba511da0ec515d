"""OPT-1.3B (arXiv 2205.01068, table 1).

24 layers of width 2,048, 32 heads of 64, vocabulary 50,272,
context 2,048.

    parameters            1,315,758,080
    weights, 16 bits      2.45 GiB
    KV per token, 16 bits 196,608 bytes
    KV of a full context  0.375 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_1.3b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_1.3b"]
