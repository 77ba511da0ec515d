"""OPT-350M (arXiv 2205.01068, table 1).

24 layers of width 1,024, 16 heads of 64, vocabulary 50,272,
context 2,048, token table of width 512, norms after each half.

    parameters            331,196,416
    weights, 16 bits      0.62 GiB
    KV per token, 16 bits 98,304 bytes
    KV of a full context  0.188 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:opt_350m"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["opt_350m"]
