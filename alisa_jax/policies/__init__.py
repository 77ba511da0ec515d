"""Which past tokens may a query attend to: one method, one file, one frozen dataclass."""

from __future__ import annotations

from types import MappingProxyType

from alisa_jax import spec
from alisa_jax.policies.base import Dims, Exchange, Policy
from alisa_jax.policies.dense import Dense
from alisa_jax.policies.double_sparsity import DoubleSparsity
from alisa_jax.policies.gemfilter import GemFilter
from alisa_jax.policies.h2o import H2O
from alisa_jax.policies.local import Local
from alisa_jax.policies.merge import Merge
from alisa_jax.policies.snapkv import SnapKV
from alisa_jax.policies.streaming import Streaming
from alisa_jax.policies.strided import Strided
from alisa_jax.policies.swa import Swa

POLICIES = MappingProxyType(
    {
        "dense": Dense,
        "local": Local,
        "strided": Strided,
        "streaming": Streaming,
        "h2o": H2O,
        "swa": Swa,
        "merge": Merge,
        "snapkv": SnapKV,
        "double_sparsity": DoubleSparsity,
        "gemfilter": GemFilter,
    }
)

__all__ = [
    "H2O",
    "POLICIES",
    "Dense",
    "Dims",
    "DoubleSparsity",
    "Exchange",
    "GemFilter",
    "Local",
    "Merge",
    "Policy",
    "SnapKV",
    "Streaming",
    "Strided",
    "Swa",
    "parse",
]


def parse(text: str) -> Policy:
    """The policy that `text` names, for example 'swa(kv_sparsity=0.8,window=2k)'.

    Raises `spec.SpecError`.
    """
    return spec.parse(text, POLICIES)
