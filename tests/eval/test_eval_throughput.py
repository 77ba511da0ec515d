"""`python -m eval.throughput`: records, refusals, resuming, recorded selections, modelled runs beside measured ones."""

import dataclasses
import hashlib
import inspect
import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alisa_jax
from alisa_jax import policies
from alisa_jax.engine.generate import Generated
from alisa_jax.engine.report import PlacementReport
from alisa_jax.models import Decoder, checkpoint, hub
from alisa_jax.placement import mover
from alisa_jax.placement.modelled import belady
from eval import throughput
from eval.modelled import machines, shapes
from eval.script import common, inputs
from eval.script.common import UserError
from eval.speed import bounds, systems, timing, traces
from eval.text import windows

pytestmark = pytest.mark.slow

SWA = "swa(kv_sparsity=0.8)"


# The command with runs that are made up.


def made_run(tokens, **changes) -> Generated:
    """A run that took 1 + 3 seconds."""
    names = lambda kind: {field.name for field in dataclasses.fields(kind)}
    moved = {name: changes.pop(name) for name in names(PlacementReport) & changes.keys()}
    counts = dict.fromkeys(names(PlacementReport), 0) | {"notes": (), "host_reads": ""}
    given = dict(tokens=tokens, prefill_s=1.0, decode_s=3.0, placement=PlacementReport(**counts | moved))
    return Generated(**dict.fromkeys(names(Generated), 0) | given | changes)


class MadeUp:
    """A system in place of an `Engine`; `runs` says what its runs do, one after another, the last of them for good."""

    def __init__(self, name: str, calls: list, runs: list):
        self.name, self.calls, self.runs = name, calls, runs
        self.placement, self.implementation, self.implementation_reason = None, "made up", "asked for"

    def generate(self, prompts, new_tokens, eos_ids, progress=False):
        assert eos_ids == ()  # every token is made
        self.calls.append((self.name, prompts))
        run = self.runs.pop(0) if len(self.runs) > 1 else self.runs[0]
        if isinstance(run, BaseException):
            raise run
        return run if run else made_run([[7] * new_tokens for _ in prompts])


@pytest.fixture
def bench(capsys):
    """`call(*flags)` -> (exit code, records, stderr) for opt_125m; `runs[system]` are its runs."""
    setup = SimpleNamespace(calls=[], loads=[], built=[], runs={})

    def load(name, dtype, seed=0):
        setup.loads.append((name, dtype, seed))
        return SimpleNamespace(tokenizer=None, bos_id=None, name=name)

    def build(model, policy, codec, controller, device_kv_bytes, host_kv_bytes):
        name = f"{controller} | {policy if isinstance(policy, str) else type(policy).__name__.lower()} | {codec}"
        setup.built.append((name, device_kv_bytes, host_kv_bytes))
        return MadeUp(name, setup.calls, setup.runs.get(name, [None]))

    def call(*flags, shape=("--model=random:opt_125m", "--batch=2", "--prompt_tokens=40", "--new_tokens=8")):
        argv = ["throughput", *shape, *flags, "--json"]
        code = common.run(lambda a: throughput.main(a, load, build), argv)
        out, setup.err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()]

    setup.call = call
    return setup


TWO = ("--system=resident", "--system=waves | dense()")


def test_a_record_has_medians_of_the_timed_runs_and_counts_compiles_apart(bench):
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8], [9] * 8]
    seconds = ((90.0, 5), (1.0, 0), (7.0, 0), (3.0, 0))
    bench.runs["resident | dense | raw"] = [made_run(tokens, decode_s=s, compiles=c, load_bytes=64) for s, c in seconds]
    code, (record,) = bench.call(TWO[0], "--seed=3", "--device_kv_bytes=2x")
    assert code == 0 and bench.loads == [("random:opt_125m", "float32", 3)]
    assert (record["decode_s"], record["decode_s_min"], record["decode_s_max"]) == (3.0, 1.0, 7.0)
    rates = [16 / (1.0 + s) for s in (3.0, 1.0, 7.0)]
    assert (record["tokens_per_s"], record["tokens_per_s_max"], record["tokens_per_s_min"]) == pytest.approx(rates)
    assert record["tokens_per_s_formula"] == "batch * new_tokens / (prefill_s + decode_s)"
    assert (record["warmup"], record["repeats"]) == (1, 3)
    assert (record["warmup_compiles"], record["compiles"], record["note"]) == (5, 0, None)
    assert record["tokens_sha256"] == hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()
    expected = {
        "script": "eval.throughput",
        "model": "random:opt_125m",
        "placement": "resident",
        "policy": "dense",
        "codec": "raw",
        "dtype": "float32",
        "prompts": "drawn ids",
        "basis": "measured",
        "load_bytes": 64,
        "device_kv_bytes": 2 * 2 * 12 * 768 * 4 * 2 * 47,  # K and V, layers, width, float32, batch, 40 + 8 - 1 tokens
        "host_kv_bytes": "inf",
        "device_kind": jax.devices()[0].device_kind,
    }
    assert {key: record[key] for key in expected} == expected


