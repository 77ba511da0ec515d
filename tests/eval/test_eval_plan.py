"""eval.plan: one record before any run, its bytes, its budgets, its refusals."""

import inspect
import json
from pathlib import Path

import pytest

import alisa_jax
from alisa_jax.records import Results
from eval import plan
from eval.modelled import hardware_profile, machines
from eval.script import common

pytestmark = pytest.mark.slow

SMALL = ("--model=opt_125m", "--hardware=t4_16gb", "--batch=4", "--prompt_tokens=64", "--new_tokens=65")
# What identifies a record of SMALL and --device_kv_bytes=0.8x, and some of its values, as written before the function was.
CELL = {
    "script": "eval.plan",
    "model": "opt_125m",
    "hardware": "t4_16gb",
    "codec": "raw",
    "prompt_tokens": 64,
    "new_tokens": 65,
    "kv_sparsity": 0.8,
    "window": "k",
    "dtype": "float16",
    "read": "rows",
    "traffic": "delta",
    "entering_tokens": 0.2,
    "selection_us": 50.0,
    "matmul_efficiency": 0.6,
    "read_efficiency": 0.8,
    "batch": 4,
}
VALUES = {
    "least_device_kv_bytes": 11121792.0,
    "fits": False,
    "p1": 0,
    "p2": 65,
    "alpha": 0.85,
    "search_total_s": 0.10447606341510836,
    "resident_tokens_per_s": "OOM",
    "waves_tokens_per_s": 1984.771746260615,
    "accelerate_load_bytes": 830472192.0,
    "flexgen_host_peak_bytes": 8257536.0,
    "alisa_tokens_per_s": 2512.131989848424,
    "alisa_searched_load_bytes": 1769472.0,
    "alisa_paper_tokens_per_s": 2401.9712701893945,
    "offload_wins_from_batch": 4,
}


def record(capsys, *flags) -> dict:
    plan.main(["plan", *SMALL, "--json", *flags])
    out, err = capsys.readouterr()
    assert "all numbers are modelled" in err
    return json.loads(out)


def refusal(capsys, *flags) -> str:
    assert common.run(plan.main, ["plan", *SMALL, *flags]) == common.EXIT_MISTAKE
    out, err = capsys.readouterr()
    assert not out
    return err


def test_the_record_holds_bytes_phases_and_a_throughput_for_each_controller(capsys):
    found = record(capsys, "--device_kv_bytes=0.8x")
    dense = 2 * 12 * 768 * 2 * 4 * 128  # K and V, layers, width, two bytes, batch, 64 + 65 - 1 tokens
    assert found["kv_bytes"] == dense and found["device_kv_bytes"] == pytest.approx(0.8 * dense)
    assert found["weight_bytes"] == 2 * 125_239_296 and found["fits"] is False and found["basis"] == "modelled"
    assert found["statistics_bytes"] > 4 * 12 * 128 * 4 * 13 and found["working_set_bytes"] > 0.2 * dense
    assert 0 <= found["p1"] < found["p2"] <= 65 and 0 < found["alpha"] < 1 and 0 <= found["beta"] < 1
    assert found["resident_tokens_per_s"] == "OOM"
    for name in ("waves", "accelerate", "flexgen", "alisa", "alisa_searched", "alisa_paper"):
        assert found[f"{name}_tokens_per_s"] > 0
        assert found[f"{name}_device_peak_bytes"] <= found["device_kv_bytes"]
        assert found[f"{name}_host_peak_bytes"] <= found["host_kv_bytes"]
    assert found["accelerate_load_bytes"] > found["flexgen_load_bytes"] > found["alisa_paper_load_bytes"]
    assert found["alisa_paper_load_bytes"] > found["alisa_load_bytes"] > 0
    assert found["alisa_tokens_per_s"] >= found["alisa_searched_tokens_per_s"] * 0.98


