"""Pythia-70M (arXiv 2304.01373, table 1).

6 layers of width 512, 8 heads of 64, vocabulary 50,304,
context 2,048, 16 channels of each head rotated.

    parameters            70,426,624
    weights, 16 bits      0.13 GiB
    KV per token, 16 bits 12,288 bytes
    KV of a full context  0.023 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:pythia_70m"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["pythia_70m"]