def test_systems_take_turns_on_the_same_prompts(bench):
    code, records = bench.call(*TWO, "--repeats=2")
    assert code == 0 and [r["placement"] for r in records] == ["resident", "waves"]
    assert [name for name, _ in bench.calls] == ["resident | dense | raw", "waves | dense | raw"] * 3
    assert len({json.dumps(prompts) for _, prompts in bench.calls}) == 1


def test_a_note_tells_that_timed_runs_compiled_or_disagree(bench):
    bench.runs["resident | dense | raw"] = [
        made_run([[1], [1]]),
        made_run([[1], [2]], compiles=2, notes=("clamped",)),
        made_run([[1], [1]]),
    ]
    _, (record,) = bench.call(TWO[0], "--repeats=2")
    assert record["note"] == "clamped; the tokens differ between its runs; the timed runs compiled 2 programs"
    assert record["tokens_sha256"] == timing.digest([[1], [2]]) and record["compiles"] == 2


def test_drawn_prompts_follow_the_seed_and_ragged_ones_are_half_as_long_at_least(bench):
    shape = ("--model=random:opt_125m", "--batch=64", "--prompt_tokens=9", "--new_tokens=8")
    drawn = {}
    for flags in (("--ragged",), ("--ragged", "--seed=1"), ()):
        assert bench.call(TWO[0], "--repeats=1", *flags, shape=shape)[0] == 0
        drawn[flags] = bench.calls[-1][1]
    lengths = {flags: [len(p) for p in prompts] for flags, prompts in drawn.items()}
    assert set(lengths["--ragged",]) == set(range(5, 10)) and set(lengths[()]) == {9}
    assert lengths["--ragged",] != lengths["--ragged", "--seed=1"]
    ids = np.concatenate(drawn["--ragged",])
    assert 0 <= ids.min() < 500 and 50272 - 500 < ids.max() < 50272
    bench.call(TWO[0], "--repeats=1", "--ragged", shape=shape)
    assert bench.calls[-1][1] == drawn["--ragged",]


def test_a_system_that_the_budgets_refuse_is_a_row_and_runs_nothing(bench):
    code, records = bench.call(*TWO, "--device_kv_bytes=0.9x")
    assert code == 0 and {name for name, *_ in bench.built} == {"waves | dense | raw"}
    refused, ran = records
    assert refused["tokens_per_s"] == "OOM" and ran["tokens_per_s"] == 4.0
    assert refused["note"].startswith("resident needs device_kv_bytes of at least") and refused["wall_s"] is None
    row = next(line for line in bench.err.splitlines() if line.startswith("resident"))
    assert row.split()[5:] == ["OOM", *["-"] * 12]
    assert f"resident | dense | raw: {refused['note']}" in bench.err
    least = refused["note"].split("at least ")[1].split()[0]
    assert bench.call(*TWO, f"--device_kv_bytes={least}")[1][0]["tokens_per_s"] == 4.0


def test_no_system_that_fits_is_a_mistake(bench, tmp_path):
    code, records = bench.call(*TWO, "--device_kv_bytes=1KB", f"--out={tmp_path / 'r.jsonl'}")
    assert code == common.EXIT_MISTAKE and not records and not bench.loads and not list(tmp_path.iterdir())
    assert "every system: resident | dense | raw: resident needs" in bench.err and "; waves | dense | raw:" in bench.err


def test_a_device_that_runs_out_of_memory_is_told_too(bench):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 bytes")
    bench.runs["resident | dense | raw"] = [made_run([[1]]), full]
    code, (first, second) = bench.call(*TWO)
    assert code == 0 and second["tokens_per_s"] == 4.0
    assert first["tokens_per_s"] == "OOM" and "Out of memory allocating 3 bytes" in first["note"]
    assert [name.split()[0] for name, _ in bench.calls] == ["resident", "waves"] * 2 + ["waves"] * 2
    bench.runs["waves | dense | raw"] = [jax.errors.JaxRuntimeError("INTERNAL: something else")]
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        bench.call(*TWO)