def test_the_page_of_the_shapes_is_what_the_command_prints(capsys):
    assert common.run(plan.main, ["plan", "--models"]) == 0
    page = (Path(plan.__file__).parents[1] / "configs" / "models.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "python -m eval.plan --models > configs/models.md"


def test_everything_stays_on_a_device_that_holds_it(capsys):
    found = record(capsys)
    assert found["fits"] is True and (found["p1"], found["p2"], found["alpha"], found["beta"]) == (65, 65, 0.0, 0.0)
    assert found["alisa_load_bytes"] == 0
    assert found["resident_tokens_per_s"] == found["flexgen_tokens_per_s"] == found["waves_tokens_per_s"]


def test_offloading_loses_below_some_batch_and_wins_above_it(capsys):
    settings = ("--model=opt_1.3b", "--device_kv_bytes=300MB", "--new_tokens=129")
    wins = record(capsys, *settings)["offload_wins_from_batch"]
    share = f"--device_kv_bytes={300e6 / record(capsys, *settings)['kv_bytes']}x"
    assert wins == record(capsys, *settings, share)["offload_wins_from_batch"] > 1
    for batch, faster in ((wins, True), (wins - 1, False)):
        found = record(capsys, *settings, f"--batch={batch}")
        assert (found["alisa_tokens_per_s"] >= found["waves_tokens_per_s"]) is faster


def test_a_fixed_window_has_a_row_of_statistics_for_each_of_its_rows(capsys):
    few, many = (record(capsys, f"--window={rows}")["statistics_bytes"] for rows in (4, 9))
    assert many - few == 5 * 4 * 12 * 128 * 4  # rows, batch, layers, context, float32


def test_int8_holds_the_same_cache_in_about_half_the_bytes(capsys):
    raw, int8 = record(capsys), record(capsys, "--codec=int8(axis=token)")
    assert int8["kv_bytes"] / raw["kv_bytes"] == pytest.approx((64 + 3) / 128)


def test_a_small_host_brings_deletions(capsys):
    found = record(capsys, "--device_kv_bytes=0.8x", "--host_kv_bytes=0.4x", "--read=pages")
    assert found["alisa_p2"] < 65 and found["alisa_host_peak_bytes"] <= found["host_kv_bytes"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"device_kv_bytes": "0.8x", "host_kv_bytes": "0.4x", "read": "pages", "traffic": "paper", "window": "9"},
        {"device_kv_bytes": "1GB", "codec": "int8(axis=token)", "dtype": "float32", "placement": ["alisa(lag=1)"]},
        {"kv_sparsity": 0.0, "entering_tokens": 0.5, "selection_us": 0.0, "matmul_efficiency": 1.0},
    ],
)
def test_the_record_is_that_of_the_function(capsys, settings):
    flags = [f"--{name}={one}" for name, it in settings.items() for one in (it if isinstance(it, list) else [it])]
    found = record(capsys, *flags)
    asked = alisa_jax.plan("opt_125m", "t4_16gb", batch=4, prompt_tokens=64, new_tokens=65, **settings)
    assert list(found) == list(asked.record)
    assert found | {"wall_s": 0.0} == asked.record | {"wall_s": 0.0}


def test_the_flags_are_the_arguments_of_the_function():
    values = plan.config(["plan"])
    for name, argument in list(inspect.signature(alisa_jax.plan).parameters.items())[2:]:
        given = values[name].value
        assert (tuple(given) if name == "placement" else given) == argument.default, name


def test_a_record_of_an_earlier_version_is_found_by_the_same_fields(tmp_path):
    path = tmp_path / "plans.jsonl"
    path.write_text(json.dumps(CELL | VALUES) + "\n")
    found = alisa_jax.plan("opt_125m", "t4_16gb", batch=4, prompt_tokens=64, new_tokens=65, device_kv_bytes="0.8x")
    assert dict(found.cell) == CELL and Results(path).find(found.cell) == CELL | VALUES
    assert {name: found.values[name] for name in VALUES} == pytest.approx(VALUES)


def test_further_controllers_are_priced_by_their_specs(capsys):
    found = record(capsys, "--device_kv_bytes=0.8x", "--placement=alisa(traffic=paper)")
    assert found["alisa(traffic=paper)_tokens_per_s"] == found["alisa_paper_tokens_per_s"]


def test_a_controller_that_is_priced_densely_is_priced_under_swa_beside_it(capsys):
    found, dense = (
        record(capsys, "--device_kv_bytes=0.8x", "--placement=flexgen"),
        record(capsys, "--device_kv_bytes=0.8x"),
    )
    assert found["flexgen_tokens_per_s"] == dense["flexgen_tokens_per_s"]
    assert 0 < found["flexgen_swa_load_bytes"] < found["flexgen_load_bytes"]


def test_a_budget_may_be_endless(capsys):
    found = record(capsys, "--device_kv_bytes=inf", "--host_kv_bytes=inf")
    assert found["device_kv_bytes"] == found["host_kv_bytes"] == "inf" and found["fits"] is True


