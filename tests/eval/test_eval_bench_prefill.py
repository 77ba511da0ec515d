"""`python -m eval.bench_prefill`: expectations, turns, records and refusals with runs made up, and one small real run."""

import json
from types import SimpleNamespace

import pytest

from alisa_jax.models import ModelConfig
from eval import bench_prefill
from eval.script import common

ONE, TWO = "gemfilter(layer=1,tokens=8)", "gemfilter(layer=2,tokens=8)"
SHAPE = ModelConfig("llama", 50, 16, 3, 4, 2, 8, 24, 32)


class MadeUp:
    """An engine whose prompts take as many seconds as `seconds` says for their length, one number after another."""

    implementation, implementation_reason = "made up", "asked for"

    def __init__(self, name, calls, seconds):
        self.name, self.calls, self.seconds = name, calls, seconds

    def generate(self, prompts, new):
        self.calls.append((self.name, len(prompts), len(prompts[0]), new))
        times = self.seconds[len(prompts[0])]
        taken = times.pop(0) if len(times) > 1 else times[0]
        return SimpleNamespace(prefill_s=taken, wall_s=2 * taken, compiles=0)


@pytest.fixture
def bench(capsys, monkeypatch):
    """`call(*flags)` -> (exit code, records, stderr); `times[policy][length]` are the seconds of its runs."""
    monkeypatch.setattr(bench_prefill.shapes, "config", lambda name: SHAPE)
    setup = SimpleNamespace(calls=[], times={}, made=[])

    def make(policy):
        setup.made.append(policy)
        return MadeUp(policy, setup.calls, setup.times.get(policy, {n: [1.0] for n in (8, 30, 60)}))

    def call(*flags):
        argv = ["bench_prefill", "--tokens=8", "--lengths=30", "--layers=1", "--json", *flags]
        code = common.run(lambda a: bench_prefill.main(a, make), argv)
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    setup.call = call
    return setup


def test_medians_stand_beside_what_layers_and_the_short_prompt_let_expect(bench):
    bench.times = {
        "dense": {30: [99.0, 6.0, 5.0, 9.0, 6.5, 6.0], 8: [99.0, 0.5]},
        ONE: {30: [99.0, 4.0, 3.0, 2.0, 5.0, 7.0]},
        "local(tokens=4)": {30: [99.0, 6.0, 8.0]},
    }
    code, (dense, one, local), err = bench.call("--also=local(tokens=4)")
    assert code == 0 and [r["policy"] for r in (dense, one, local)] == ["dense", ONE, "local(tokens=4)"]
    assert (dense["prefill_s"], dense["expected_s"], dense["speedup"]) == (6.0, 6.0, 1.0)
    assert (one["prefill_s"], one["dense_prefill_s"], one["short_prefill_s"], one["speedup"]) == (4.0, 6.0, 0.5, 1.5)
    assert one["prefill_s_quartiles"] == [3.0, 5.0], "the first run of each is no part of it"
    assert one["expected_s"] == pytest.approx(2 / 3 * 6.0 + 0.5) and one["least_s"] == pytest.approx(1 / 3 * 6.0 + 0.5)
    assert (one["reads_layer"], one["n_layers"], one["bucket_tokens"], one["short_bucket_tokens"]) == (1, 3, 32, 32)
    assert (local["prefill_s"], local["expected_s"]) == (8.0, 6.0) and "reads_layer" not in local
    assert {r["basis"] for r in (dense, one, local)} == {"measured"} and one["wall_s"] == 2 * (99 + 21)
    assert (one["implementation"], one["repeats"], one["compiles"], one["prompt_tokens"]) == ("made up", 5, 0, 30)
    line = next(text for text in err.splitlines() if ONE in text)
    assert line.split() == ["30", ONE, "4.000", "3.000", "-", "5.000", "4.500", "2.500", "1.50x", "1.33x"]


def test_all_take_turns_and_the_short_prompt_is_read_by_dense(bench):
    code, records, _ = bench.call(
        "--layers=2", "--lengths=60", "--batch=3", "--repeats=6", "--also=h2o(kv_sparsity=0.5)"
    )
    assert code == 0 and bench.made == ["dense", ONE, TWO, "h2o(kv_sparsity=0.5)"]
    turn = lambda n: [*((name, 3, n, 1) for name in bench.made), ("dense", 3, 8, 1)]
    assert bench.calls == turn(30) * 7 + turn(60) * 7
    assert [(r["prompt_tokens"], r["policy"]) for r in records] == [(n, name) for n in (30, 60) for name in bench.made]


def test_a_length_that_is_on_file_is_not_run_again(bench, tmp_path):
    out = f"--out={tmp_path / 'r.jsonl'}"
    _, first, _ = bench.call(out)
    runs = len(bench.calls)
    code, again, err = bench.call(out)
    assert code == 0 and again == first and len(bench.calls) == runs and "1 of 1 lengths were in" in err
    bench.call(out, "--lengths=60")
    assert {n for _, _, n, _ in bench.calls[runs:]} == {60, 8}, "only the new length"
    runs = len(bench.calls)
    bench.call(out, "--layers=2")  # one more policy: its times belong beside those of the others
    assert {name for name, *_ in bench.calls[runs:]} == {"dense", ONE, TWO, "snapkv(capacity=64)"}
    runs = len(bench.calls)
    bench.call(out, "--rerun")
    assert len(bench.calls) == runs + 6 * 4


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--lengths=8"], "--lengths must be above --tokens, 8, for a choice to be made, got 8"),
        (["--layers=3"], r"gemfilter(layer=3,tokens=8): layer must be in 0..2, the layers of the model; got 3"),
        (["--model=bundled"], "--model must be random:NAME, as only its shape matters here, got 'bundled'"),
        (["--also=gemfilter(tokens=4)"], "--also is for policies that read the whole prompt"),
        (["--also=nonsense"], "unknown name 'nonsense'"),
        (["--repeats=4"], "repeats"),
        (["--text=a.txt"], "text"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(bench, flags, why):
    code, records, err = bench.call(*flags)
    assert code == common.EXIT_MISTAKE and not records and not bench.calls
    assert err.startswith("error: ") and why in err and err.count("\n") == 1


def test_layers_that_are_not_given_are_gemfilters_own(bench, capsys):
    make = lambda policy: MadeUp(policy, [], {30: [1.0], 8: [1.0]})
    argv = ["bench_prefill", "--tokens=8", "--lengths=30", "--also=dense"]
    assert common.run(lambda a: bench_prefill.main(a, make), argv) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if "gemfilter" in text)
    assert line.split()[1] == "gemfilter(tokens=8)" and line.split()[-1] == "0.60x"  # layer 1 of 3: 1 / (2 / 3 + 1)


@pytest.mark.slow
def test_engines_of_random_weights_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(bench_prefill.shapes, "config", lambda name: SHAPE)
    argv = ["bench_prefill", "--tokens=8", "--lengths=40", "--layers=1", "--also=dense", "--json"]
    assert common.run(bench_prefill.main, argv) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["policy"] for r in records] == ["dense", ONE]
    for r in records:
        low, high = r["prefill_s_quartiles"]
        assert 0 < low <= r["prefill_s"] <= high and r["compiles"] == 0
        assert r["implementation"] == "xla:working_set" and r["dense_prefill_s"] == records[0]["prefill_s"]
    assert records[1]["bucket_tokens"] == 64 and records[1]["short_bucket_tokens"] == 32
