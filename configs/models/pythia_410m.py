"""Pythia-410M (arXiv 2304.01373, table 1).

24 layers of width 1,024, 16 heads of 64, vocabulary 50,304,
context 2,048, 16 channels of each head rotated.

    parameters            405,334,016
    weights, 16 bits      0.75 GiB
    KV per token, 16 bits 98,304 bytes
    KV of a full context  0.188 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_410m"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_410m"]
