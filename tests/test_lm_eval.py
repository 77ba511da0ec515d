"""The backend for the lm-evaluation-harness, on local tasks: against its own Hugging Face backend, and `Engine.score`.

Everything comes from files of the test; the harness reads a task of a folder as it reads its own.
"""

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tokenizers

harness = pytest.importorskip("lm_eval")

from lm_eval.api import registry  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import alisa_jax  # noqa: E402
from alisa_jax import lm_eval as backend  # noqa: E402
from alisa_jax.lm_eval import AlisaLM, UserError  # noqa: E402
from alisa_jax.models import checkpoint  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 60
SWA = "swa(kv_sparsity=0.5,window=2k)"
CUT = "snapkv(capacity=5,window=2)"
LILY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
CHOICES = [  # context, choices, the right one
    ("One day, Tom went to the", ["park with his mom.", "moon"], 0),
    ("The dog was very happy ", ["and wagged his tail.", "or the"], 1),  # its space belongs to the choices
    ("", ["Once upon a time", "blue"], 0),
    (f"{LILY} {LILY} Lily was very", ["happy", "sad"], 0),  # longer than MAX_LENGTH
]
PROMPTS = ["Once upon a time", "Tom had a big", f"{LILY} {LILY} {LILY} One day"]
TEXTS = [f"{LILY} {LILY} {LILY} {LILY} One day, she saw a big dog.", "The end.\n"]  # 3 windows and 1
COMMON = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {kind}
"""
TASKS = {
    "tiny_choice": (
        "multiple_choice",
        "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\n",
        ["acc", "acc_norm"],
    ),
    "tiny_generate": (
        "generate_until",
        "doc_to_text: '{{text}}'\ndoc_to_target: x\ngeneration_kwargs: {until: ['.'], max_gen_toks: 16, do_sample: false}\n",
        ["exact_match"],
    ),
    "tiny_text": ("loglikelihood_rolling", "doc_to_text: ''\ndoc_to_target: '{{text}}'\n", ["word_perplexity"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the three tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "tiny_choice": [{"text": t, "choices": c, "gold": g} for t, c, g in CHOICES],
        "tiny_generate": [{"text": text} for text in PROMPTS],
        "tiny_text": [{"text": text} for text in TEXTS],
    }
    for name, (kind, body, metrics) in TASKS.items():
        listed = "".join(f"  - metric: {m}\n    higher_is_better: true\n" for m in metrics)
        listed = listed if name == "tiny_choice" else f"  - metric: {metrics[0]}\n"
        text = COMMON.format(name=name, folder=folder, kind=kind) + body + "metric_list:\n" + listed
        (folder / f"{name}.yaml").write_text(text)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return folder


def evaluate(folder, model, args, tasks=tuple(TASKS), **options):
    """Results of the harness; the generators of random numbers of this process are left alone."""
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"batch_size": 16, "bootstrap_iters": 0, "task_manager": manager} | seeds | options
    return harness.simple_evaluate(model=model, model_args=args, tasks=list(tasks), **options)


@pytest.fixture(scope="module")
def dense(folder, stories):
    return evaluate(folder, "alisa", {"pretrained": str(stories), "max_length": MAX_LENGTH})


@pytest.fixture(scope="module")
def reference(folder, stories):
    """The same tasks under the harness's own backend for Hugging Face models."""
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    args = {"pretrained": str(stories), "max_length": MAX_LENGTH, "dtype": "float32", "device": "cpu"}
    return evaluate(folder, "hf", args)


@pytest.fixture(scope="module")
def small(stories, tmp_path_factory):
    """A folder with the first layer of stories260K, which is quick to compile."""
    folder, model = tmp_path_factory.mktemp("small"), alisa_jax.load(stories)
    params = model.params | {"blocks": model.params["blocks"][:1]}
    config = dataclasses.replace(model.decoder.config, n_layers=1)
    checkpoint.save(config, params, folder, tokenizer=model.tokenizer, bos_id=1, eos_ids=(1, 2))
    return str(folder)


@pytest.fixture(scope="module")
def plain(small):
    return AlisaLM(small, batch_size=2, max_length=MAX_LENGTH)