def test_dense_attention_can_be_planned_too(capsys):
    found = record(capsys, "--kv_sparsity=0", "--device_kv_bytes=0.8x")
    assert found["statistics_bytes"] == found["working_set_bytes"] == 0 and found["alisa_load_bytes"] > 0


@pytest.mark.parametrize(
    ("text", "number"), [("2GB", 2e9), ("512MiB", 2**29), ("0.5x", 500.0), ("1000", 1000.0), (".5 KiB", 512.0)]
)
def test_bytes_are_read_as_people_write_them(text, number):
    assert machines.read_bytes(text, 1000.0, "--flag") == number


@pytest.mark.parametrize("text", ["", "GB", "2gb", "-1GB", "1e9", "x"])
def test_other_spellings_of_bytes_are_refused(text):
    with pytest.raises(common.UserError, match="--flag: .* is no size; write 2GB"):
        machines.read_bytes(text, 1000.0, "--flag")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--hardware=a100",), "known: h100_80gb, h200_141gb, t4_16gb, v100_16gb, v100_32gb, this_machine"),
        (("--model=gpt5",), "no folder; known shapes: opt_125m"),
        (("--model=opt_30b",), "weights and activations need 55.88 GiB, and the device has 16.00 GiB"),
        (("--device_kv_bytes=1MB",), "--device_kv_bytes: alisa needs device_kv_bytes of at least"),
        (("--device_kv_bytes=0.8x", "--host_kv_bytes=0.01x"), "--host_kv_bytes: alisa, which deletes prompt tokens"),
        (("--kv_sparsity=1",), "at least 0 and below 1"),
        (("--window=3k",), "--window: window must be"),
        (("--new_tokens=4000",), "2048 positions"),
        (("--codec=int3",), "--codec"),
        (("--placement=alisa(p1=9,p2=3)",), "p1 must be at most p2; got p1=9 and p2=3"),
        (("--placement=alisa(beta=1)",), "beta must be auto or above 0 and below 1; got 1"),
        (("--placement=alisa(p1=60)", "--device_kv_bytes=0.8x"), "p1 must be at most"),
        (("--batch=0",), "batch"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(capsys, flags, sentence):
    assert sentence in refusal(capsys, *flags)


def test_the_smallest_budget_that_is_named_is_enough(capsys):
    words = refusal(capsys, "--device_kv_bytes=1MB").split()
    least = words[words.index("least") + 1]
    assert record(capsys, f"--device_kv_bytes={least}")["alisa_tokens_per_s"] > 0
    assert least in refusal(capsys, f"--device_kv_bytes={int(least) - 1}")


def test_a_folder_is_planned_from_its_config_alone(capsys, tmp_path):
    config = dict(model_type="opt", vocab_size=50272, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    config |= dict(ffn_dim=3072, max_position_embeddings=2048, word_embed_proj_dim=768, do_layer_norm_before=True)
    config |= dict(activation_function="relu", enable_bias=True, layer_norm_elementwise_affine=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder, shape = record(capsys, f"--model={tmp_path}"), record(capsys)
    assert folder["weight_bytes"] == shape["weight_bytes"] and folder["kv_bytes"] == shape["kv_bytes"]


def test_a_profile_of_this_machine_is_hardware(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "make it with python -m eval.plan --profile" in refusal(capsys, "--hardware=this_machine")
    measured = hardware_profile.profile(copy_bytes=2**16, side=64)
    monkeypatch.setattr(hardware_profile, "profile", lambda: measured)
    plan.main(["plan", "--profile"])
    assert "matmul_flops_per_s" in capsys.readouterr().out
    machine = machines.hardware("this_machine")
    assert machine.measured and machine == machines.hardware(str(tmp_path / machines.THIS_MACHINE))
    assert min(machine.to_device_bytes_per_s, machine.to_host_bytes_per_s, machine.read_bytes_per_s) > 0
    found = record(capsys, "--hardware=this_machine", "--device_kv_bytes=1GB")
    assert found["hardware"].startswith("this_machine: ")


def test_a_profile_that_cannot_be_kept_is_not_measured(capsys, monkeypatch):
    monkeypatch.setattr(hardware_profile, "profile", lambda: pytest.fail("measured"))
    assert "--out: there is no folder 'nowhere'" in refusal(capsys, "--profile", "--out=nowhere/x.json")


def test_records_go_to_a_file(capsys, tmp_path):
    record(capsys, f"--out={tmp_path / 'plans.jsonl'}")
    assert json.loads((tmp_path / "plans.jsonl").read_text())["script"] == "eval.plan"
