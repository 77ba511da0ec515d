"""For authors of policies: does a policy keep the contract that the rest of the library relies on?

    report = check_policy(MyPolicy(kv_sparsity=0.8))

It returns what held, or raises an AssertionError that names the rule, the route and the step.
"""

from alisa_jax.testing.contract import Report, check_policy
from alisa_jax.testing.rules import RULES
from alisa_jax.testing.streams import Driver

__all__ = ["RULES", "Driver", "Report", "check_policy"]