def answers(results, task):
    """What the model answered, by document and request."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in sample["resps"]] for sample in samples]


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def refused(*parts, **args):
    with pytest.raises(UserError) as caught:
        AlisaLM(**args)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), caught.value


def test_dense_log_likelihoods_are_those_of_the_hugging_face_backend(dense, reference):
    ours, theirs = (answers(results, "tiny_choice") for results in (dense, reference))
    assert [len(row) for row in ours] == [len(choices) for _, choices, _ in CHOICES]
    for a, b in zip(*map(itertools.chain.from_iterable, (ours, theirs)), strict=True):
        assert abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]
    assert len({greedy for row in ours for _, greedy in row}) == 2
    for metric in ("acc,none", "acc_norm,none"):
        assert dense["results"]["tiny_choice"][metric] == reference["results"]["tiny_choice"][metric]


def test_a_context_that_is_read_as_a_prompt_gives_the_same_where_attention_is_dense(small, plain):
    """Protocol prompt; under a method that cuts prompts it does not."""
    pairs = asked("loglikelihood", *((text, choice) for text, choices, _ in CHOICES for choice in choices))
    wanted = plain.loglikelihood(pairs)
    models = {p: AlisaLM(small, policy=p, protocol="prompt", max_length=MAX_LENGTH) for p in ("dense", CUT)}
    found = {p: model.loglikelihood(pairs) for p, model in models.items()}
    np.testing.assert_allclose([a for a, _ in found["dense"]], [a for a, _ in wanted], atol=1e-3)
    assert [greedy for _, greedy in found["dense"]] == [greedy for _, greedy in wanted]
    assert max(abs(a[0] - b[0]) for a, b in zip(found[CUT], wanted, strict=True)) > 0.01


def test_greedy_text_is_that_of_the_hugging_face_backend(dense, reference):
    texts = answers(dense, "tiny_generate")
    assert texts == answers(reference, "tiny_generate")
    assert all(text and "." not in text for row in texts for text in row)


def test_rolling_perplexity_is_that_of_the_hugging_face_backend(dense, reference):
    ours, theirs = (np.array(answers(results, "tiny_text")) for results in (dense, reference))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    found, wanted = (results["results"]["tiny_text"]["word_perplexity,none"] for results in (dense, reference))
    assert found == pytest.approx(wanted, rel=1e-4) and found > 1


def test_results_say_what_ran(dense):
    config = dense["config"]
    kept = {key: config[key] for key in ("policy", "codec", "placement", "protocol", "implementation", "model_dtype")}
    assert kept == {
        "policy": "dense",
        "codec": "raw",
        "placement": "resident",
        "protocol": "decode",
        "implementation": "xla:working_set",
        "model_dtype": "float32",
    }
    assert config["implementation_reason"] and config["model_num_parameters"] == 260_032


def test_a_policy_and_a_codec_score_as_the_engine_does(small):
    lm = AlisaLM(small, SWA, "int8(axis=token)", batch_size=2, max_length=MAX_LENGTH)
    pairs = [(LILY[:60], " in the park."), (LILY, " She was happy.")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    texts = [context + continuation for context, continuation in pairs]
    scores, other = (
        engine.score([lm.model.encode(text) for text in texts], "prefill_mask")
        for engine in (lm.engine, alisa_jax.Engine(lm.model))
    )
    for i, (value, greedy) in enumerate(found):
        tail = slice(len(lm.tok_encode(pairs[i][0])) - 1, None)
        assert value == pytest.approx(float(scores.logprobs[i][tail].sum()), abs=1e-3)
        assert greedy == bool(scores.correct[i][tail].all())
        assert abs(value - other.logprobs[i][tail].sum()) > 0.01  # neither policy nor codec was left out
    assert lm.get_model_info()["policy"] == SWA and lm.get_model_info()["implementation"] == "xla:working_set"


def test_a_placement_gives_what_the_device_alone_gives(small, plain, monkeypatch):
    placed = AlisaLM(small, placement="accelerate", device_kv_bytes="9x", batch_size=2, max_length=MAX_LENGTH)
    runs = []
    for name in ("score", "generate"):
        run = getattr(placed.engine, name)
        monkeypatch.setattr(placed.engine, name, lambda *a, run=run, **k: runs.append(run(*a, **k)) or runs[-1])
    texts = asked("generate_until", *[(LILY[:n], {"until": ["."], "max_gen_toks": 12}) for n in (60, 40)])
    found, wanted = (lm.generate_until(texts, disable_tqdm=True) for lm in (placed, plain))
    assert found == wanted and found[0]
    pairs = [(LILY[:60], " in the park with Tim"), (LILY[:60], f" {found[0]}"[:24])]
    scores = asked("loglikelihood", *pairs)
    found, wanted = (lm.loglikelihood(scores, disable_tqdm=True) for lm in (placed, plain))
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] == [False, True]
    assert placed.get_model_info()["placement"] == "accelerate" and all(run.placement.load_bytes > 0 for run in runs)
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 20.0, "top_k": 50}
    texts = asked("generate_until", *[(LILY[:60], drawn)] * 2)
    found, wanted = (lm.generate_until(texts, disable_tqdm=True) for lm in (placed, plain))
    assert found == wanted and found[0] != found[1]


def test_a_budget_that_is_too_small_is_refused_before_anything_runs(small):
    lm = AlisaLM(small, SWA, placement="alisa", device_kv_bytes="0.5x", max_length=MAX_LENGTH)
    with pytest.raises(UserError, match="alisa needs device_kv_bytes of at least .* here; got 7680"):
        lm.loglikelihood(asked("loglikelihood", ("One", " day"), (LILY, LILY)), disable_tqdm=True)
    assert lm.engine.compiles == 0


def test_what_a_request_draws_depends_on_its_number_and_not_on_its_batch(plain):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 20.0, "top_k": 50}
    requests = asked("generate_until", *[("Once upon a time", settings)] * 2)
    together = plain.generate_until(requests, disable_tqdm=True)
    assert len(set(together)) == 2
    plain.batch_size = 1
    try:
        assert together == plain.generate_until(requests, disable_tqdm=True)
    finally:
        plain.batch_size = 2


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"num_beams": 4}, "no setting num_beams of generation is known; known are until, do_sample"),
        ({"do_sample": True}, "do_sample=true needs a temperature above 0"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, "top_p must be a number above 0 and at most 1"),
        ({"max_gen_toks": MAX_LENGTH}, "max_gen_toks must be below max_length=60, to leave room for a prompt; got 60"),
    ],
)
def test_generation_that_is_not_known_is_refused(plain, settings, says):
    with pytest.raises(UserError, match=says):
        plain.generate_until(asked("generate_until", ("Tom", settings)), disable_tqdm=True)


def test_requests_too_short_for_the_codec_are_refused_before_anything_runs(small):
    lm = AlisaLM(small, codec="int8(calibration_tokens=8)", batch_size=1)
    requests = asked("loglikelihood", (LILY, " She"), ("One", " day"))
    with pytest.raises(
        UserError, match="takes its range from the first 8 tokens of each sequence; .* give calibration"
    ):
        lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.engine.compiles == 0


def test_arguments_that_cannot_be_served_are_refused_in_one_sentence(small):
    refused("pretrained must name a folder", "it is missing", policy="dense")
    refused("random:opt_125m has no tokenizer", pretrained="random:opt_125m")
    refused("'nowhere/at all'", pretrained="nowhere/at all")
    refused(
        "policy=swa(kv_sparsity=0.8 lacks a bracket",
        "as JSON",
        pretrained=small,
        policy="swa(kv_sparsity=0.8",
        window="2k)",
    )
    refused("sparse", "known names are dense", pretrained=small, policy="sparse")
    refused("int3", "known names are raw, int8, int4", pretrained=small, codec="int3")
    refused("no argument window", "pretrained, policy, codec", pretrained=small, window="2k")
    refused("batch_size must be a whole number", "'auto'", pretrained=small, batch_size="auto")
    refused("max_length must be below 512", "got 512", pretrained=small, max_length=512)
    refused("decode, prefill_mask, prompt", "'mask'", pretrained=small, protocol="mask")
    refused(
        "leave out placement or protocol=prefill_mask", pretrained=small, placement="alisa", protocol="prefill_mask"
    )
    refused("device_kv_bytes: '1 gig' is no size", pretrained=small, placement="alisa", device_kv_bytes="1 gig")
    refused("seed", "-1", pretrained=small, seed=-1)


def test_model_args_in_one_text_keep_the_commas_of_a_spec(small):
    text = f"pretrained={small},policy={SWA},codec=int8(axis=token),max_length=60,add_bos_token=true"
    lm = AlisaLM.create_from_arg_string(text, {"batch_size": "4"})
    assert (lm.named["policy"], lm.named["codec"], lm.max_length, lm.batch_size) == (SWA, "int8(axis=token)", 60, 4)
    with pytest.raises(UserError, match="key=value pairs between commas; got 'dense'"):
        AlisaLM.create_from_arg_string(f"pretrained={small},dense")


def test_bos_stands_where_the_tokenizer_puts_it_or_where_it_is_asked_for(plain):
    assert plain.tok_encode("Once") == plain.model.encode("Once") == [1, 403]
    assert plain.tok_encode("<s> Once")[:2] == [1, 410] and plain.tok_encode("Once", add_special_tokens=False) == [403]
    for given, ids in ((None, [0, 317, 287]), (False, [317, 287]), (True, [0, 317, 287])):
        assert AlisaLM("bundled", add_bos_token=given).tok_encode("def f") == ids
    assert AlisaLM("bundled", add_bos_token=True).tok_encode("<|bos|>def f") == [0, 317, 287]
    assert (plain.prefix_token_id, plain.eot_token_id) == (1, 2)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '\n' ~ m.role ~ ': ' ~ m.content | trim }}{% endfor %}{% if add_generation_prompt %}{{ '\nTom:' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["with BOS", "without"])
def chatty(small, stories, tmp_path_factory, request):
    """The small model with a chat template, and a tokenizer that puts its BOS before a text or only names it."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(small, folder)
    config = json.loads((stories / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if request.param == "without":
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = tokenizers.processors.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_texts_and_chats_become_the_ids_of_the_hugging_face_backend(chatty):
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    from lm_eval.models.huggingface import HFLM

    history = [{"role": "user", "content": "One day "}, {"role": "assistant", "content": "Lily said "}]
    system = [{"role": "system", "content": "Be kind."}, *history]
    for given in (None, True, False):
        ours = AlisaLM(chatty, add_bos_token=given, max_length=MAX_LENGTH)
        theirs = HFLM(chatty, add_bos_token=given, dtype="float32", device="cpu", max_length=MAX_LENGTH)
        for text in ("Once", " Once", "", "<s> Once", "<s>", "a <s> b", "</s>"):
            assert ours.tok_encode(text) == theirs.tok_encode(text), (given, text)
            assert ours.tok_encode(text, add_special_tokens=True) == theirs.tok_encode(text, add_special_tokens=True)
        for messages, prompt in itertools.product((history, system, history[:1]), (True, False)):
            text = ours.apply_chat_template(messages, prompt)
            assert text == theirs.apply_chat_template(messages, prompt)
            assert ours.tok_encode(text) == theirs.tok_encode(text) and ours.tok_encode(text).count(1) == 1
        assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
        assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE and ours.chat_template() is None


def test_chat_templates_are_applied_as_the_hugging_face_backend_does(folder, chatty):
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name)
    args, tasks = {"pretrained": chatty, "max_length": MAX_LENGTH}, ["tiny_choice"]
    options = {"apply_chat_template": True, "system_instruction": "Be kind."}
    ours = evaluate(folder, "alisa", args, tasks, **options)
    theirs = evaluate(folder, "hf", args | {"dtype": "float32", "device": "cpu"}, tasks, **options)
    pairs = zip(*(itertools.chain.from_iterable(answers(x, "tiny_choice")) for x in (ours, theirs)), strict=True)
    for a, b in pairs:
        assert abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]


