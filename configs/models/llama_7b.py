"""LLaMA-7B (arXiv 2302.13971, table 2).

32 layers of width 4,096, 32 heads of 128, vocabulary 32,000,
context 2,048.

    parameters            6,738,415,616
    weights, 16 bits      12.55 GiB
    KV per token, 16 bits 524,288 bytes
    KV of a full context  1.000 GiB a sequence
"""

from alisa_jax.models.shapes import SHAPES

MODEL = "random:llama_7b"  # for `alisa_jax.load` and every --model flag
CONFIG = SHAPES["llama_7b"]
