"""Pythia-1B (arXiv 2304.01373, table 1).

16 layers of width 2,048, 8 heads of 256, vocabulary 50,304,
context 2,048, 64 channels of each head rotated.

    parameters            1,011,781,632
    weights, 16 bits      1.88 GiB
    KV per token, 16 bits 131,072 bytes
    KV of a full context  0.250 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_1b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_1b"]
