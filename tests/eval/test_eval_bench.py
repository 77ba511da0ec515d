"""`python -m eval.bench`: sides on small models, turns, limits, gates, records and refusals."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from alisa_jax.models import Decoder, Model, ModelConfig
from alisa_jax.models.shapes import SHAPES
from alisa_jax.policies import Swa
from eval import bench
from eval.script import common, hashes
from eval.speed import cells, gates, limits, models, rounds, traces
from eval.speed import ours as bench_ours
from eval.speed import peers as bench_peers
from eval.speed.cells import Cell, System
from eval.speed.limits import Rates

pytestmark = pytest.mark.slow

OPT = ModelConfig(
    "opt", 61, 24, 2, 3, 3, 8, 40, 96, tie_embeddings=True, act="relu", attention_bias=True, mlp_bias=True
)
LLAMA = ModelConfig("llama", 61, 24, 3, 4, 2, 8, 40, 96, tie_embeddings=True)
CELL = Cell("decode", "random:small", 2, 64, rounds=5, steps=3)
MACHINE = Rates(1e9, "made up", 1e10, "made up")
FLAGS = ["bench", "--suite=decode", "--model=random:small", "--cell=2x64", "--steps=3", "--trace=none", "--json"]


@pytest.fixture
def small(monkeypatch):
    """random:small is a model of two layers with narrow heads, and nothing has to be measured of the machine."""
    monkeypatch.setattr(cells.shapes, "config", lambda name: OPT)
    monkeypatch.setattr(cells.inputs, "card", lambda name: cells.inputs.Card(name, hashes.Hashes(), 96))


@pytest.fixture
def call(small, capsys, monkeypatch):
    """`call(*flags)` -> (exit code, records, stderr), with rounds made up: `seconds` of a step of each system."""
    setup = SimpleNamespace(seconds={}, asked=[])

    def made(cell, systems, values, machine):
        setup.asked.append((cell.batch, cell.context, tuple(systems)))
        return {
            name: {"tokens_per_s": cell.batch / setup.seconds.get(name, 1.0), "limit_frac": 0.5, "compiles": 0}
            | {"seconds_per_step": 1.0, "seconds_per_step_quartiles": [1.0, 1.0], "agrees": 1.0, "kv_bytes": 10}
            for name in systems
        }

    monkeypatch.setattr(rounds, "SUITES", dict.fromkeys(cells.SUITES, made))
    monkeypatch.setattr(bench_peers, "installed", lambda: True)
    monkeypatch.setattr(bench_peers, "threads", lambda: 2)

    def run(*flags):
        code = common.run(lambda a: bench.main(a, lambda *_: MACHINE), [*FLAGS, *flags])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    setup.run = run
    return setup


@pytest.fixture
def torch():
    """torch with one thread, which small models like best."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("torch")
        pytest.importorskip("transformers")
    threads = found.get_num_threads()
    found.set_num_threads(1)
    yield found
    found.set_num_threads(threads)


def tiny(config: ModelConfig) -> Model:
    """Random weights that matter: a change of the cache changes the tokens."""
    import jax

    params = Decoder(config).init(jax.random.key(3))
    params = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)
    return Model(Decoder(config), params, None, "tiny", None, (), "tiny")


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
def test_dense_and_both_caches_of_transformers_decode_the_same_tokens(config, torch):
    model, names = tiny(config), ("dense", "dynamic", "static")
    systems = {name: cells.SYSTEMS["decode"][name] for name in names}
    start = CELL.start(6)
    sides = {"dense": bench_ours.Decoding(bench_ours.engine(model, systems["dense"], None), CELL, start)}
    other = bench_peers.model(model)
    sides |= {name: bench_peers.Decoding(other, systems[name], CELL, start) for name in names[1:]}
    for layer in range(config.n_layers):
        qkv = cells.drawn(config, CELL, start, 0, layer)
        for side in sides.values():
            side.fill(layer, *qkv)
    runs = rounds.in_turn(sides, [rounds._advance] * 6, 1)
    found = rounds.agreed({name: {} for name in names}, runs, systems)
    assert [found[name]["agrees"] for name in names] == [1.0, 1.0, 1.0]
    tokens = np.concatenate(runs["dense"].outcomes, 1)
    assert tokens.shape == (2, 18) and len(np.unique(tokens)) > 5, "one token over and over would agree for free"
    assert [len(one.seconds) for one in runs.values()] == [5, 5, 5] and runs["dense"].compiles == 0
    assert runs["dense"].warmup_compiles == 1, "all rounds run one program"
    assert sides["dense"].kv.lengths.tolist() == [64, 64] and sides["dynamic"].cache.get_seq_length() == 64
    per_token = 2 * config.n_layers * config.n_kv_heads * 8 * 4
    assert {side.values()["kv_bytes"] for side in sides.values()} == {2 * 64 * per_token}
    again = bench_ours.Decoding(sides["dense"].engine, CELL, start)
    again._filled = sides["dense"]._filled
    for layer in range(config.n_layers):
        again.fill(layer, *cells.drawn(config, CELL, start, 1, layer))
    assert (again.advance() != tokens[:, :3]).any(), "what the caches hold decides"