def test_finished_systems_are_not_run_again(bench, tmp_path):
    out = f"--out={tmp_path / 'r.jsonl'}"
    once = bench.call(TWO[0], out)[1]
    ran = len(bench.calls)
    code, again = bench.call(*TWO, out)
    assert code == 0 and again[0] == once[0] and "1 of 2 systems were already in" in bench.err
    assert {name for name, _ in bench.calls[ran:]} == {"waves | dense | raw"}
    loads = len(bench.loads)
    assert bench.call(*TWO, out)[1] == again and len(bench.loads) == loads
    for change in ("--rerun", "--repeats=2", "--device_kv_bytes=2GB", "--seed=9", "--ragged", "--dtype=bfloat16"):
        before = len(bench.calls)
        assert bench.call(TWO[0], out, change)[0] == 0
        assert len(bench.calls) > before, change


def test_a_record_of_another_device_does_not_count_as_finished(bench, tmp_path):
    path = tmp_path / "r.jsonl"
    (record,) = bench.call(TWO[0], f"--out={path}")[1]
    path.write_text(json.dumps(record | {"device_kind": "another"}) + "\n")
    ran = len(bench.calls)
    bench.call(TWO[0], f"--out={path}")
    assert len(bench.calls) == ran + 4 and len(path.read_text().splitlines()) == 2


def test_an_interrupted_run_leaves_only_whole_records(bench, tmp_path):
    path = tmp_path / "r.jsonl"
    bench.runs["waves | dense | raw"] = [None, None, None, KeyboardInterrupt()]
    assert bench.call(*TWO, f"--out={path}")[0] == common.EXIT_INTERRUPTED
    assert [json.loads(line)["placement"] for line in path.read_text().splitlines()] == ["resident"]
    bench.runs["waves | dense | raw"] = [None]
    ran = len(bench.calls)
    code, records = bench.call(*TWO, f"--out={path}")
    assert code == 0 and len(records) == 2 and {name for name, _ in bench.calls[ran:]} == {"waves | dense | raw"}


def test_the_table_puts_every_system_beside_the_first_that_ran(bench):
    bench.runs["waves | dense | raw"] = [made_run([[1] * 8] * 2, decode_s=7.0, p1=3, p2=8, load_bytes=2048)]
    bench.call("--system=accelerate", *TWO, "--host_kv_bytes=10KB")
    rows = {line.split()[0]: line for line in bench.err.splitlines() if " | raw" in line and ":" not in line}
    assert rows["accelerate"].split()[5] == "OOM" and rows["resident"].split()[5:7] == ["4", "1.00x"]
    assert rows["waves"].split()[5:9] == ["2", "0.50x", "1.000", "7.000"]
    assert "2.00 KiB" in rows["waves"] and rows["waves"].split()[-2:] == ["3", "-"]
    assert "random:opt_125m in float32, 2 prompts of 40 tokens, 8 new ones" in bench.err


def test_the_systems_of_the_paper_run_when_none_is_named(bench):
    shape = ("--model=random:opt_125m", "--batch=2", "--prompt_tokens=64", "--new_tokens=8")
    code, records = bench.call("--repeats=1", shape=shape)
    assert code == 0
    assert [(r["placement"], r["policy"], r["codec"]) for r in records] == [
        ("resident", "dense", "raw"),
        ("waves", "dense", "raw"),
        ("accelerate", "dense", "raw"),
        ("flexgen", "dense", "raw"),
        ("flexgen", SWA, "raw"),
        ("alisa(traffic=paper)", SWA, "raw"),
        ("alisa", SWA, "raw"),
        ("alisa", SWA, "int8"),
    ]


