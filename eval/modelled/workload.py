"""A run of equal prompts in numbers: its policy, and the `Setting` that a controller is given."""

import math

from alisa_jax import policies
from alisa_jax.models.config import ModelConfig
from alisa_jax.placement.modelled.cost import statistics_bytes
from alisa_jax.placement.plan import PAGE_TOKENS, Setting, pages
from eval.script.common import UserError


def policy(kv_sparsity: float, window: str = "k") -> policies.Policy:
    """SWA at this sparsity, with its window ("k", "2k" or a number of rows); dense for 0."""
    if not 0.0 <= kv_sparsity < 1.0:
        raise UserError(f"--kv_sparsity must be at least 0 and below 1, got {kv_sparsity}")
    try:
        rows = int(window) if window.isdigit() else window
        return policies.Swa(kv_sparsity=kv_sparsity, window=rows) if kv_sparsity else policies.Dense()
    except ValueError as error:
        raise UserError(f"--window: {error}") from None


def setting(config: ModelConfig, stored, chosen, batch: int, prompt_tokens: int, new_tokens: int) -> Setting:
    """A run of `batch` equal prompts without budgets, under the policy `chosen` and the codec `stored`.

    Working set and statistics are as large as the context at the end, in pages.
    """
    context = PAGE_TOKENS * pages(prompt_tokens + new_tokens - 1)
    K, H, L = config.n_kv_heads, config.head_dim, config.n_layers
    selects = isinstance(chosen, policies.Swa)
    statistics = 0.0
    if selects:
        slots = chosen.capacity(context)
        rows = int(chosen.counts(context).width.max())
        statistics = statistics_bytes(rows, context, L) + L * slots * 8  # position and bias of each slot
    return Setting(
        layers=L,
        prompt_tokens=(prompt_tokens,) * batch,
        new_tokens=new_tokens,
        token_bytes=stored.token_bytes(K, H),
        device_kv_bytes=math.inf,
        slots=slots if selects else 0,
        sequence_bytes=L * stored.sequence_bytes(K, H) * (2 if selects else 1),
        stats_bytes=statistics,
        selects=selects,
        evicts=False,
    )