def test_swa_attends_what_the_trace_says():
    model, system, start = tiny(OPT), System(cells.OURS, cells.SWA), 40
    cell = dataclasses.replace(CELL, context=46)
    counts, draw = Swa(kv_sparsity=0.8).counts(64), np.random.default_rng(5)
    ranks = np.zeros((2, 1, 7, 64), np.uint8)
    for b, t in np.ndindex(2, 7):
        n = start + t
        recent = int(counts.local[n])
        ranks[b, 0, t, draw.permutation(n - recent)[: counts.top[n]]] = traces.ATTENDED
        ranks[b, 0, t, n - recent : n] = traces.ATTENDED
    trace = traces.Trace(start, (ranks,), np.zeros((1, 2, 6), np.int32))
    side = bench_ours.Decoding(bench_ours.engine(model, system, trace), cell, start)
    for layer in range(OPT.n_layers):
        side.fill(layer, *cells.drawn(OPT, cell, start, 0, layer))
    for fed in (43, 46):
        side.advance()
        for (state,) in side.kv.layers:
            active = np.where(np.asarray(state.ws.bias[:, 0]) == 0, np.asarray(state.ws.pos[:, 0]), -1)
            for b, row in enumerate(active):
                assert tuple(sorted(row[row >= 0].tolist())) == trace.positions(0, b, fed)
    want = np.mean([counts.local[n] + counts.top[n] + 1 for n in range(43, 46)])
    assert limits.attended_tokens([layer.policy for layer in side.engine.layers], range(43, 46)) == want


def test_prompts_and_windows_are_read_as_transformers_reads_them(torch):
    model, draw = tiny(LLAMA), np.random.default_rng(7)
    other, dense = bench_peers.model(model), bench_ours.engine(model, System(cells.OURS), None)
    prompts = draw.integers(0, 61, (2, 37), np.int32)
    ours = bench_ours.Prefilling(dense, prompts)
    theirs = bench_peers.Prefilling(other, cells.SYSTEMS["prefill"]["dynamic"], prompts)
    np.testing.assert_array_equal(ours.advance(), theirs.advance())
    assert ours.values()["bucket_tokens"] == 64 and theirs.values()["kv_bytes"] == 2 * 37 * 2 * 3 * 2 * 8 * 4
    assert theirs.values()["implementation"] == "torch:sdpa"
    ids = [draw.integers(0, 61, n).tolist() for n in (37, 20)]
    mask = bench_ours.Scoring(dense, "prefill_mask")
    forward = bench_peers.Scoring(other, cells.SYSTEMS["perplexity"]["forward"])
    nll = mask.score(ids)
    assert nll == pytest.approx(forward.score(ids), rel=1e-5) and nll > 55 * 3.0
    assert mask.values()["implementation"] == "xla:masked"


class MadeUp:
    """A side that says when it is called, and fails in round `fails`."""

    def __init__(self, name, calls, fails=None):
        self.name, self.calls, self.fails, self.compiles = name, calls, fails, 0

    def advance(self):
        mine = sum(name == self.name for name in self.calls)
        self.calls.append(self.name)
        self.compiles += mine in (0, 2)
        if mine == self.fails:
            raise RuntimeError("no  such\nthing")
        return np.full((1, 1), mine)