def test_a_figure_is_drawn(bench, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "rates.png"
    assert bench.call(*TWO, "--device_kv_bytes=0.9x", f"--plot={path}")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG") and f"figure: {path}" in bench.err


MISTAKES = [
    ("--attention_impl=pallas", "--attention_impl: impl=pallas cannot run: it needs a GPU, and the device is cpu"),
    ("--attention_impl=xla --simulate --hardware=t4_16gb", "--simulate runs nothing"),
    ("--system=paged | dense", "unknown name 'paged'"),
    ("--system=resident | swo(kv_sparsity=0.8)", "unknown name 'swo'"),
    ("--system=resident | dense | int3", "unknown name 'int3'"),
    ("--system=resident | dense | raw | x", "is not 'controller | policy | codec'"),
    ("--system=resident || raw", "is not 'controller | policy | codec'"),
    ("--system=alisa(lag=2)", "lag must be 0 or 1"),
    ("--system=flexgen | local(tokens=8)", "the policy evicts what it does not keep"),
    ("--system=alisa | swa(kv_sparsity=0.8,refresh_every=4)", "give recompute=false"),
    ("--system=resident | swa(kv_sparsity=0.8,dense_layers=13)", "dense_layers must be at most 12"),
    ("--system=resident | dense | int8", "and the shortest prompt has 40: give longer prompts"),
    ("--system=resident | swa(kv_sparsity=2)", "kv_sparsity must be in [0, 1)"),
    ("--device_kv_bytes=2gb", "--device_kv_bytes: '2gb' is no size"),
    ("--host_kv_bytes=much", "--host_kv_bytes: 'much' is no size"),
    ("--model=random:gpt9", "'random:gpt9' is no folder"),
    ("--model=opt_125m", "no model at 'opt_125m'"),
    ("--new_tokens=2009", "the model has 2048 positions, and 40 + 2009 are asked for"),
    ("--batch=0", "--batch"),
    ("--prompt_tokens=0", "--prompt_tokens"),
    ("--new_tokens=0", "--new_tokens"),
    ("--repeats=0", "--repeats"),
    ("--dtype=int8", "should be one of"),
    ("--seed=-1", "--seed must be in 0..4294967295, got -1"),
    ("--hardware=h100_80gb", "is for modelled runs: give --simulate too"),
    ("--simulate", "name it with --hardware"),
    ("--simulate --hardware=a100", "'a100' is unknown"),
    ("--simulate --hardware=t4_16gb --system=waves|h2o(kv_sparsity=0.8)", "policies that go by positions alone"),
    ("--simulate --hardware=t4_16gb --system=waves|snapkv", "policies that go by positions alone"),
    ("--simulate --hardware=t4_16gb --model=random:opt_30b", "weights and activations need"),
    ("--trace=bundled", "no system selects by swa"),
    (f"--trace=random:opt_125m --system=alisa|{SWA}", "the weights of random:opt_125m are random"),
    (f"--trace=absent --system=alisa|{SWA}", "--trace: 'absent' is no folder"),
    (f"--trace=bundled --prompt_tokens=1020 --system=alisa|{SWA}", "bundled reads 1024 tokens at most, and 1028"),
    ("--trace=bundled --system=resident|swa(kv_sparsity=0.8,dense_layers=4)", "all 4 layers of bundled attend densely"),
    ("--plot=absent/rates.png", "--plot: there is no folder 'absent'"),
    ("--out=/dev/null/r.jsonl", "--out: cannot write results"),
    ("--sparsity=0.8", "Unknown command line flag 'sparsity'"),
    ("resident", "unexpected argument 'resident'"),
]


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_before_any_weight_is_read(bench, flags, sentence):
    flags = flags.replace(" | ", "|").replace(" || ", "||").split()
    given = [*flags] if any(f.startswith("--system") for f in flags) else [*flags, TWO[0]]
    code, records = bench.call(*given)
    assert code == common.EXIT_MISTAKE and not records and sentence in bench.err
    assert len(bench.err.strip().splitlines()) == 1 and "Traceback" not in bench.err
    assert not bench.loads and not bench.built


def test_a_machine_without_a_pinned_host_refuses_controllers_that_offload(bench, monkeypatch):
    def none():
        raise RuntimeError("cpu has no pinned_host memory, only device: use the controller resident")

    monkeypatch.setattr(mover, "self_test", none)
    assert bench.call(*TWO)[0] == 0
    assert bench.call(*TWO, "--system=alisa")[0] == common.EXIT_MISTAKE
    assert "use the controller resident" in bench.err and len(bench.loads) == 1


def test_a_folder_that_states_no_type_asks_for_one_where_it_counts(bench, tmp_path):
    config = dict(model_type="opt", vocab_size=50272, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    config |= dict(ffn_dim=3072, max_position_embeddings=2048, word_embed_proj_dim=768, do_layer_norm_before=True)
    config |= dict(activation_function="relu", enable_bias=True, layer_norm_elementwise_affine=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (record,) = bench.call(f"--model={tmp_path}", TWO[0])[1]
    assert record["dtype"] == "float32"  # on a CPU
    with pytest.raises(UserError, match="states the type None; give --dtype, one of float32, bfloat16, float16"):
        inputs.resolved(str(tmp_path), "auto", "gpu")
    (record,) = bench.call(f"--model={tmp_path}", TWO[0], "--dtype=float16", "--device_kv_bytes=2x")[1]
    assert record["dtype"] == "float16" and record["device_kv_bytes"] == 2 * 2 * 12 * 768 * 2 * 2 * 47


def test_help_shows_the_flags_and_commands_to_paste(capsys):
    assert common.run(throughput.main, ["throughput", "--help"]) == 0
    out = capsys.readouterr().out
    assert "python -m eval.throughput --system='flexgen | dense'" in out and "--trace" in out


# Modelled runs.

PRICED = ("--simulate", "--hardware=v100_16gb", "--device_kv_bytes=0.8x")
LONG = ("--model=random:opt_125m", "--batch=3", "--prompt_tokens=64", "--new_tokens=65")


def test_modelled_records_say_so_and_make_no_weights(bench):
    code, records = bench.call(*PRICED, shape=LONG)
    assert code == 0 and not bench.loads and not bench.built
    by = {(r["placement"], r["policy"], r["codec"]): r for r in records}
    assert {r["basis"] for r in records} == {"modelled"} and {r["hardware"] for r in records} == {"v100_16gb"}
    assert by["resident", "dense", "raw"]["tokens_per_s"] == "OOM"
    ran = [r for r in records if r["tokens_per_s"] != "OOM"]
    assert len(ran) > 5
    for r in ran:
        assert r["tokens_per_s"] == pytest.approx(3 * 65 / (r["prefill_s"] + r["decode_s"]))
        assert r["device_peak_bytes"] <= r["device_kv_bytes"] and r["selection_us"] == 50.0
    assert by["waves", "dense", "raw"]["effective_batch"] == 2 and by["waves", "dense", "raw"]["groups"] == 2
    delta, paper = by["alisa", SWA, "raw"], by["alisa(traffic=paper)", SWA, "raw"]
    assert 0 < delta["load_bytes"] < paper["load_bytes"] < by["accelerate", "dense", "raw"]["load_bytes"]
    assert "modelled on v100_16gb" in bench.err


def test_without_budgets_a_modelled_run_has_what_weights_and_activations_leave(bench):
    (record,) = bench.call("--simulate", "--hardware=t4_16gb", TWO[0])[1]
    machine = machines.hardware("t4_16gb")
    weights = 4 * Decoder(shapes.config("opt_125m")).count_params()
    activations = 2 * 40 * (6 * 768 + 2 * 3072) * 4 + 4 * 2 * 50272
    assert record["device_kv_bytes"] == machine.device_bytes - weights - activations
    assert record["host_kv_bytes"] == machine.host_bytes


def test_a_policy_without_statistics_is_priced_by_what_it_selects(bench):
    flags = ("--simulate", "--hardware=v100_16gb", "--system=resident | local(tokens=9)", "--system=resident | dense")
    few, all_ = bench.call(*flags, shape=LONG)[1]
    selecting = 64 * 12 * 50e-6  # steps, layers
    assert selecting < few["compute_s"] < all_["compute_s"] + selecting
    wanted = traces.computed(policies.parse("local(tokens=9)"), 40)
    assert wanted(1, (40, 5)) == {(-1, 0): tuple(range(31, 40)), (-1, 1): tuple(range(5))}


def test_a_price_says_that_it_does_not_know_steps_that_attend_everything(bench):
    system = "--system=waves | swa(kv_sparsity=0.8,refresh_every=8)"
    (record,) = bench.call("--simulate", "--hardware=v100_16gb", system, shape=LONG)[1]
    assert record["note"] == "steps that attend everything are priced as all others"


# Two trained layers, the first ones of the bundled model, with its tokenizer.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, text, loaded model)."""
    whole = alisa_jax.load("bundled")
    folder = tmp_path_factory.mktemp("models") / "two_layers"
    text = folder.parent / "textwrap.txt"
    text.write_text(inspect.getsource(textwrap), encoding="utf-8")
    config = dataclasses.replace(whole.decoder.config, n_layers=2)
    params = whole.params | {"blocks": whole.params["blocks"][:2]}
    checkpoint.save(config, params, folder, tokenizer=whole.tokenizer, bos_id=whole.bos_id, eos_ids=whole.eos_ids)
    return folder, text, alisa_jax.load(folder)


RESTLESS = "swa(kv_sparsity=0.8,window=1,spare_slots=1)"
POLICY = policies.parse(RESTLESS)
PROMPT, LAST = 40, 100


@pytest.fixture(scope="module")
def trace(trained):
    """(sequences, what the trained layers attend in them after a prompt)."""
    _, text, model = trained
    sequences = traces.cut(windows.read(str(text)), model, LAST, 2)
    return sequences, traces.record(model, POLICY, sequences, PROMPT)


SHAPE = ("--batch=2", "--prompt_tokens=48", "--new_tokens=40", "--repeats=1")
FLEXGEN = "flexgen(cache_device_frac=0.5)"
DENSE = ("resident", FLEXGEN)


@pytest.fixture(scope="module")
def runs(trained, trace):
    """{system: record} of real runs without budgets and with one, swa under a trace, and of modelled runs."""
    folder, text, _ = trained
    flags = ["throughput", f"--model={folder}", f"--text={text}", *SHAPE]
    traced, found = f"--trace={folder}", []
    for names, more in (
        (DENSE, []),
        ((f"resident | {RESTLESS}",), [traced]),
        ((f"resident | {RESTLESS}", f"alisa | {RESTLESS}"), [traced, "--device_kv_bytes=1.2x"]),
        (DENSE, ["--simulate", "--hardware=h100_80gb"]),
    ):
        path = folder.parent / f"{len(found)}.jsonl"
        argv = [*flags, *(f"--system={name}" for name in names), *more, f"--out={path}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(traces, "record", lambda *given: trace[1])
            assert common.run(throughput.main, argv) == 0
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found.append({r["placement"]: r for r in records})
    return found


def test_controllers_give_the_same_tokens_and_compile_before_they_are_timed(runs):
    dense, sparse, tight, _ = runs
    for mine, whole in ((dense[FLEXGEN], dense["resident"]), (tight["alisa"], sparse["resident"])):
        assert mine["tokens_sha256"] == whole["tokens_sha256"], mine["placement"]
        assert mine["store_bytes"] > 0 == whole["store_bytes"] and mine["loaded_rows"] > 0 == whole["loaded_rows"]
        assert mine["host_peak_bytes"] > 0 and mine["host_reads"] in ("rows", "pages") and whole["host_reads"] == ""
        assert mine["p1"] < 40 == whole["p1"]
        assert whole["memory_kinds"] is None and tuple(mine["memory_kinds"]) == mover.self_test().kinds
    assert dense["resident"]["tokens_sha256"] != sparse["resident"]["tokens_sha256"]
    assert tight["alisa"]["device_peak_bytes"] <= tight["alisa"]["device_kv_bytes"]
    assert tight["resident"]["tokens_per_s"] == "OOM"
    for r in (*dense.values(), *sparse.values(), tight["alisa"]):
        assert r["compiles"] == 0 < r["warmup_compiles"] and r["note"] is None
        assert r["tokens_per_s"] == pytest.approx(2 * 40 / (r["prefill_s"] + r["decode_s"]))
        assert r["implementation"] == "xla:working_set"
        assert r["prompts"] == "text" and r["data"] == "textwrap.txt" and len(r["model_sha256"]) == 64


def test_modelled_bytes_of_dense_runs_are_those_that_travelled(runs):
    measured, *_, modelled = runs
    for name in DENSE:
        mine, other = measured[name], modelled[name]
        for field in ("load_bytes", "store_bytes", "loaded_rows", "host_peak_bytes", "p1", "p2", "effective_batch"):
            assert mine[field] == other[field], (name, field)
        assert mine["device_peak_bytes"] <= other["device_peak_bytes"]


def test_a_traced_run_stands_beside_what_the_oracle_loads(runs):
    dense, sparse, tight, _ = runs
    assert sparse["resident"]["belady_rows"] == 0 and sparse["resident"]["rows_over_belady"] is None
    assert "Belady" in throughput.report(list(tight.values()))
    assert "Belady" not in throughput.report(list(dense.values()))
    assert "belady_rows" not in tight["resident"] | dense["resident"]
    brought = tight["alisa"]["loaded_rows"] + tight["alisa"]["recomputed_rows"]
    assert 0 <= tight["alisa"]["belady_rows"] <= brought > 0


def test_prompts_are_cut_from_the_text(trained, bench):
    folder, text, model = trained
    shape = (f"--model={folder}", f"--text={text}", "--batch=3", "--prompt_tokens=30", "--new_tokens=4", "--ragged")
    loader = lambda name, dtype, seed: model
    argv = ["throughput", *shape, TWO[0], "--repeats=1"]
    build = lambda *given: MadeUp("x", bench.calls, [None])
    assert common.run(lambda a: throughput.main(a, loader, build), argv) == 0
    prompts = bench.calls[0][1]
    assert len({tuple(p) for p in prompts}) == 3 and all(15 <= len(p) <= 30 for p in prompts)
    for prompt in prompts:
        assert prompt[0] == model.bos_id and model.decode(prompt) in text.read_text()
    many = [flag for flag in argv if not flag.startswith("--batch")] + ["--batch=400"]
    assert common.run(lambda a: throughput.main(a, loader, build), many) == common.EXIT_MISTAKE


# Recorded selections.


def attended(trace) -> np.ndarray:
    """[l, B, T, S] bool."""
    return np.stack(trace.ranks)[:, :, 0] == traces.ATTENDED


def test_a_trace_holds_the_last_tokens_and_as_many_others_as_the_budget(trace):
    _, trace = trace
    sets, entered = attended(trace), 0
    assert sets.shape[:3] == (2, 2, LAST - PROMPT)
    for t, n in enumerate(range(PROMPT, LAST)):
        half = int(0.1 * n + 0.5 + 1e-9)
        assert sets[:, :, t, n - half : n].all() and not sets[:, :, t, n:].any()
        assert (sets[:, :, t, : n - half].sum(-1) == half).all()
        if t:
            new = sets[:, :, t] & ~sets[:, :, t - 1]
            entered += new.sum() - 4  # the newest token always enters
    assert trace.entering_tokens() == pytest.approx(entered / (LAST - PROMPT - 1) / 4) and entered > 0


def test_ranks_order_the_tokens_that_are_not_attended_by_their_sums():
    rng = np.random.default_rng(0)
    S, M = 300, 20
    for n in (300, 120, 17):
        sums = rng.integers(0, 40, (3, 2, S)).astype(np.float32)
        pos = np.stack([rng.permutation(S)[:M] for _ in range(6)]).reshape(3, 2, M).astype(np.int32)
        pos[..., -3:] = -1
        ranks = traces._ranks(sums, pos, n)
        assert ranks.dtype == np.uint8
        for b, p in np.ndindex(3, 2):
            mine = set(pos[b, p].tolist())
            others = [q for q in range(n) if q not in mine]
            for q in range(S):
                better = sum(sums[b, p, o] > sums[b, p, q] for o in others)
                assert ranks[b, p, q] == (0 if q >= n else 255 if q in mine else max(0, 254 - better))


def test_a_trace_gives_the_sets_of_the_heads_that_replay_it():
    ranks = np.random.default_rng(0).choice([0, 255], (2, 4, 5, 16)).astype(np.uint8)
    trace = traces.Trace(7, (ranks,), np.zeros((1, 2, 5), np.int32))
    every = (0, 1, 2, 3)
    for heads, used in ((1, (0,)), (2, (0, 2)), (3, (0, 1, 2)), (4, every), (8, every), (None, every)):
        for n, found in zip((8, 9, 10), trace.sets(0, 3, 8, 3, heads), strict=True):
            expected = [p for p in range(n) if any(ranks[1, head, n - 7, p] for head in used)]
            assert found.tolist() == expected == list(trace.positions(0, 3, n, heads))


def test_a_modelled_run_reads_the_heads_that_its_model_replays():
    ranks = np.random.default_rng(0).choice([0, 255], (1, 4, 9, 32)).astype(np.uint8)
    loads = np.zeros((1, 1, 9), np.int32)
    many, two = traces.Trace(20, (ranks,), loads), traces.Trace(20, (ranks[:, ::2],), loads)
    config = dataclasses.replace(shapes.config("opt_125m"), n_layers=1, n_heads=2, n_kv_heads=2, head_dim=384)
    work = systems.Work(config, "float32", (20,), 9)
    system = systems.parse("accelerate | swa(tokens=6,shared_heads=false)")
    cost = throughput._cost(machines.hardware("h100_80gb"), system, work)
    assert timing.price(system, work, cost, many) == timing.price(system, work, cost, two)
    assert bounds.least_rows(system, work, many) == bounds.least_rows(system, work, two)


@pytest.mark.parametrize(
    "controller, whole", [("accelerate", 0), ("flexgen(cache_device_frac=0.4)", 1), ("waves", 3), ("resident", 3)]
)
def test_the_oracle_reads_layers_and_sequences_as_they_are_replayed(controller, whole):
    rng, first, prompts = np.random.default_rng(0), 20, (20, 25, 30)
    ranks = np.zeros((2, 2, 1, 30, 64), np.uint8)  # layers, sequences
    for layer, b, t in np.ndindex(2, 2, 30):
        ranks[layer, b, 0, t, rng.choice(first + t, 5, replace=False)] = 255
    trace = traces.Trace(first, tuple(ranks), np.zeros((2, 2, 30), np.int32))
    config = dataclasses.replace(shapes.config("opt_125m"), n_layers=3)
    work = systems.Work(config, "float32", prompts, 12)
    system = systems.parse(f"{controller} | swa(tokens=6,spare_slots=0)")
    least = 0
    for layer in (0, 0, 1):
        for b, n in enumerate(prompts[whole:]):
            sets = [np.flatnonzero(ranks[layer, b % 2, 0, n - first + step]) for step in range(11)]
            least += belady.least_rows(sets, n, 7 + 16)  # slots, ring
    assert bounds.least_rows(system, work, trace) == least and (least > 0) == (whole < 3)
    ratio = 3.0 if least else None
    assert bounds.fields(system, work, trace, 3 * least) == {"belady_rows": least, "rows_over_belady": ratio}


@pytest.fixture(scope="module")
def stranger():
    """A random model of another family and shape: three layers, five heads."""
    config = dataclasses.replace(
        shapes.config("opt_125m"), vocab_size=50, d_model=40, n_layers=3, n_heads=5, n_kv_heads=5, head_dim=8, d_ff=48
    )
    decoder = Decoder(config)
    params = decoder.init(jax.random.key(0), jnp.float32)
    return SimpleNamespace(decoder=decoder, params=params, name="stranger", calibration=lambda: None)


def test_another_model_attends_and_loads_what_was_recorded_at_every_step(trace, stranger):
    _, trace = trace
    tokens = np.random.default_rng(0).integers(0, 50, (5, LAST))
    again = traces.record(stranger, traces.replay(POLICY, trace, 3), tokens, PROMPT)
    recorded, replayed = attended(trace), attended(again)
    for layer, of in enumerate((0, 0, 1)):
        for b in range(5):
            assert np.array_equal(replayed[layer, b], recorded[of, b % 2]), (layer, b)
            assert np.array_equal(again.loads[layer, b], trace.loads[of, b % 2]), (layer, b)
    assert trace.loads[..., :-1].sum() > 0 and again.fields()["trace_sequences"] == 5


def test_the_simulator_reads_what_was_recorded(trace):
    _, trace = trace
    sets = attended(trace)
    wanted = traces.wanted(trace, layers=3, whole=1)
    lengths = (50, 60, 99, PROMPT)
    found = wanted(7, lengths)
    assert set(found) == {(layer, b) for layer in range(3) for b in range(4)}
    for (layer, b), positions in found.items():
        row = sets[(0, 0, 1)[layer], (b if b < 1 else b - 1) % 2, lengths[b] - PROMPT]
        assert positions == tuple(np.flatnonzero(row))


def test_a_traced_run_says_whose_selections_it_replays(trained, trace, bench, monkeypatch):
    folder, text, model = trained
    loads, asked, built = [], [], []
    path = folder.parent / "traced.jsonl"

    def load(name, dtype=None, seed=0):
        loads.append((name, dtype))
        return model

    def record(*given):
        asked.append(given)
        return trace[1]

    def build(model, policy, *rest):
        built.append(policy)
        return MadeUp("x", bench.calls, [None])

    def call(*flags) -> list[dict]:
        argv = [
            "throughput",
            "--model=random:opt_125m",
            "--batch=3",
            "--prompt_tokens=20",
            "--new_tokens=12",
            "--ragged",
        ]
        argv += [f"--trace={folder}", f"--text={text}", f"--system=alisa | {SWA}", "--system=resident", *flags]
        assert common.run(lambda a: throughput.main(a, load, build), [*argv, f"--out={path}"]) == 0
        return [json.loads(line) for line in path.read_text().splitlines()]

    monkeypatch.setattr(traces, "record", record)
    sparse, dense = call()
    assert loads == [(str(folder), None), ("random:opt_125m", "float32")]
    ((reader, policy, sequences, prompt_tokens),) = asked
    assert reader is model and policy == policies.parse(SWA)
    assert [len(ids) for ids in sequences] == [max(len(p) for p in bench.calls[0][1]) + 12] * 3
    assert prompt_tokens == min(len(p) for p in bench.calls[0][1])
    replay, plain = built
    assert isinstance(replay, traces.Replay) and replay.layers == 12 and plain == policies.parse("dense")
    assert sparse["trace"] == folder.name and sparse["data"] == text.name and sparse["prompts"] == "drawn ids"
    assert dense["trace"] is None and dense["data"] is None
    assert sparse["trace_sequences"] == 2 and sparse["trace_entering_tokens"] == trace[1].entering_tokens()
    assert "trace_sequences" not in dense and len(sparse["trace_sha256"]) == 64
    loads.clear()
    assert call() == [sparse, dense] and not loads
    modelled = call("--simulate", "--hardware=h100_80gb", "--device_kv_bytes=1.7x")[2]
    assert loads == [(str(folder), None)] and len(asked) == 2
    assert modelled["basis"] == "modelled" and modelled["trace_sequences"] == 2


def test_a_name_of_the_hub_is_sized_like_its_folder(trained, monkeypatch):
    folder, _, _ = trained
    monkeypatch.setattr(
        hub, "locate", lambda name, weights=True: (folder, name) if name == "owner/name" else (Path(name), name)
    )
    assert shapes.config("owner/name") == shapes.config(str(folder))
    assert systems.has_tokenizer("owner/name") and inputs.resolved("owner/name", "auto", "gpu") == "float32"
    assert inputs.card("owner/name").name == "owner/name"