def test_a_chat_needs_the_default_template_of_the_model(folder, small, chatty):
    args = {"pretrained": small, "max_length": MAX_LENGTH}
    with pytest.raises(UserError, match="has no chat template; leave --apply_chat_template out"):
        evaluate(folder, "alisa", args, ["tiny_generate"], apply_chat_template=True)
    with pytest.raises(UserError, match="the default chat template alone; got 'tools'"):
        AlisaLM(chatty, max_length=MAX_LENGTH).chat_template("tools")


def test_what_was_answered_is_kept_in_the_cache_of_the_harness(plain):
    kept = []
    hook = plain.cache_hook
    plain.cache_hook = type("Hook", (), {"add_partial": lambda self, *args: kept.append(args)})()
    try:
        found = plain.loglikelihood_rolling(asked("loglikelihood_rolling", ("The end.\n",)), disable_tqdm=True)
    finally:
        plain.cache_hook = hook
    assert kept == [("loglikelihood_rolling", ("The end.\n",), found[0])]


def test_the_entry_point_of_the_harness_names_the_class():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name, value), *others = declared["entry-points"]["lm_eval.models"].items()
    found = registry.Registry("model")
    found.register(name, target=metadata.EntryPoint(name, value, "lm_eval.models"))
    assert not others and name == "alisa" and found.get(name) is AlisaLM is registry.get_model("alisa")


