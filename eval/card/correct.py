"""Part a: the cases of the kernels' tests, compiled for the card instead of interpreted, in the order of a seed."""

from pallas_kernels import backend, checks


def run(emit, left, dry: bool, seed: int) -> None:
    """A cell for each case, kernel after kernel in turn, so that a run which is cut has seen every kernel."""
    if not dry:
        emit.attempt("works", _works)
    impl, seen = "interpret" if dry else "pallas", set()
    for check in checks.sample(seed):
        if left() < 0:
            return
        if dry and (check.large or check.kernel in seen):  # one of each kernel, interpreted
            continue
        seen.add(check.kernel)
        emit.attempt(check.name, lambda check=check: checks.run(check, impl, seed))


def _works() -> dict:
    """What `attention_impl=auto` asks before it settles on kernels."""
    import jax

    reason = backend.works(jax.devices()[0].device_kind)
    return {"kernel": "sparse_decode", "passed": reason is None, "reason": reason}
