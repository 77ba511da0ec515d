"""`python -m eval.growth`: fits, designs, refusals with numbers made up; filled layers; one small real run."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alisa_jax import policies
from alisa_jax.attention import parts
from alisa_jax.codecs import Raw
from alisa_jax.kv.state import LayerSpec
from alisa_jax.models import ModelConfig
from eval import growth
from eval.script import common
from eval.speed import filled, fits, models
from eval.speed.systems import Work
from eval.text import windows

SHAPE = ModelConfig("llama", 50, 24, 4, 3, 3, 8, 24, 64)
SPARSE = "swa(kv_sparsity=0.8,window=64)"
CONTEXTS = (512, 1024, 2048, 4096)


# Fits


def test_a_line_is_found_again_and_its_slope_lies_between_flat_and_linear():
    seconds = {n: 0.02 + 3e-6 * n for n in CONTEXTS}
    found = fits.growth(seconds, 0.02)
    assert (found.base_s, found.token_s) == pytest.approx((0.02, 3e-6)) and found.last_slope == pytest.approx(1.0)
    assert 0.1 < found.slope < 0.5


def test_slopes_are_the_powers_of_power_laws():
    for power in (0.0, 0.5, 1.0, 2.0):
        found = fits.growth({n: 1e-3 * n**power for n in CONTEXTS})
        assert (found.slope, found.last_slope) == pytest.approx((power, power))
    assert fits.growth({512: 1.0}) == (None, None, None, None)
    assert fits.growth({512: 1.0, 1024: 2.0}, 1.5).last_slope is None, "512 tokens are within the weights' seconds"


def test_relative_errors_weigh_alike_at_all_contexts():
    seconds = {n: 1e-6 * n * (1.1 if n == 4096 else 1.0) for n in CONTEXTS}
    t, n = np.array(list(seconds.values())), np.array(CONTEXTS, float)
    a, b = fits.line(seconds)
    error = lambda a, b: float((((a + b * n) / t - 1) ** 2).sum())
    assert all(error(a, b) <= error(a + i, b + j) for i in (-1e-5, 0, 1e-5) for j in (-1e-8, 0, 1e-8))


def test_what_is_above_the_weights_is_compared_too():
    assert fits.ratios(0.03, 0.06, 0.02) == pytest.approx((0.5, 0.25))
    assert fits.ratios(0.03, 0.02, 0.02) == (1.5, None)


# The command with steps that are made up


def made_steps(model, chosen, work, size, seed, trace, impl):
    """Dense takes 20 ms + 1 us a token, the sparse one a fifth of the latter, what offloads twice as much."""
    n = work.prompt_tokens[0] + work.new_tokens - 1
    found = {}
    for system in chosen:
        times = 2 if system.controller != "resident" else 1
        grows = 1e-6 * n * (0.2 if filled.selects(system) else 1.0)
        found[system] = {
            "seconds_per_step": times * (0.02 + grows),
            "decide_s_per_step": 1e-5,
            "loaded_rows_per_step": 3.0,
            "load_bytes_per_step": 64.0,
            "compiles": 0,
            "agrees": 1.0,
            "note": None,
        }
        if system.controller == "alisa" and n == 512:
            found[system] = {"seconds_per_step": "OOM", "note": "too small"}
    return found


@pytest.fixture
def bench(capsys, monkeypatch):
    """`call(*flags)` -> (exit code, records, stderr)."""
    setup = SimpleNamespace(contexts=[], traced=[])

    def measure(model, chosen, work, *rest):
        setup.contexts.append((work.prompt_tokens[0] + work.new_tokens - 1, len(chosen)))
        return made_steps(model, chosen, work, *rest)

    def record(name, policy, work, source):
        setup.traced.append((name, policy, work.prompt_tokens, work.new_tokens))

    def call(*flags, contexts=CONTEXTS):
        monkeypatch.setattr(models, "random_weights", lambda *_: None)
        monkeypatch.setattr(filled, "decisions", lambda *_: {"decide_s": 1e-5, "note": None})
        monkeypatch.setattr(filled, "search", lambda *_: {"search_s": 0.1})
        argv = ["growth", "--json", *(f"--contexts={n}" for n in contexts), *flags]
        code = common.run(lambda a: growth.main(a, measure, record), argv)
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    setup.call = call
    return setup


def test_the_table_has_shares_less_the_weights_and_says_what_is_as_designed(bench, tmp_path):
    code, records, err = bench.call("--trace=none", f"--plot={tmp_path / 'g.png'}")
    assert code == 0 and bench.contexts == [(96, 2), *((n, 4) for n in CONTEXTS)] and not bench.traced
    assert len(records) == 2 + 4 * (4 + 3 + 2)
    lines = {line.split("  ")[0].strip(): line.split() for line in err.splitlines() if line.strip()}
    weights = 0.020096
    want = (0.02 + 0.2e-6 * 4096 - weights) / (0.02 + 1e-6 * 4096 - weights)
    assert lines["4096"][1:3] == ["24.1", "20.8"] and lines["4096"][-2] == f"{want:.2f}" and lines["4096"][-1] == "0.20"
    assert lines["512"][4] == "OOM" and f"alisa | {SPARSE} at 512: too small" in err
    growths = {line.split("  ")[0]: line.split() for line in err.split("as designed\n")[1].splitlines() if line}
    dense, sparse = growths["resident | dense"], growths[f"resident | {SPARSE}"]
    assert dense[-3:] == ["1e+03", "linear", "yes"] and sparse[-1] == "yes" and "200" in sparse
    assert growths["flexgen | dense"][-1] == "no", "twice the weights are not above them in proportion"
    assert growths[f"alisa | {SPARSE}"][-1] == "yes", "a fifth of what offloaded dense attention takes a token"
    assert growths[f"decide: alisa | {SPARSE}"][-1] == "yes"
    assert growths[f"decide: alisa(traffic=paper) | {SPARSE}"][-1] == "no", "made up to be flat"
    assert growths["search, half of the context new"][-1] == "no"
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "g.png").stat().st_size > 10_000


def test_a_context_on_file_is_not_measured_again(bench, tmp_path):
    out = f"--out={tmp_path / 'r.jsonl'}"
    _, first, _ = bench.call("--trace=none", out, contexts=(512, 1024))
    bench.contexts.clear()
    code, again, err = bench.call("--trace=none", out, contexts=(512, 1024, 2048))
    assert code == 0 and bench.contexts == [(2048, 4)] and again[: len(first)] == first
    assert "3 of 4 contexts were in" in err
    bench.contexts.clear()
    bench.call("--trace=none", out, "--device_kv_frac=0.6", contexts=(512,))
    assert bench.contexts == [(96, 2), (512, 4)]


def test_selections_are_recorded_up_to_the_given_context(bench):
    code, records, _ = bench.call("--trace_tokens=1000", contexts=(512, 1024))
    assert code == 0 and bench.traced == [("bundled", SPARSE, (n - 80,), 81) for n in (96, 512)]
    text = windows.read(windows.BUNDLED).name
    steps = [(r["context_tokens"], r["trace"], r["data"]) for r in records if r["measured_part"] == "step"]
    assert set(steps) == {(96, "bundled", text), (512, "bundled", text), (1024, None, None)}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--contexts=520"], "--contexts must be multiples of 16 above 96"),
        (["--contexts=96"], "--contexts must be multiples of 16 above 96"),
        (["--contexts=512", "--policy=local(tokens=8)"], "--policy must be an swa"),
        (["--contexts=32768", "--policy=swa(kv_sparsity=0.8)"], "serves at most 16384 tokens"),
        (["--contexts=512", "--model=bundled"], "--model must be random:NAME"),
        (["--contexts=512", "--trace=random:opt_125m"], "--trace: the weights of random:opt_125m are random"),
        (["--contexts=512", "--offload_dense=resident"], "must name controllers that offload"),
        (["--contexts=512", "--search_new_tokens=512"], "--search_new_tokens must be below the contexts"),
        (["--contexts=512", "--hardware=abacus"], "--hardware: 'abacus' is unknown"),
        (["--contexts=512", "--plot=nowhere/g.png"], "--plot: there is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(bench, flags, why):
    code, records, err = bench.call(*flags, contexts=())
    assert code == common.EXIT_MISTAKE and not records and not bench.contexts
    assert err.startswith("error: ") and why in err and err.count("\n") == 1


# Runs


@pytest.mark.parametrize("policy", ["dense", "swa(kv_sparsity=0.5,window=4,spare_slots=2)"])
def test_a_filled_layer_is_what_a_prompt_of_the_same_keys_leaves(policy):
    B, T, N, H, layout = 2, 48, 3, 8, (parts.Part(0, 1, 64), parts.Part(1, 2, 64, 16))
    spec = LayerSpec(policies.parse(policy), Raw("float32"), "working_set")
    x, length, host = jnp.zeros((B, T, N * H)), jnp.array([45, 41], jnp.int32), jnp.array([0, 32], jnp.int32)
    key = jax.random.key(3)
    found, kept = filled.fill(spec, layout, N, N, H, x, length, host, key)
    k, v = (jax.random.normal(one, (B, T, N, H)) for one in jax.random.split(key, 3)[:2])
    _, want, rows = parts.prefill(spec, layout, jnp.zeros_like(k), k, v, length, host)
    same = lambda a, b: np.allclose(a, b, rtol=0, atol=1e-5)  # the draws are fused there
    assert same(kept.k, rows.k) and same(kept.v, rows.v)
    for b, (one, other) in enumerate(zip(found, want, strict=True)):
        assert one.spec == spec and int(one.length[0]) == int(length[b])
        if policy == "dense":
            assert all(same(a, c) for a, c in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
            continue
        assert same(one.store.k, other.store.k) and same(one.store.v, other.store.v)
        pos = np.asarray(one.ws.pos[0, 0])
        active = pos >= 0
        counts = spec.policy.counts(64)
        assert active.sum() == counts.local[int(length[b])] + counts.top[int(length[b])]
        assert same(np.asarray(one.ws.k)[0][:, active], np.asarray(k)[b, pos[active]].swapaxes(0, 1))
        sums = np.asarray(one.stats.sums.hi)[0, 0]
        assert sums.sum() == pytest.approx(4 * N, rel=1e-4), "4 rows of N heads"


def test_the_attended_share_is_the_policies_own_count():
    assert filled.attended_frac("dense", 4096) == 1.0
    assert filled.attended_frac(SPARSE, 4096) == pytest.approx(0.2, abs=1e-3)
    assert filled.attended_frac("swa(tokens=64)", 4096) == 64 / 4096


def test_a_decision_of_alisa_names_what_enters_and_one_of_the_paper_what_is_wanted():
    config = dataclasses.replace(SHAPE, max_positions=600, n_heads=12, n_kv_heads=12, d_model=96, n_layers=8)
    work = Work(config, "float32", (500,), 13, 0.6 * 8 * 2 * 96 * 4 * 512)
    policy = "swa(kv_sparsity=0.8,window=4)"
    found = filled.decisions(filled.System("alisa", policy, "raw"), work, 1)
    low, high = found["decide_s_quartiles"]
    assert 0 < low <= found["decide_s"] <= high
    assert found["wanted_rows"] == pytest.approx(8 * 0.2 * 506, rel=0.02) and found["entering_rows"] < 8 * 4
    small = dataclasses.replace(work, device_kv_bytes=1000.0)
    refused = filled.decisions(filled.System("alisa", policy, "raw"), small, 1)
    assert refused["decide_s"] == "OOM" and "device_kv_bytes of at least" in refused["note"]


def test_a_search_is_timed_and_keeps_everything_where_all_fits():
    config = dataclasses.replace(SHAPE, max_positions=600)
    work = Work(config, "float32", (100,), 16, 1e9)
    found = filled.search(work, "swa(kv_sparsity=0.8,window=4)", "h100_80gb", 3)
    low, high = found["search_s_quartiles"]
    assert 0 < low <= found["search_s"] <= high and (found["p1"], found["excess_tokens"]) == (16, 0.0)


@pytest.mark.slow
def test_what_is_offloaded_makes_the_tokens_of_what_is_resident():
    config = dataclasses.replace(SHAPE, head_dim=16, d_model=48, n_layers=3, max_positions=129)
    work = Work(config, "float32", (96,), 33, 0.9 * 3 * 2 * 48 * 4 * 128)
    sparse = "swa(kv_sparsity=0.8,window=4,spare_slots=2)"
    pairs = (("resident", "dense"), ("resident", sparse), ("flexgen", "dense"), ("alisa", sparse))
    systems = [filled.System(*pair, "raw") for pair in pairs]
    model = models.random_weights(config, "float32", 0, "tiny")
    found = filled.steps(model, systems, work, 16, 0, None, {})
    dense, sparse, away_dense, away_sparse = steps = [found[system] for system in systems]
    assert [r["agrees"] for r in steps] == [1.0] * 4 and [r["compiles"] for r in steps] == [0] * 4
    assert away_dense["tokens_sha256"] == dense["tokens_sha256"] != sparse["tokens_sha256"]
    assert away_sparse["tokens_sha256"] == sparse["tokens_sha256"]
    for r in steps:
        low, high = r["seconds_per_step_quartiles"]
        assert 0 < low <= r["seconds_per_step"] <= high
    page = 3 * 3 * 16 * 2 * 4 * 16  # of all layers
    assert away_dense["store_bytes_per_step"] == page / 32, "the page that the first round fills leaves in the second"
    assert away_dense["loaded_rows_per_step"] == 3 * (96 + 112) / 2, "all full pages come at every step"
    assert away_sparse["loaded_rows_per_step"] < 0.2 * away_dense["loaded_rows_per_step"]
    assert away_dense["device_peak_bytes"] <= 0.9 * dense["device_peak_bytes"] and away_sparse["host_peak_bytes"] > 0
