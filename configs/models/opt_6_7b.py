"""OPT-6.7B (arXiv 2205.01068, table 1).

32 layers of width 4,096, 32 heads of 128, vocabulary 50,272,
context 2,048.

    parameters            6,658,473,984
    weights, 16 bits      12.40 GiB
    KV per token, 16 bits 524,288 bytes
    KV of a full context  1.000 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_6.7b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_6.7b"]
