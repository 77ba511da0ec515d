"""Part g: the bundled model from end to end, attention by the kernels beside attention by XLA: the same tokens."""

import tempfile
from pathlib import Path

import alisa_jax
from alisa_jax import Engine
from eval.card import small

TEXTS = (
    "def fibonacci(n):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\n\ndef main(argv):\n    parser = argparse.ArgumentParser()\n",
    "for i in range(10):\n    print(i)\n",
)
SYSTEMS = (
    ("dense", "raw"),
    ("swa(kv_sparsity=0.8)", "raw"),
    ("swa(kv_sparsity=0.8)", "int8"),
    ("dense", "int8"),
    ("swa(kv_sparsity=0.8)", "int8(axis=token)"),
)
SAME_NATS = 1e-4  # tokens that differ first at a smaller margin count as the same
NEW, DRY_NEW = 128, 2


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each policy and codec: tokens per second of both, and where their tokens differ first."""
    systems, texts, new = (SYSTEMS[:1], TEXTS[:1], DRY_NEW) if dry else (SYSTEMS, TEXTS, NEW)
    model = None
    for policy, codec in systems:
        if left() < 0:
            return
        if emit.done(f"{policy} | {codec}"):
            continue
        model = model or (_small() if dry else alisa_jax.load("bundled", "float32"))

        def measure(policy=policy, codec=codec, model=model) -> dict:
            found = {}
            for name, impl in (("xla", "xla"), ("kernels", "interpret" if dry else "pallas")):
                engine = Engine(model, policy, codec, attention_impl=impl)
                for _ in range(1 if dry else 2):  # the first compiles
                    made = engine.generate([model.encode(text) for text in texts], new, ())
                found[name] = engine.implementation, made
            return compare(*found["xla"], *found["kernels"])

        emit.attempt(f"{policy} | {codec}", measure)


def _small():
    with tempfile.TemporaryDirectory() as folder:
        return alisa_jax.load(small.write(Path(folder), layers=1), "float32")


def compare(xla: str, want, kernels: str, got) -> dict:
    """Values of a cell. `same`: every sequence is equal, or differs first where the margin is below SAME_NATS."""
    first, margins = [], []
    for i, (mine, theirs) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        at = next((t for t, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if at is not None:
            first.append(at)
            margins.append(float(want.margins[i][at]))
    new = sum(map(len, want.tokens))
    return {
        "implementation": kernels,
        "reference": xla,
        "new_tokens": new,
        "same": all(margin < SAME_NATS for margin in margins),
        "sequences_that_differ": len(first),
        "first_differences": first,
        "margins_nats": margins,
        "greatest_logprob_difference_nats": max(
            (abs(float(a) - float(b)) for x, y in zip(got.logprobs, want.logprobs) for a, b in zip(x, y)), default=0.0
        ),
        "tokens_per_s": new / (got.prefill_s + got.decode_s),
        "xla_tokens_per_s": new / (want.prefill_s + want.decode_s),
    }
