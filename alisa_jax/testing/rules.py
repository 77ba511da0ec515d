"""The rules of the policy contract by name, and how a breach is told."""

from __future__ import annotations

from types import MappingProxyType

RULES = MappingProxyType(
    {
        "value": "a policy is a frozen, hashable value, and what it declares exists",
        "types": "structure, shapes and dtypes stay the same from step to step; no type is weak",
        "nan": "a token whose attention is not a number is kept no more than one without attention",
        "capacity": "the attended tokens fit into capacity(S) slots, and one is left for the next",
        "self": "a query attends itself",
        "past": "a query attends no token that is still to come, and no empty slot",
        "once": "no token lies in two slots",
        "gone": "what an evicting policy has dropped never comes back",
        "content": "the output is attention over the attended tokens, each with its own K and V",
        "routes": "all routes attend the same tokens and give the same outputs",
        "no_sparsity": "kv_sparsity=0 is dense attention",
    }
)


def refuse(rule: str, policy, what: str):
    """Raise AssertionError: `policy` breaks `rule` of RULES, and `what` happened."""
    raise AssertionError(f"{policy} breaks the rule {rule!r} ({RULES[rule]}): {what}")
