"""The parts of `eval.gpu`, most valuable first."""

from typing import NamedTuple


class Part(NamedTuple):
    """share: of the time of a run, at most, until all parts had their turn. needs: modules that it imports. grace_s: what a
    cell that began in time may take beyond the part's."""

    letter: str
    name: str
    share: float
    what: str
    needs: tuple[str, ...]
    grace_s: float = 15.0


_KERNELS = ("jax", "numpy", "pallas_kernels.checks")
_MODELS = ("jax", "numpy", "flax", "tokenizers", "safetensors", "alisa_jax")
PARTS = (
    Part("a", "correct", 0.22, "which kernels compile and are right", _KERNELS),
    Part("b", "rates", 0.06, "copy bandwidth and matrix products", ("jax", "pallas_kernels.timing")),
    Part("c", "beside", 0.22, "kernels beside XLA, cuDNN, jax's own and torch", ("jax", "pallas_kernels.bench_rows")),
    Part("d", "pinned", 0.10, "pinned host memory", ("jax", "numpy")),
    Part("e", "layer", 0.10, "one layer's step, SWA beside dense", ("jax", "numpy")),
    Part("f", "placed", 0.25, "tokens per second of placed caches", (*_MODELS, "absl", "tqdm"), 45.0),
    Part("g", "whole", 0.08, "the bundled model, kernels beside XLA", _MODELS),
    Part("h", "tiles", 0.10, "tilings", ("jax", "pallas_kernels.bench_rows")),
)
BY_NAME = {part.name: part for part in PARTS}
