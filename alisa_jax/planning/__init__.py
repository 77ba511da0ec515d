"""Before a run: what it needs, whether it fits, where its tokens would live, and tokens/s.

    print(alisa_jax.plan("opt_30b", "h100_80gb", batch=64))

All numbers are modelled (`alisa_jax/placement/modelled/cost.py`), from the shape of the model and
the rates of a machine; published rates are multiplied by the efficiencies. Tokens per second are
b n / time, prefill included.

The greedy search over the cost model finds p1, p2, alpha and beta; a share is 0 where its phase
never begins. `alisa` derives its phases from the budgets, `alisa_searched` takes the searched ones,
and `alisa_paper` has the traffic of the paper's model, which loads the selected tokens at every
step. `resident`, `waves`, `accelerate` and `flexgen` attend densely. All layers share one
selection, except where tokens are deleted and only entering tokens are copied: there each layer has
its own, because a deleted token is recomputed as soon as one layer wants it.
`offload_wins_from_batch` is the smallest batch, up to 8 times the asked one and 512, at which
`alisa` is at least as fast as `waves`, the device alone, and None where none is; below it offloaded
sparsity loses.
"""

from alisa_jax.placement.modelled.cost import Hardware
from alisa_jax.placement.modelled.devices import DEVICES
from alisa_jax.planning.planned import Planned
from alisa_jax.planning.pricing import plan

__all__ = ["DEVICES", "Hardware", "Planned", "plan"]
