"""Double Sparsity with its tokens on the host: what a guess of the next layer's query chooses is fetched, and attended.

Where the guess is the true query, tokens are those of a cache on the device; elsewhere those of NumPy with the same guess.
"""

import gc
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import placement, records
from alisa_jax.placement import mover
from alisa_jax.placement.plan import ALL, Rows, Setting, Tier, moved_bytes
from tests.engine.offload.test_placed_runs import Watched, device_bytes, fitting, texts
from tests.oracle import exact, nearest

pytestmark = pytest.mark.slow

LENGTHS, NEW = (20, 33, 33), 20
POLICY = "double_sparsity(kv_sparsity=0.6,channels=1,dense_layers=0)"
CASES = (  # controller, codec, how the host is read, pages of a ring beside the first
    ("flexgen", "raw", "rows", 0),
    ("flexgen(cache_device_frac=0.4)", "int8(axis=token)", "pages", 0),
    ("alisa(p1=16)", "int8(axis=token)", "rows", 2),
    ("flexgen(cache_device_frac=0.0)", "skvq(span=head,reorder=false,group=2,window=8,sinks=2)", "rows", 0),
)


@pytest.fixture(scope="module")
def silent(random_model):
    """Two layers of which the first adds nothing, so that what enters it enters the second: its guesses are exact."""
    model = random_model(n_layers=2, max_positions=256)
    first, second = model.params["blocks"]
    first = first | {name: {"weight": jnp.zeros_like(first[name]["weight"])} for name in ("o", "down")}
    return replace(model, params=model.params | {"blocks": [first, second]})


@pytest.fixture(scope="module")
def on_device():
    """`on_device(model, policy, codec)`: an engine that keeps all on the device, and what it generates."""

    made = {}

    def get(model, policy, codec="raw"):
        key = id(model), policy, codec
        if key not in made:
            engine = alisa_jax.Engine(model, policy, codec, "waves")
            made[key] = engine, engine.generate(texts(LENGTHS), NEW, ())
        return made[key]

    return get


def tight(engine, spec, reads="rows", more=0):
    """`engine` under a controller at the smallest budgets that it accepts, with room for rings of `more` pages more."""
    one = engine.under("alisa(p1=0)" if more else spec, 1.0, 1.0)
    kept = fitting(one, LENGTHS, NEW).placement
    setting = kept.setting(LENGTHS, NEW)
    room = more * setting.layers * setting.page_bytes * len(LENGTHS)
    one = engine.under(spec if more else kept.controller, kept.device_kv_bytes + room, kept.host_kv_bytes)
    one.placement.host = mover.HostReport(("device", "pinned_host"), reads)
    one.placement.counts_recall = True
    return one