def test_a_mistake_at_the_command_line_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    def cli_evaluate():
        AlisaLM()

    monkeypatch.setattr(importlib.import_module("lm_eval.__main__"), "cli_evaluate", cli_evaluate)
    with pytest.raises(SystemExit) as caught:
        backend.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("alisa-lm-eval: pretrained must name a folder")


def test_the_command_evaluates_a_task(folder, small, tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = declared["alisa-lm-eval"].split(":")
    args = ["--model_args", f"pretrained={small}", f"policy={SWA}", "codec=int8(axis=token)", "protocol=prefill_mask"]
    command = [sys.executable, "-c", f"from {module} import {function}; {function}()", "run", "--model", "alisa", *args]
    command += ["--tasks", "tiny_choice", "--include_path", str(folder), "--batch_size", "16"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command += ["--output_path", str(tmp_path / "out.json"), "--log_samples"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "|tiny_choice|" in run.stdout
    (path,) = tmp_path.glob("out*.json")
    config = json.loads(path.read_text())["config"]
    assert (config["policy"], config["codec"], config["implementation"]) == (SWA, "int8(axis=token)", "xla:masked")


def test_without_the_harness_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "alisa_jax.lm_eval")
    with pytest.raises(ImportError, match=r"pip install 'alisa-jax\[lm-eval\]'"):
        importlib.import_module("alisa_jax.lm_eval")
