"""Double Sparsity: exact where nothing is left out, the true top-k where labels are whole, outlier channels, bytes."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import attention, spec
from alisa_jax.calibration import Calibration
from alisa_jax.kv.state import LayerSpec, tree_bytes
from alisa_jax.models.checkpoint import Model
from alisa_jax.models.decoder import Decoder, ModelConfig
from alisa_jax.policies import POLICIES, Dense, Dims, parse
from tests import oracle, replay

T, H = 320, 8
GROUPS = {1: (2, 2), 4: (4, 1)}  # G: query heads, kv heads
STARTS = {"empty": None, "prompt": (17,)}
WHOLE = "channels=1,label_bits=32,dense_layers=0"
TRUE = {1: f"double_sparsity(kv_sparsity=0.8,{WHOLE})", 4: f"double_sparsity(tokens=24,{WHOLE})"}
LOCAL = f"double_sparsity(tokens=24,local=6,{WHOLE})"


def config(K, channels, G=1, layers=1):
    return SimpleNamespace(n_layers=layers, n_heads=G * K, n_kv_heads=K, head_dim=channels)


def statistics(N, K, H, layers=1, **given):
    """A calibration with some of q_abs [L, N, H], k_abs [L, K, H] and qk_abs [L, N, H]; the others are alike."""
    shapes = dict.fromkeys(("k_min", "k_max", "v_min", "v_max", "k_abs"), (layers, K, H))
    shapes |= dict.fromkeys(("q_abs", "qk_abs"), (layers, N, H))
    return Calibration(**{name: np.ones(shape) for name, shape in shapes.items()} | given, n_tokens=1, model="made up")


def resolved(policy, channels):
    """`policy` for the only layer of a model in which the channels [K][r] are those that matter."""
    K = len(channels)
    weight = np.zeros((1, K, H))
    np.put_along_axis(weight[0], channels, 1.0, axis=-1)
    layer = policy.resolve(config(K, H), statistics(K, K, H, qk_abs=weight)).for_layer(0)
    assert layer.table == (tuple(map(tuple, channels.tolist())),)
    return layer


@functools.cache
def tokens(G):
    return replay.stream(70 + G, 1, T, *GROUPS[G], H)


@functools.cache
def run(policy, G, start="empty"):
    return replay.run(policy, "indexed", tokens(G), (T,), STARTS[start], padded=32)


def by_keys(policy, q, keys, n, K):
    """For each kv head the positions that the query q [N, r] at n keeps of the keys [T, K, r], float64."""
    kept = policy.tokens or oracle.nearest(n * (1 - oracle.exact(policy.kv_sparsity)))
    heads = []
    for p in range(K):
        mass = np.zeros(n)
        for head in range(p * len(q) // K, (p + 1) * len(q) // K):
            e = np.exp(keys[:n, p] @ q[head].astype(np.float64) / np.sqrt(H))
            mass += e / e.sum()
        local = set(range(max(0, n - policy.local), n))
        ranking = sorted(set(range(n)) - local, key=lambda i: (-mass[i], i))
        heads.append(local | set(ranking[: max(1, kept) - len(local)]) | {n})
    return heads


@pytest.mark.parametrize("G, route, start", [(1, "indexed", "empty"), (4, "masked", "prompt")])
def test_all_channels_and_all_tokens_are_exact_attention(G, route, start):
    stream = replay.Stream(*(x[:, :64] for x in tokens(G)))
    policy = parse("double_sparsity(tokens=64,channels=1)")
    got = replay.run(policy, route, stream, (64,), STARTS[start], padded=32)
    first = 64 - got.out.shape[1]
    np.testing.assert_allclose(got.out[0], oracle.causal(*(x[0] for x in stream))[0][first:], atol=1e-5)


@pytest.mark.parametrize(
    "G, text, start", [(1, TRUE[1], "empty"), (4, TRUE[4], "prompt"), (4, LOCAL, "prompt")], ids=["G1", "G4", "local"]
)
def test_all_channels_keep_the_true_best_tokens_over_300_steps(G, text, start):
    policy, (N, K), (q, k, v) = parse(text), GROUPS[G], (x[0] for x in tokens(G))
    got = run(policy, G, start)
    steps = len(got.sets[0])
    assert steps >= 300
    for i, n in enumerate(range(T - steps, T)):
        want = by_keys(policy, q[n], k.astype(np.float64), n, K)
        assert got.sets[0][i] == want, f"query {n}"
        if n % 13 == 0:
            allowed = np.array([[j in want[head * K // N] for j in range(T)] for head in range(N)])
            np.testing.assert_allclose(got.out[0, i], oracle.attention(q[n], k, v, allowed)[0], atol=1e-5)


def value(bits):
    """What the bits of bfloat16 numbers say, float64."""
    return np.asarray(bits).view(jnp.bfloat16).astype(np.float64)


def check_labels(stats, bits, want):
    """What the labels of one sequence stand for, which is to be `want` [K, S, r] up to half a step."""
    codes = np.asarray(stats.codes[0])
    if bits >= 16:
        got = codes if bits == 32 else value(codes)
        np.testing.assert_array_equal(got, want if bits == 32 else want.astype(jnp.bfloat16).astype(np.float64))
        return got
    parts = [(codes >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    low, step = (value(x[0])[..., None] for x in (stats.low, stats.step))
    got = low + step * np.concatenate(parts, axis=-1)[..., : want.shape[-1]]
    assert (abs(got - want) <= 0.5 * step * (1 + 1e-4)).all()
    width, most = want.max(-1, keepdims=True) - want.min(-1, keepdims=True), abs(want).max(-1, keepdims=True)
    assert (step <= (width + 2**-6 * most) / (2**bits - 1) * (1 + 2**-6)).all()
    return got


@pytest.mark.parametrize("G, bits", [(1, 4), (4, 2)])
def test_labels_that_are_written_step_by_step_are_those_of_numpy(G, bits):
    """Over 300 jitted steps: half a step of error at most, and the selection is that of the labels."""
    (N, K), (q, k, _) = GROUPS[G], (x[0] for x in tokens(G))
    channels = np.array([[1, 4, 6], [0, 2, 5]][:K])
    policy = resolved(parse(f"double_sparsity(tokens=24,channels=0.375,label_bits={bits},dense_layers=0)"), channels)
    got = run(policy, G)
    labels = np.stack([k[:, p, channels[p]] for p in range(K)]).astype(np.float64)
    stored = np.moveaxis(check_labels(got.state.stats, bits, labels), 0, 1)
    for n in range(T):
        chosen = np.stack([q[n, head, channels[head * K // N]] for head in range(N)])
        assert got.sets[0][n] == by_keys(policy, chosen, stored, n, K), f"query {n}"


def noted(policy, k, first=0, stats=None):
    """The labels of the keys k [T, K, H] of one sequence; in a context of T tokens unless `stats` has one."""
    n, K, size = k.shape
    stats = policy.init(Dims(1, K, K, n, n, size)) if stats is None else stats
    return _note(policy, stats, k[None], np.full((1,), first, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _note(policy, stats, k, first):
    return policy.note(stats, k, first)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_labels_of_any_number_of_bits_are_half_a_step_from_the_keys(bits):
    k = tokens(1).k[0, :40] * np.float32(30)
    k[5] = 0
    policy = parse(f"double_sparsity(tokens=24,channels=1,label_bits={bits})")
    check_labels(noted(policy, k), bits, np.moveaxis(k, 0, 1).astype(np.float64))


def test_a_prompt_leaves_the_labels_that_its_tokens_would_have_left_one_by_one():
    k, policy = tokens(1).k[0, :12], parse("double_sparsity(tokens=24)")
    stats = noted(policy, np.concatenate([k[:5], np.full_like(k[5:], 9.0)]))  # padding, to be overwritten
    for n in range(5, 12):
        stats = noted(policy, k[n : n + 1], n, stats)
    beyond = noted(policy, k[:1], 12, stats)  # a full context stays as it is
    for want, *got in zip(*map(jax.tree.leaves, (noted(policy, k), stats, beyond)), strict=True):
        np.testing.assert_array_equal(want, got[0])
        np.testing.assert_array_equal(want, got[1])


def test_one_token_is_written_in_place(optimised):
    """The step of a long context makes no second label cache."""
    for bits in (4, 16):
        policy, dims = parse(f"double_sparsity(tokens=8,label_bits={bits})"), Dims(1, 4, 4, 4096, 4096, 64)
        stats = jax.eval_shape(lambda policy=policy, dims=dims: policy.init(dims))
        k, first = jax.ShapeDtypeStruct((1, 1, 4, 64), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        memory = jax.jit(policy.note, donate_argnums=0).lower(stats, k, first).compile().memory_analysis()
        assert memory.alias_size_in_bytes == tree_bytes(stats)
        assert memory.temp_size_in_bytes < tree_bytes(stats) / 100


def test_a_token_may_return_after_it_was_out():
    sets = [step[0] for step in run(parse(TRUE[4]), 4, "prompt").sets[0]]
    enters = [(p, n) for n in range(1, len(sets)) for p in sets[n] - sets[n - 1]]
    assert sum(any(p in before for before in sets[: n - 1]) for p, n in enters) > 100


def test_nothing_but_a_local_window_guarantees_the_newest_token():
    plain, local = (run(parse(text), 4, "prompt") for text in (TRUE[4], LOCAL))
    newest = lambda got: [17 + i - 1 in step[0] for i, step in enumerate(got.sets[0])]
    assert not all(newest(plain)) and all(newest(local))
    for i, (step,) in enumerate(local.sets[0]):
        n = 17 + i
        assert set(range(n - 6, n + 1)) <= step and len(step) == min(n, 24) + 1


@pytest.mark.parametrize("size, channels, bits", [(64, 0.25, 4), (64, 0.5, 2), (96, 0.125, 8)])
def test_labels_are_as_small_as_the_paper_says_and_scales_are_counted(size, channels, bits):
    """1/16 of the bytes of keys of 16 bits: (r / H) (bits / 16); and 4 bytes a token and kv head for its scale."""
    B, K, S = 3, 5, 128
    policy = parse(f"double_sparsity(tokens=8,channels={channels},label_bits={bits},dense_layers=0)")
    policy = policy.resolve(config(K, size), statistics(K, K, size)).for_layer(0)
    labels = jax.eval_shape(lambda: policy.init(Dims(B, K, K, S, S, size)))
    key_bytes = B * K * S * size * 2
    assert tree_bytes(labels.codes) == key_bytes * channels * bits / 16 == key_bytes / 16
    assert tree_bytes(labels) == key_bytes / 16 + 4 * B * K * S


@pytest.mark.parametrize("bits, kind", [(16, jnp.uint16), (32, jnp.float32)])
def test_labels_that_are_not_quantised_have_no_scales(bits, kind):
    policy = parse(f"double_sparsity(tokens=8,label_bits={bits})")
    labels = jax.eval_shape(lambda: policy.init(Dims(3, 4, 2, 32, 32, 6)))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(labels)] == [((3, 2, 32, 6), kind)]


def recall(policy, q, k, count):
    """Mean share of the true `count` best keys [T, K, H] of the queries [n, K, H] that `policy` keeps, all keys past."""
    stats = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(q), *x.shape[1:])), noted(policy, k))
    select = jax.jit(policy.select, static_argnums=2)
    keep = np.asarray(select(stats, np.full((len(q),), len(k), np.int32), len(k), q[:, :, None]))
    assert (keep.sum(-1) == count).all()
    true = np.argsort(-np.einsum("ikh,tkh->ikt", q, k), axis=-1)[..., :count]
    return np.take_along_axis(keep, true, axis=-1).mean()


@pytest.mark.parametrize("planted", [True, False])
def test_qk_finds_planted_outlier_channels_and_random_channels_do_not(planted):
    """Two channels of 64 are ten times as large, and labels have H / 8 channels; the control without them ties."""
    K, size, count, rng = 2, 64, 32, np.random.default_rng(11)
    outliers = [(7, 40), (21, 22)]  # by kv head

    def draw(n):
        x = rng.normal(size=(n, K, size)).astype(np.float32)
        for p in range(K if planted else 0):
            x[:, p, outliers[p]] *= 10
        return x

    weights = [abs(draw(2000) * draw(2000)).mean(0)[None], *(rng.random((1, K, size)) for _ in range(3))]
    q, k, got = draw(50), draw(512), []
    for weight in weights:
        policy = parse(f"double_sparsity(tokens={count},channels=0.125,dense_layers=0)")
        policy = policy.resolve(config(K, size), statistics(K, K, size, qk_abs=weight)).for_layer(0)
        got.append((recall(policy, q, k, count), [set(outliers[p]) <= set(policy.table[0][p]) for p in range(K)]))
    (by_qk, found), *others = got
    at_random = np.mean([share for share, _ in others])
    if planted:
        assert all(found) and by_qk > 0.75 and by_qk > at_random + 0.35
    else:
        assert abs(by_qk - at_random) < 0.05


def test_each_ranking_reads_its_own_statistics_and_a_kv_head_goes_by_the_mean_of_its_queries():
    weights = {"q_abs": np.zeros((2, 4, H)), "k_abs": np.zeros((2, 2, H)), "qk_abs": np.zeros((2, 4, H))}
    weights["q_abs"][0, :2, 5] = 1  # two query heads agree, and each would rather have another
    weights["q_abs"][0, 0, 2], weights["q_abs"][0, 1, 3] = 1.9, 1.8
    weights["q_abs"][0, 2:, 6] = 1
    weights["k_abs"][:, :, 4], weights["k_abs"][1, 0, 1] = 1, 2
    weights["qk_abs"][:, :, 7] = 1
    made, tables = statistics(4, 2, H, layers=2, **weights), {}
    for ranking in ("q", "k", "qk"):
        policy = parse(f"double_sparsity(tokens=8,channels=0.125,dense_layers=0,ranking={ranking})")
        tables[ranking] = policy.resolve(config(2, H, G=2, layers=2), made).table
    assert tables["q"] == (((5,), (6,)), ((0,), (0,)))
    assert tables["k"] == (((4,), (4,)), ((1,), (4,)))
    assert tables["qk"] == (((7,), (7,)),) * 2


def test_layers_have_their_own_channels_and_the_first_ones_are_dense():
    weight = np.random.default_rng(2).random((3, 2, H))
    policy = parse("double_sparsity(tokens=8,channels=0.25,dense_layers=1)")
    whole = policy.resolve(config(2, H, layers=3), statistics(2, 2, H, layers=3, qk_abs=weight))
    layers = [whole.for_layer(i) for i in range(3)]
    assert layers[0] == Dense() and layers[1] != layers[2]
    for i in (1, 2):
        assert layers[i].table[0] == tuple(tuple(np.sort(np.argsort(-row)[:2]).tolist()) for row in weight[i])
        attention.check(LayerSpec(layers[i], replay.CODEC, "indexed"), 8, 2, 2)
    with pytest.raises(ValueError, match="take for_layer"):
        whole.init(Dims(1, 2, 2, 8, 8, H))


def test_the_chosen_channels_are_part_of_the_value_and_not_of_the_spec():
    policy = parse("double_sparsity(tokens=8,channels=0.25,dense_layers=0)")
    one, other = (resolved(policy, np.array(channels)) for channels in ([[1, 2]], [[1, 3]]))
    assert one != other and one != policy and hash(one) != hash(other)
    assert spec.to_text(one, POLICIES) == spec.to_text(policy, POLICIES) and repr(one) == repr(policy)
    with pytest.raises(spec.SpecError, match="unknown key 'table'"):
        parse("double_sparsity(tokens=8,table=3)")


@functools.partial(jax.jit, static_argnums=0)
def _chosen(policy, q, k):
    n = len(k)
    stats = policy.init(Dims(1, len(q), 1, n, n, k.shape[1]))
    stats = policy.note(stats, k[None, :, None], jnp.zeros((1,), jnp.int32))
    return policy.select(stats, jnp.full((1,), n, jnp.int32), n, q[None, None])[0, 0]


def best_of(q, k, count, bits=32):
    """The positions that are kept of the keys k [T, H] of one kv head for its queries q [G, H], all keys past."""
    policy = parse(f"double_sparsity(tokens={count},channels=1,label_bits={bits})")
    return set(np.flatnonzero(_chosen(policy, np.asarray(q, np.float32), np.asarray(k, np.float32))).tolist())


@pytest.mark.parametrize("G, bits", [(1, 32), (2, 4)])
def test_a_key_that_is_not_a_number_is_kept_no_more_than_one_that_does_not_exist(G, bits):
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(G, H)), rng.normal(size=(40, H))
    k[7] = 9 * q.mean(0)  # the best by far
    assert 7 in best_of(q, k, 6, bits)
    without = best_of(q, np.delete(k, 7, axis=0), 6, bits)
    k[7, 2] = np.nan
    assert best_of(q, k, 6, bits) == {i + (i >= 7) for i in without}


def test_the_attention_of_a_token_is_not_lost_to_zero():
    """Softmax in float32 has nothing left for any key but the best one here, and the order would be that of positions."""
    k = 200.0 * np.arange(12)[:, None] * np.ones((1, 2))
    assert best_of(np.ones((2, 2)), k, 4) == {8, 9, 10, 11}


def test_ties_go_to_the_lowest_position():
    assert best_of(np.ones((2, 2)), np.ones((12, 2)), 4) == {0, 1, 2, 3}


def test_query_heads_of_a_group_share_what_they_would_pay_together():
    """One head is sure of token 2; the other is torn between 0 and 1."""
    q, k = 20 * np.eye(2), np.array([[0.0, 0.11], [0.0, 0.1], [3.0, 0.0], [0.0, 0.0]])
    assert best_of(q, k, 1) == {2} and best_of(q, k, 2) == {0, 2}


@pytest.fixture(scope="module")
def model():
    one = ModelConfig("llama", 29, 16, 2, 4, 2, 8, 24, 96)
    rng, shapes = np.random.default_rng(1), jax.eval_shape(Decoder(one).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 4), shapes)
    return Model(Decoder(one), params, None, "tiny", None, (), "tiny")


def test_both_protocols_of_an_engine_agree_under_the_channels_of_its_calibration(model):
    sequences = np.random.default_rng(3).integers(0, 29, (2, 32)).tolist()
    weight = np.random.default_rng(8).random((2, 4, 8))
    made = statistics(4, 2, 8, layers=2, qk_abs=weight)
    engine = alisa_jax.Engine(model, "double_sparsity(tokens=6,channels=0.25,dense_layers=1)", calibration=made)
    best = np.sort(np.argsort(-weight[1].reshape(2, 2, 8).mean(1))[:, :2])
    assert engine.layers[1].policy.table == (tuple(map(tuple, best.tolist())),)
    one, other = (engine.score(sequences, protocol) for protocol in ("prefill_mask", "decode"))
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert one.attended_frac[0] == 1 and one.attended_frac[1] < 0.6


def test_an_engine_without_statistics_says_where_they_come_from(model):
    text = "double_sparsity(tokens=6,dense_layers=1)"
    with pytest.raises(ValueError, match="python -m eval.calibrate makes, or channels=1") as error:
        alisa_jax.Engine(model, text)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the calibration is of made up, with 1 layers"):
        alisa_jax.Engine(model, text, calibration=statistics(4, 2, 8))
    whole = alisa_jax.Engine(model, "double_sparsity(tokens=6,dense_layers=1,channels=1)")
    assert whole.implementation == "xla:indexed+working_set" and whole.layers[1].policy.table == ()
    assert (
        alisa_jax.Engine(model, "double_sparsity(tokens=6)").implementation == "xla:working_set"
    )  # nothing is labelled


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("double_sparsity()", "give either kv_sparsity or tokens"),
        ("double_sparsity(tokens=4,channels=0)", "channels is a share of the channels of a head, in (0, 1]; got 0"),
        ("double_sparsity(tokens=4,channels=2)", "in (0, 1]; got 2"),
        ("double_sparsity(tokens=4,label_bits=3)", "label_bits must be one of 2, 4, 8, 16, 32; got 3"),
        ("double_sparsity(tokens=4,ranking=v)", "ranking must be one of q, k, qk; got 'v'"),
        ("double_sparsity(tokens=4,local=5)", "tokens counts the local ones and must be at least local=5; got 4"),
        ("double_sparsity(tokens=4,local=-1)", "local must be at least 0; got -1"),
        ("double_sparsity(tokens=4,dense_layers=-1)", "dense_layers must be at least 0; got -1"),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(text, sentence):
    with pytest.raises(spec.SpecError, match=re.escape(sentence)) as error:
        parse(text)
    assert "\n" not in str(error.value)
