"""FlexGen's published cost model: seconds of a static policy on GPU, CPU and disk.

Sheng et al., ICML 2023 (arXiv 2303.06865), section 4.3, as the released
`experimental/cost_model.py` has it, which deviates from the paper's text in how a step's terms
overlap. Per layer, for a block of b = gpu_batch * gpu_batches sequences, prompt s, n new tokens,
widths h1 and h2 (MLP), W = 8 h1^2 + 4 h1 h2 bytes of weights:

    T_pre = max(ctog + dtoc, gtoc + ctod, compute)
    T_gen = ctog + max(gtoc, dtoc, ctod, compute)
    tokens per second = b n / (l T_pre + l (n - 1) T_gen)

Its constants were fitted to one machine in one regime: the T4's do not price a policy that keeps
everything on the GPU, or one that uses the disk (the model gives 61 and 0.15 tokens/s where 25.26
and 0.69 were published). Peak memory is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB, TERA = 2.0**30, 1e12


@dataclass(frozen=True)
class FlexGenRates:
    """Fitted rates: GiB/s on each path, 10^12 operations per second of each kind of product."""

    cpu_to_gpu: float
    gpu_to_cpu_cache: float
    gpu_to_cpu_hidden: float
    disk_to_cpu: float
    cpu_to_disk_prefill: float
    cpu_to_disk_decode: float
    matmul_prefill: float
    matmul_decode: float
    bmm_prefill: float
    bmm_decode: float
    cpu: float


@dataclass(frozen=True)
class FlexGenPolicy:
    """What lies where, and the batch.

    percent: weights, cache and activations on GPU and CPU, six numbers in FlexGen's order; the rest
    is on disk.
    """

    percent: tuple[float, float, float, float, float, float]
    gpu_batch: int
    gpu_batches: int

    def __post_init__(self):
        for gpu, cpu in (self.percent[0:2], self.percent[2:4], self.percent[4:6]):
            if min(gpu, cpu) < 0 or gpu + cpu > 100:
                raise ValueError(
                    "percent must be pairs of at least 0 that sum to at most 100; got "
                    f"{self.percent}"
                )

    @property
    def shares(self) -> tuple[tuple[float, float, float], ...]:
        """(GPU, CPU, disk) of weights, cache, activations, each summing to 1."""
        pairs = (self.percent[0:2], self.percent[2:4], self.percent[4:6])
        return tuple((g / 100, c / 100, (100 - g - c) / 100) for g, c in pairs)


def flexgen_tokens_per_s(
    policy: FlexGenPolicy,
    rates: FlexGenRates,
    layers: int,
    h1: int,
    h2: int,
    prompt_tokens: int,
    new_tokens: int,
) -> float:
    """Modelled generated tokens per second, prefill included."""
    b = policy.gpu_batch * policy.gpu_batches
    prefill = _prefill_s(policy, rates, h1, h2, prompt_tokens)
    decode = _decode_s(policy, rates, h1, h2, prompt_tokens, new_tokens)
    return b * new_tokens / (layers * prefill + layers * (new_tokens - 1) * decode)


def _prefill_s(policy, rates, h1, h2, s) -> float:
    (_, wc, wn), (_, cc, cn), (_, hc, _) = policy.shares
    b, W = policy.gpu_batch * policy.gpu_batches, 8 * h1**2 + 4 * h1 * h2
    hidden, cache = 2 * s * h1 * b * hc, 4 * (s + 1) * h1 * b
    ctog = (W * (wc + wn) + hidden) / (rates.cpu_to_gpu * GIB)
    gtoc = cache * (cc + cn) / (rates.gpu_to_cpu_cache * GIB) + hidden / (
        rates.gpu_to_cpu_hidden * GIB
    )
    dtoc = W * wn / (rates.disk_to_cpu * GIB)
    ctod = cache * cn / (rates.cpu_to_disk_prefill * GIB)
    compute = b * (8 * s * h1**2 + 4 * s * h1 * h2) / (rates.matmul_prefill * TERA)
    compute += 4 * b * s**2 * h1 / (rates.bmm_prefill * TERA)
    return max(ctog + dtoc, gtoc + ctod, compute)


def _decode_s(policy, rates, h1, h2, s, n) -> float:
    (_, wc, wn), (cg, cc, cn), (_, hc, _) = policy.shares
    b, W = policy.gpu_batch * policy.gpu_batches, 8 * h1**2 + 4 * h1 * h2
    cache, hidden = 4 * b * (s + n / 2) * h1, 2 * h1 * b * hc
    ctog = (W * (wc + wn) + hidden) / (rates.cpu_to_gpu * GIB)
    gtoc = hidden / (rates.gpu_to_cpu_hidden * GIB)
    dtoc = cache * cn / (rates.disk_to_cpu * GIB) + W * wn / (0.95 * rates.disk_to_cpu * GIB)
    ctod = 4 * b * h1 * cn / (rates.cpu_to_disk_decode * GIB)
    few, thin = max(0.0, math.log2(64 / policy.gpu_batch)), max(0.0, math.log2(4096 / h1))
    slow = max(0.1, 1 + 0.0168 * few * thin - 0.0328 * few - 0.0621 * thin)
    compute = b * (8 * h1**2 + 4 * h1 * h2) / (rates.matmul_decode * TERA)
    compute += cache * cg / (rates.bmm_decode * TERA) + cache * (cc + cn) / (
        rates.cpu * TERA * slow
    )
    return ctog + max(gtoc, dtoc, ctod, compute)
