"""LLaMA-13B (arXiv 2302.13971, table 2).

40 layers of width 5,120, 40 heads of 128, vocabulary 32,000,
context 2,048.

    parameters            13,015,864,320
    weights, 16 bits      24.24 GiB
    KV per token, 16 bits 819,200 bytes
    KV of a full context  1.562 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:llama_13b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["llama_13b"]