def same(made, wanted):
    for a, b in zip(made.logprobs, wanted.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert made.tokens == wanted.tokens


def watched(one):
    """Generates under a controller whose plans are noted, and holds the run to them and to its budgets."""
    gc.collect()
    one.placement.controller = seen = Watched(one.placement.controller, [], device_bytes())
    made = one.generate(texts(LENGTHS), NEW, ())
    run = made.placement
    assert run.load_bytes == sum(load for load, _, _ in seen.moved) > 0
    assert run.store_bytes == sum(store for _, store, _ in seen.moved) > 0
    assert run.device_peak_bytes <= one.placement.device_kv_bytes
    assert run.host_peak_bytes <= one.placement.host_kv_bytes
    small = 4096 + 4 * 37 * len(LENGTHS) * 4  # tokens, flags, logits, what a view is made of
    assert max(live for _, _, live in seen.moved) <= run.device_peak_bytes + small
    return made


@pytest.mark.full(sample=1)
@pytest.mark.parametrize("spec, codec, reads, more", CASES, ids=[" | ".join(case[:3]) for case in CASES])
def test_where_the_guess_is_the_true_query_tokens_are_those_of_a_cache_on_the_device(
    silent, on_device, spec, codec, reads, more
):
    """Over ragged prompts; a ring of three pages is all that there is at first, and steps run in one program."""
    engine, wanted = on_device(silent, POLICY, codec)
    made = watched(tight(engine, spec, reads, more))
    same(made, wanted)
    assert made.placement.guess_recall == 1.0
    assert (made.placement.p1, made.placement.p2) == (16 if more else 0, NEW)


def test_without_a_layer_ahead_every_query_is_the_true_one(random_model, on_device):
    engine, wanted = on_device(random_model(n_layers=2, max_positions=256), POLICY)
    made = watched(tight(engine, "accelerate"))
    same(made, wanted)
    assert made.placement.guess_recall is None


# ---- the oracle: one sequence, float64


def normed(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def turned(x, at, theta):
    """x [T, *, H] rotated to positions `at` [T]: channel i of the first half with channel i of the second."""
    half = x.shape[-1] // 2
    angle = at[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


class Oracle:
    """A LLaMA under double_sparsity with whole labels; `guess`: from what entered the layer before."""

    def __init__(self, model, kv_sparsity, guess):
        self.c, self.guess, self.kept = model.decoder.config, guess, 1 - exact(kv_sparsity)
        self.params = model.params
        self.found = np.zeros((self.c.n_layers, 2), int)

    def weight(self, layer, name, of="weight"):
        return np.asarray(self.params["blocks"][layer][name][of], np.float64)

    def heads(self, layer, name, x, at):
        """x [T, D] at positions `at` [T] as q, k or v [T, *, H]."""
        n = normed(x, self.weight(layer, "attn_norm", "scale"), self.c.norm_eps)
        y = (n @ self.weight(layer, name).T).reshape(len(x), -1, self.c.head_dim)
        return y if name == "v" else turned(y, at, self.c.rope_theta)

    def attend(self, q, k, v, allowed):
        """q [N, H] over k, v [S, K, H] where `allowed` [K, S]."""
        G, out = len(q) // k.shape[1], []
        for i, row in enumerate(q):
            z = np.where(allowed[i // G], k[:, i // G] @ row / np.sqrt(len(row)), -np.inf)
            e = np.exp(z - z.max())
            out.append(e / e.sum() @ v[:, i // G])
        return np.concatenate(out)

    def chosen(self, q, k):
        """[K, S] bool: the past tokens, keys k [S, K, H], that the query q [N, H] chooses."""
        (S, K, H), G = k.shape, len(q) // k.shape[1]
        keep, count = np.zeros((K, S), bool), max(1, nearest(S * self.kept))
        for p in range(K):
            mass = np.zeros(S)
            for row in q[p * G : (p + 1) * G]:
                e = np.exp(k[:, p] @ row / np.sqrt(H))
                mass += e / e.sum()
            keep[p, np.argsort(-mass, kind="stable")[:count]] = True
        return keep

    def after(self, layer, x, out):
        """x [T, D] behind a layer whose attention gave `out` [T, N H]."""
        x = x + out @ self.weight(layer, "o").T
        n = normed(x, self.weight(layer, "mlp_norm", "scale"), self.c.norm_eps)
        gate = n @ self.weight(layer, "gate").T
        hidden = gate / (1 + np.exp(-gate)) * (n @ self.weight(layer, "up").T)
        return x + hidden @ self.weight(layer, "down").T

    def embedded(self, tokens):
        return np.asarray(self.params["embed"]["tokens"]["table"], np.float64)[tokens]

    def logprobs(self, x):
        last = self.params["unembed"]
        n = normed(x, np.asarray(last["norm"]["scale"], np.float64), self.c.norm_eps)
        z = n @ np.asarray(last["head"]["weight"], np.float64).T
        return z - np.log(np.exp(z).sum())

    def generate(self, prompt, new):
        """Greedy tokens and their log-probabilities."""
        L, at = self.c.n_layers, np.arange(len(prompt))
        x, cache = self.embedded(prompt), []
        for layer in range(L):
            q, k, v = (self.heads(layer, name, x, at) for name in "qkv")
            seen = [np.broadcast_to(at <= t, (self.c.n_kv_heads, len(at))) for t in at]
            out = np.stack([self.attend(q[t], k, v, seen[t]) for t in at])
            x = self.after(layer, x, out)
            cache.append((k, v))
        found = [self.best(x[-1])]
        while len(found) < new:
            x = self.embedded([found[-1][0]])
            at, before = np.array([len(cache[0][0])]), x
            for layer in range(L):
                q, k, v = (self.heads(layer, name, x, at) for name in "qkv")
                source = before if self.guess else x
                keep = self.chosen(self.heads(layer, "q", source, at)[0], cache[layer][0])
                true = self.chosen(q[0], cache[layer][0])
                self.found[layer] += (keep & true).sum(), keep.sum()
                cache[layer] = tuple(np.concatenate(pair) for pair in zip(cache[layer], (k, v)))
                allowed = np.pad(keep, ((0, 0), (0, 1)), constant_values=True)
                before, x = x, self.after(layer, x, self.attend(q[0], *cache[layer], allowed)[None])
            found.append(self.best(x[-1]))
        tokens, values = zip(*found)
        return list(tokens), np.array(values)

    def best(self, x):
        logprobs = self.logprobs(x)
        return int(logprobs.argmax()), logprobs.max()


def test_tokens_are_those_of_numpy_with_the_same_guess(random_model, on_device):
    """Three layers, so that one guess comes from a layer that attended by a guess itself."""
    model = random_model(n_layers=3, max_positions=256)
    policy = POLICY.replace(")", ",label_bits=32)")
    engine, resident = on_device(model, policy)
    made = watched(tight(engine, "flexgen(cache_device_frac=0.0)"))
    guessing, knowing = (Oracle(model, 0.6, guess) for guess in (True, False))
    for i, prompt in enumerate(texts(LENGTHS)):
        for run, numpy in ((made, guessing), (resident, knowing)):
            tokens, logprobs = numpy.generate(prompt, NEW)
            assert run.tokens[i] == tokens
            np.testing.assert_allclose(run.logprobs[i], logprobs, atol=1e-4)
    recall = guessing.found[:, 0] / guessing.found[:, 1]
    assert recall[0] == 1 and (recall[1:] < 0.99).all()
    assert made.placement.guess_recall_per_layer == tuple(recall[1:])
    np.testing.assert_allclose(made.placement.guess_recall, recall[1:].mean())
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(made.logprobs, resident.logprobs))


def test_scores_are_those_of_the_same_tokens_when_they_were_generated(silent, on_device):
    engine, wanted = on_device(silent, POLICY)
    sequences = [[*a, *b] for a, b in zip(texts(LENGTHS), wanted.tokens)]
    one = tight(engine, "flexgen")
    here, there = (e.score(sequences, "prompt", last=[NEW] * 3) for e in (engine, one))
    np.testing.assert_allclose(there.logprobs, wanted.logprobs, atol=2e-5)
    np.testing.assert_allclose(there.attended_frac, here.attended_frac, atol=1e-6)
    assert there.placement.load_bytes > 0 and np.concatenate(there.correct).all()


@pytest.mark.parametrize(
    "spec, says",
    [
        ("alisa(p1=0,p2=3)", "p2=3 and beta=auto plan deletions, .* leave both at auto"),
        ("alisa(lag=1)", "give lag=0"),
        ("alisa(p1=0,alpha=0.5)", "alisa needs host_kv_bytes of at least [0-9]+ here; got 10"),  # and deletes nothing
    ],
)
def test_what_a_guess_cannot_serve_is_refused_in_one_sentence(silent, spec, says):
    with pytest.raises(ValueError, match=says):
        alisa_jax.Engine(silent, POLICY, "raw", spec, "inf", 10).generate(texts((60, 60)), 30)


def test_rows_of_one_head_are_a_share_of_a_token():
    setting = Setting(2, (40, 40), 9, 8.0, 1e9, selects=True, chosen=5, heads=2)
    rows = (Rows(3, 7, Tier.HOST, Tier.STAGING, 1, 0, 1), Rows(5, 6, Tier.HOST, Tier.STAGING, 1, 0))
    assert moved_bytes(rows, setting, (40, 40)) == 4 * 4 + 8
    assert moved_bytes(rows, replace(setting, gather=False), (40, 40)) == setting.page_bytes
    wanted = {(1, 0, 0): (2, 3, 39), (1, 1, 1): (0,)}
    view = placement.View(setting, 3, (40, 40), (1, 1), (placement.Span(0, 32),) * 2, wanted, wanted)
    plan = placement.parse("accelerate").decide(view)
    assert plan.load == (Rows(2, 4, Tier.HOST, Tier.STAGING, 1, 0, 0), Rows(0, 1, Tier.HOST, Tier.STAGING, 1, 1, 1))
    assert ALL not in (plan.load[0].head, plan.load[1].head)


def test_of_a_thousand_tokens_at_most_three_tenths_of_a_stream_travel():
    """The last two layers of the bundled model, which select by its calibration; the first two attend densely."""
    model = alisa_jax.load("bundled")
    ids = model.encode(Path(records.__file__).read_text())
    engine = alisa_jax.Engine(model, "double_sparsity(kv_sparsity=0.8)", "raw", "flexgen(cache_device_frac=0)")
    engine.placement.counts_recall = True
    run = engine.generate([ids[:993]], 8, ()).placement
    setting = engine.placement.setting((993,), 8)
    stream = sum(setting.layers * setting.token_bytes * (n // 16 * 16) for n in range(993, 1000))
    assert 0 < run.load_bytes <= 0.3 * stream
    assert 0.3 < run.guess_recall < 1
