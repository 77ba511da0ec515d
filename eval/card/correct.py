"""Part a: the cases of the kernels' tests, compiled for the card instead of interpreted, in the order of a seed."""

from collections.abc import Iterator

from pallas_kernels import backend, checks

DRY_KERNELS = ("sparse_decode", "flash_prefill")  # one small case of each, and
DRY_NAMED = "packed_decode", "llama-3-8b/b1/c32"  # one of those at named shapes, at a small one


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each case, kernel after kernel in turn, so that a run which is cut has seen every kernel."""
    if not dry:
        emit.attempt("works", _works)
    impl = "interpret" if dry else "pallas"
    for check in dry_cases(seed) if dry else checks.sample(seed):
        if left() < 0:
            return
        emit.attempt(check.name, lambda check=check: checks.run(check, impl, seed))


def dry_cases(seed: int) -> Iterator[checks.Check]:
    """A case for each way to say what is right."""
    found = checks.sample(seed)
    for kernel in DRY_KERNELS:
        yield next(check for check in found if check.kernel == kernel and not check.large)
    kernel, shape = DRY_NAMED
    named = next(check for check in found if check.kernel == kernel and isinstance(check.shape, str))
    yield named._replace(name=f"{kernel}/{shape}/{named.dtype}", shape=shape)


def _works() -> dict:
    """What `attention_impl=auto` asks before it settles on kernels."""
    import jax

    reason = backend.works(jax.devices()[0].device_kind)
    return {"kernel": "sparse_decode", "passed": reason is None, "reason": reason}
