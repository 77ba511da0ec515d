"""`--placement` and its budgets in the commands: the values of a resident cache, what moved, refusals before any work."""

import json

import pytest

import alisa_jax
from eval import accuracy, compare, generate, perplexity
from eval.card import small
from eval.script import common

pytestmark = pytest.mark.slow

SWA = "--policy=swa(kv_sparsity=0.8,spare_slots=0)"
PLACED = ("--placement=accelerate", "--host_kv_bytes=9x")
TEXT = "import os\nimport sys\n\n\ndef main(argv):\n    print(os.path.join(*argv), file=sys.stderr)\n" * 60


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Flags that name a small model with random weights, and a text."""
    folder = tmp_path_factory.mktemp("placed")
    (folder / "text.py").write_text(TEXT)
    (folder / "prompts.txt").write_text("import os\ndef main(argv):\nprint(os.path.join(\n")
    name = small.write(folder / "model")
    model = alisa_jax.load(name)  # once: programs are compiled for its decoder
    return folder, (f"--model={name}", "--compile_cache=none", "--json"), lambda *_, **__: model


@pytest.fixture
def call(given, capsys):
    """`call(script, *flags)` -> (exit code, records, stderr)."""

    def run(script, *flags):
        code = common.run(lambda argv: script.main(argv, given[2]), ["x", *given[1], *flags])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    return run


def test_perplexity_is_that_of_a_resident_cache(call, given):
    flags = (f"--text={given[0] / 'text.py'}", "--context=64", "--max_tokens=150", "--batch=2", SWA)
    (here,), (there,) = (call(perplexity, *flags, *more)[1] for more in ((), PLACED))
    assert there["placement"] == "accelerate" and there["host_kv_bytes"] == "9x"
    for name in ("nll_nats_per_token", "attended_frac", "clipped_frac"):
        assert there[name] == pytest.approx(here[name], abs=1e-4)
    assert there["load_bytes"] > 0 and there["store_bytes"] > 0 and there["p1"] == 16  # a page is full
    assert "load_bytes" not in here and here["placement"] == "resident"
    assert call(perplexity, *flags, "--placement=alisa", "--device_kv_bytes=1000")[2].startswith(
        "error: --placement: alisa"
    )


def test_completions_are_those_of_a_resident_cache(call, given):
    flags = (f"--prompts_file={given[0] / 'prompts.txt'}", "--max_new_tokens=40", SWA, "--temperature=0.9", "--seed=2")
    here, there = (call(generate, *flags, *more)[1] for more in ((), PLACED))
    assert [r["completion"] for r in there] == [r["completion"] for r in here]
    assert all(r["store_bytes"] > 0 for r in there) and all(r["store_bytes"] == 0 for r in here)
    assert there[0]["host_peak_bytes"] > 0


def test_accuracy_is_that_of_a_resident_cache(call):
    flags = ("--task=recall", "--lengths=64", "--items=2", "--protocol=prompt", SWA)
    (here,), (there,) = (call(accuracy, *flags, *more)[1] for more in ((), PLACED))
    assert there["acc"] == here["acc"] and there["attended_frac"] == pytest.approx(here["attended_frac"], abs=1e-6)
    assert there["placement"] == "accelerate" and there["store_bytes"] > 0


def test_compare_lists_what_a_placement_refuses(call):
    flags = ("--prompt_tokens=56", "--new_tokens=8", "--windows=2", "--items=1", "--share=0.5", "--methods=swa,h2o")
    code, records, err = call(compare, *flags, "--tasks=", "--repeats=0", "--placement=accelerate", "--batch=2")
    assert code == 0, err
    assert {r["placement"] for r in records} == {"accelerate"} and all(r["store_bytes"] > 0 for r in records)
    assert {r["policy"].split("(")[0] for r in records} == {"dense", "swa"}
    assert "the policy evicts what it does not keep" in err


@pytest.mark.parametrize(
    "script, flags, says",
    [
        (generate, ("--prompt=x", "--placement=elsewhere"), "--placement: elsewhere: unknown name"),
        (generate, ("--prompt=x", "--device_kv_bytes=2 gigs"), "--device_kv_bytes: '2 gigs' is no size"),
        (perplexity, ("--placement=waves", "--protocol=prefill_mask"), "keeps no cache that could be placed"),
        (accuracy, ("--host_kv_bytes=1GB", "--protocol=prefill_mask"), "keeps no cache that could be placed"),
        (compare, ("--placement=alisa(p1=x)",), "--placement: "),
    ],
)
def test_mistakes_are_told_in_one_sentence(call, script, flags, says):
    code, records, err = call(script, *flags)
    assert code == 2 and not records and says in err and err.count("\n") == 1