def test_sides_take_turns_and_a_peer_that_fails_has_a_reason():
    calls = []
    sides = {"dense": MadeUp("dense", calls), "static": MadeUp("static", calls, fails=1)}
    runs = rounds.in_turn(sides, [rounds._advance] * 4, 1, lambda name: name == "static")
    assert calls == ["dense", "static", "dense", "static", "dense", "dense"]
    dense, static = runs["dense"], runs["static"]
    assert len(dense.seconds) == 3 and (dense.warmup_compiles, dense.compiles) == (1, 1)
    assert [int(x) for x in np.ravel(dense.outcomes)] == [0, 1, 2, 3]
    limit = limits.Limit(0.5, "bytes", 1.0, 1.0)
    assert rounds.timed(static, sides["static"], 2, 8, limit, "seconds_per_step", {}) == {
        "tokens_per_s": None,
        "note": "RuntimeError: no such thing",
    }
    sides["dense"].values = lambda: {"kv_bytes": 3}
    dense.seconds = [8.0, 2.0, 4.0, 3.0, 5.0]
    got = rounds.timed(dense, sides["dense"], 2, 8, limit, "seconds_per_step", {"more": 1})
    assert (got["seconds_per_step"], got["tokens_per_s"], got["limit_frac"]) == (2.0, 2.0, 0.25)
    assert got["seconds_per_step_quartiles"] == [1.5, 2.5] and (got["kv_bytes"], got["more"]) == (3, 1)
    with pytest.raises(RuntimeError):
        rounds.in_turn({"dense": MadeUp("dense", [], fails=0)}, [rounds._advance], 1)


def test_limits_are_bytes_and_flops_counted_by_hand():
    decoder = Decoder(SHAPES["opt_125m"])
    codec = SimpleNamespace(token_bytes=lambda K, H: 2 * K * H + 6, sequence_bytes=lambda K, H: 5)
    D, F, V, L = 768, 3072, 50272, 12
    block = 4 * D * D + 2 * D * F
    weights = L * (block + 4 * D + F + D + 4 * D) + 2 * D + V * D
    assert limits.weight_bytes(decoder) == 4 * weights
    layers = [SimpleNamespace(codec=codec)] * L
    limit = limits.decode(decoder, layers, 8, 100.5, MACHINE)
    assert limit.read_bytes == 4 * weights + 8 * L * ((2 * D + 6) * 100.5 + 5)
    assert limit.flops == 8 * (2 * (L * block + V * D) + 4 * L * D * 100.5)
    assert (limit.of, limit.seconds) == ("bytes", limit.read_bytes / 1e9)
    prompt = limits.prefill(decoder, 2, 1024, MACHINE)
    assert prompt.flops == 2 * (1024 * (2 * L * block + 4 * L * D * 512.5) + 2 * V * D)
    assert (prompt.of, prompt.seconds) == ("flops", prompt.flops / 1e10)


def test_rates_are_those_of_the_best_that_was_tried():
    import time

    slow, fast = lambda: time.sleep(0.02), lambda: None
    peers = lambda read_bytes, side: {"read": {"quick": fast, "slow": slow}, "matmul": {"slow": slow}}
    machine = limits.rates(peers, read_bytes=2**20, side=64)
    assert (machine.read_by, machine.matmul_by) == ("quick", "xla")
    assert machine.read_bytes_per_s > 2**20 / 0.02 and machine.matmul_flops_per_s > 2 * 64**3 / 0.02


