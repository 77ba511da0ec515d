"""OPT-30B (arXiv 2205.01068, table 1).

48 layers of width 7,168, 56 heads of 128, vocabulary 50,272,
context 2,048.

    parameters            29,974,540,288
    weights, 16 bits      55.83 GiB
    KV per token, 16 bits 1,376,256 bytes
    KV of a full context  2.625 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_30b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_30b"]