def test_cells_are_those_that_models_have(monkeypatch):
    values = bench.config(["bench"])
    found = cells.cells(cells.SUITES, values.model, values)
    sizes = {(c.suite, c.model): [] for c in found}
    for c in found:
        sizes[c.suite, c.model].append((c.batch, c.context, c.steps))
    assert sizes["decode", "random:opt_125m"] == [(1, 128, 5), (8, 1024, 16), (4, 4096, 8)]
    assert sizes["decode", "bundled"] == [(1, 128, 5), (8, 1024, 16)]
    assert sizes["prefill", "random:opt_125m"] == [(1, 1024, 0), (8, 1024, 0)]
    assert sizes["perplexity", "bundled"] == [(4, 1024, 0)] and ("perplexity", "random:opt_125m") not in sizes
    assert cells.shape("random:opt_125m", 4096).max_positions == 4096
    full = cells.cells(["perplexity"], ["bundled"], bench.config(["bench", "--full"]))[0]
    assert (full.tokens, full.batch) == (100_000, 8)
    one, two = (cells.drawn(LLAMA, CELL, 5, 0, layer) for layer in (0, 1))
    assert [x.shape for x in one] == [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)] and (one[1] != two[1]).all()


def test_records_hold_ratios_and_are_found_again(call, tmp_path):
    call.seconds = {"dense": 0.5, "swa": 0.25, "dynamic": 2.0, "static": 1.0}
    flags = [f"--out={tmp_path / 'r.jsonl'}", "--systems=dense,swa,dynamic,static"]
    code, records, err = call.run(*flags)
    assert code == 0 and [r["ratio_to_best_peer"] for r in records] == [2.0, 4.0, 0.5, 1.0]
    assert [r["ratio_to_dense"] for r in records] == [1.0, 2.0, None, None]
    assert records[1]["policy"] == cells.SWA and records[2]["system"] == "transformers dynamic eager"
    assert {(r["threads"], r["dtype"], r["steps"], r["read_bytes_per_s"]) for r in records} == {(2, "float32", 3, 1e9)}
    line = next(text for text in err.splitlines() if "transformers static" in text)
    assert line.split()[:8] == ["transformers", "static", "eager", "dense", "raw", "2.0", "1000.00", "1000.00"]
    code, again, err = call.run(*flags)
    assert again == records and len(call.asked) == 1 and "1 of 1 cells were already in" in err
    call.run(flags[0], "--systems=dense,static")
    assert call.asked[1:] == [(2, 64, ("dense", "static"))], "ratios need the rows that were measured beside"
    call.run(*flags, "--rerun")
    assert len(call.asked) == 3


def test_without_peers_there_are_rows_of_ours_alone(call, monkeypatch):
    monkeypatch.setattr(bench_peers, "installed", lambda: False)
    code, records, err = call.run("--systems=dense,swa,static")
    assert code == 0 and [r["system"] for r in records] == [cells.OURS] * 2
    assert records[0]["ratio_to_best_peer"] is None and records[1]["ratio_to_dense"] == 1.0
    assert "not installed (extra parity)" in err


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--cell=8,64"], "--cell must be BATCHxCONTEXT, such as 8x1024, got '8,64'"),
        (["--cell=2x20"], "a context of 20 tokens has no room for 7 rounds of 3 steps"),
        (["--systems=fast"], "--systems: unknown name 'fast'; known: dense, dense-int8, swa"),
        (["--systems=forward"], "--systems: none of forward is a row of --suite=decode"),
        (["--trace=random:opt_125m"], "--trace: the weights of random:opt_125m are random"),
        (["--suite=perplexity"], "perplexity needs a model that was trained"),
        (["--repeats=4"], "repeats"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(call, flags, why):
    code, records, err = call.run(*flags)
    assert code == common.EXIT_MISTAKE and not records and not call.asked
    assert err.startswith("error: ") and why in err and err.count("\n") == 1


def test_a_model_that_was_trained_is_not_stretched():
    with pytest.raises(common.UserError, match="bundled reads 1024 tokens at most, and 4096 are asked for"):
        cells.cells(["decode"], ["bundled"], bench.config(["bench", "--cell=4x4096"]))


def made_rows(suite, batch, context, **speeds):
    """Records of a cell from tokens per second by row name; dense and peers agree."""
    systems = cells.SYSTEMS[suite]
    found = {
        name: {"tokens_per_s": float(s), "limit_frac": 0.7, "compiles": 0, "agrees": 1.0, "score_s": 100_000 / s}
        | {"kv_bytes": 30 if systems[name].codec == "int8" else 100, "n": 100_000}
        for name, s in ((key.replace("_", "-"), s) for key, s in speeds.items())
    }
    cell = {"suite": suite, "model": "m", "batch": batch, "context_tokens": context}
    return [cell | systems[n].fields() | got for n, got in bench.compared(found, systems).items()]


def verdicts(rows):
    return {(g.kind, g.what): (pytest.approx(g.value), g.met) for g in gates.gates(rows)}


def test_gates_are_met_and_missed_by_their_numbers():
    rows = made_rows("decode", 8, 1024, dense=10, dense_int8=9, swa=16, swa_int8=18, dynamic=9, static_compiled=10)
    got = verdicts(rows)
    assert got["gate", "dense over the best peer"] == (1.0, True) and got["gate", "SWA over dense"] == (1.6, True)
    assert got["goal", "SWA over the best peer"] == (1.6, False)
    assert got["gate", "dense, int8 over raw"] == (0.9, False) and got["gate", "SWA, int8 over raw"] == (1.125, True)
    assert got["gate", "SWA, bytes of int8 over raw"] == (0.3, True)
    assert got["goal", "least share of the limit"] == (0.7, True)
    rows[3]["kv_bytes"], rows[1]["limit_frac"], rows[4]["agrees"], rows[0]["compiles"] = 51, 0.59, 0.99, 1
    got = verdicts(rows)
    assert not got["gate", "SWA, bytes of int8 over raw"][1] and not got["goal", "least share of the limit"][1]
    assert got["gate", "dense agrees with the peers"] == (0.99, False)
    assert got["gate", "programs compiled while timed"] == (1.0, False)

    got = verdicts(made_rows("decode", 1, 128, dense=0.95, swa=3, dynamic=1))
    assert got["gate", "dense over the best peer"][1] and not got["goal", "dense over the best peer"][1]
    assert not any("SWA" in what for _, what in got)
    assert not verdicts(made_rows("decode", 4, 4096, dense=1, swa=1.59))["gate", "SWA over dense"][1]
    assert not verdicts(made_rows("prefill", 8, 1024, dense=1, dynamic=1.01))["gate", "dense over the best peer"][1]
    got = verdicts(made_rows("perplexity", 8, 1024, dense=2000, swa=500, forward=9000))
    assert got["goal", "dense, seconds"] == (50.0, True) and got["goal", "SWA, seconds"] == (200.0, False)


def test_a_trace_reaches_longer_contexts_by_slower_rotations_alone():
    model = tiny(LLAMA)
    longer = models.stretched(model, 200)
    assert longer.decoder.config.max_positions == 200 and models.stretched(model, 96) is model
    assert longer.decoder.rotation.angles == pytest.approx([angle / 3 for angle in model.decoder.rotation.angles])
    with pytest.raises(common.UserError, match="--trace: tiny reads 96 tokens at most, and 200 are asked for"):
        models.stretched(tiny(OPT), 200)


def test_a_whole_cell_is_measured(small, capsys, torch, monkeypatch):
    monkeypatch.setattr(bench_peers, "threads", lambda: 1)
    flags = [*FLAGS, "--systems=dense,dense-int8,dynamic", "--cell=1x94"]
    flags.remove("--cell=2x64")
    assert common.run(lambda a: bench.main(a, lambda *_: MACHINE), flags) == 0
    dense, coded, peer = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (dense["start_tokens"], dense["context_tokens"], dense["attended_tokens"]) == (76, 94, 87.0)
    assert dense["agrees"] == peer["agrees"] == 1.0 and dense["compiles"] == 0 and dense["warmup_compiles"] == 1
    for r in (dense, coded, peer):
        low, high = r["seconds_per_step_quartiles"]
        assert 0 < low <= r["seconds_per_step"] <= high and r["limit_frac"] == r["limit_s"] / r["seconds_per_step"]
    assert dense["limit_bytes"] - coded["limit_bytes"] == 87.0 * 2 * 2 * 24 * 3 - 2 * 16 * 24
    assert coded["kv_bytes"] < 0.5 * dense["kv_bytes"] and peer["kv_bytes"] == 94 * 2 * 2 * 24 * 4
