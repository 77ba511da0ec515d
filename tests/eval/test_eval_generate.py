"""`python -m eval.generate`: what runs, what is recorded, resuming, mistakes in one sentence; the bundled model."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import alisa_jax
from alisa_jax.engine import sequence_keys
from alisa_jax.models import CheckpointError, Decoder
from eval import generate, perplexity
from eval.script import common

pytestmark = pytest.mark.slow

WORDS = ("<bos>", "the", "cat", "sat", "mat", "dog", "<user>", "<end>")


class WordEngine:
    """Continues a prompt with the words 1, 2, 3, ... in turn, from its length on; keeps the calls it gets."""

    implementation = "words"
    implementation_reason = "there are no others"

    def __init__(self, calls: list, stop_at: int | None = None, context: int = 96):
        self.calls, self.stop_at, self.context = calls, stop_at, context

    def validate_prompts(self, length, new_tokens):
        tokens = length.max() + new_tokens
        if tokens > self.context:
            raise ValueError(f"the model's context is {self.context} tokens; got {tokens}")
        if length.min() < 2:
            raise ValueError(f"the codec needs 2 tokens; got {length.min()}")

    def generate(self, prompts, max_new_tokens, **options):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(SimpleNamespace(prompts=prompts, new=max_new_tokens, **options))
        tokens = [[1 + (len(p) + j) % 5 for j in range(max_new_tokens)] for p in prompts]
        completions = [" ".join(WORDS[t] for t in row) for row in tokens]
        if options["on_text"] is not None:
            for word in completions[0].split(" "):
                options["on_text"](0, word + "|")
        return SimpleNamespace(
            tokens=tokens,
            completions=completions,
            finish_reasons=["length"] * len(prompts),
            logprobs=[np.full(max_new_tokens, -0.5, np.float32) for _ in prompts],
            prefill_s=0.5,
            decode_s=1.5,
            wall_s=2.25,
            compiles=3,
            placement=None,
        )


@pytest.fixture
def bench(tmp_path):
    """A model folder with a context of 96, and `call(*flags)` -> exit code, with the word engine."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 96}))
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="dog"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    setup = SimpleNamespace(folder=folder, calls=[], loads=[], stop_at=None, tokenizer=tokenizer, tmp=tmp_path)
    setup.context = 96

    def load(name):
        setup.loads.append(name)
        encode = lambda text: [0, *setup.tokenizer.encode(text).ids]

        def encode_chat(messages):
            if any(message["content"] == "refused" for message in messages):
                raise CheckpointError("the chat template refuses the messages: no.")
            return [0, *(i for m in messages for i in [6, *tokenizer.encode(m["content"]).ids, 7])]

        return SimpleNamespace(
            tokenizer=setup.tokenizer, encode=encode, encode_chat=encode_chat, eos_ids=(7,), name="tiny"
        )

    def call(*flags):
        argv = ["generate", f"--model={folder}", *flags]
        make = lambda model, policy, codec: WordEngine(setup.calls, setup.stop_at, setup.context)
        return common.run(lambda a: generate.main(a, load, make), argv)

    def file(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"--prompts_file={tmp_path / name}"

    setup.call, setup.file = call, file
    return setup


def records_of(capsys):
    out = capsys.readouterr()
    return [json.loads(line) for line in out.out.splitlines()], out.err


def test_a_record_says_what_was_made_from_what_and_how(bench, capsys):
    flags = ["--prompt=the cat", "--max_new_tokens=4", "--temperature=0.7", "--top_k=9", "--top_p=0.9", "--seed=3"]
    assert bench.call(*flags, "--stop=\n\n", "--stop=end", "--policy=swa(kv_sparsity=0.80)", "--json") == 0
    (record,), err = records_of(capsys)
    expected = {
        "script": "eval.generate",
        "model": "tiny",
        "policy": "swa(kv_sparsity=0.8)",
        "codec": "raw",
        "placement": "resident",
        "max_new_tokens": 4,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.9,
        "stop": ["\n\n", "end"],
        "seed": 3,
        "prompt": "the cat",
        "prompt_id": None,
        "prompt_index": 0,
        "completion": "mat dog the cat",
        "tokens": [4, 5, 1, 2],
        "finish_reason": "length",
        "n": 4,
        "prompt_tokens": 3,
        "nats_per_token": 0.5,
        "prefill_s": 0.5,
        "decode_s": 1.5,
        "batch_tokens_per_s": 2.0,
        "batch": 1,
        "compiles": 3,
        "wall_s": 2.25,
        "implementation": "words",
        "implementation_reason": "there are no others",
        "basis": "measured",
    }
    assert {key: record[key] for key in expected} == expected
    assert len(record["model_sha256"]) == 64 and "temperature 0.7, top_k 9, top_p 0.9, seed 3" in err
    (call,) = bench.calls
    assert call.prompts == [[0, 1, 2]] and call.eos_ids == (7,) and call.stop == ("\n\n", "end")
    assert call.sampling == alisa_jax.Sampling(0.7, 9, 0.9) and call.on_text is None


def test_with_chat_prompts_are_messages_of_a_user(bench, capsys, tmp_path):
    flags = ["--prompt=the cat", "--max_new_tokens=4", "--json", f"--out={tmp_path / 'out.jsonl'}"]
    settings = (["--chat"], ["--chat", "--system=dog"], [], [])
    found = []
    for given in settings:
        assert bench.call(*flags, *given) == 0
        (record,), _ = records_of(capsys)
        found.append({key: record[key] for key in ("chat", "system") if key in record})
    assert [call.prompts for call in bench.calls] == [[[0, 6, 1, 2, 7]], [[0, 6, 5, 7, 6, 1, 2, 7]], [[0, 1, 2]]]
    assert found == [{"chat": True}, {"chat": True, "system": "dog"}, {}, {}]
    assert bench.call(*flags, "--system=dog") == 2 and "--system is a message of a chat" in capsys.readouterr().err
    assert bench.call(*flags, "--chat", "--system=refused") == 2
    assert "--chat: the chat template refuses the messages: no\n" in capsys.readouterr().err


def test_prompts_run_in_batches_each_with_the_key_of_its_place(bench, capsys):
    file = bench.file("p.txt", "\ufeffthe cat\r\n\n  sat mat\nthe\ndog the\ncat cat cat\n")
    assert bench.call(file, "--batch=2", "--seed=5", "--json") == 0
    records, _ = records_of(capsys)
    assert [r["prompt"] for r in records] == ["the cat", "  sat mat", "the", "dog the", "cat cat cat"]
    assert [r["batch"] for r in records] == [2, 2, 2, 2, 1]
    assert [c.prompts for c in bench.calls] == [[[0, 1, 2], [0, 3, 4]], [[0, 1], [0, 5, 1]], [[0, 2, 2, 2]]]
    keys = np.concatenate([jax.random.key_data(c.key) for c in bench.calls])
    np.testing.assert_array_equal(keys, jax.random.key_data(sequence_keys(5, range(5))))


def test_objects_give_prompts_of_several_lines_and_ids(bench, capsys):
    lines = [{"prompt": "the\ncat", "id": "first"}, {"id": 7, "prompt": "dog \u2028 the", "more": 1}, {"prompt": "mat"}]
    file = bench.file("p.jsonl", "\n".join(json.dumps(x, ensure_ascii=False) for x in lines))
    assert bench.call(file, "--json") == 0
    records, _ = records_of(capsys)
    assert [r["prompt"] for r in records] == [x["prompt"] for x in lines]
    assert [r["prompt_id"] for r in records] == ["first", "7", None]


def test_people_see_prompt_and_continuation_apart(bench, capsys):
    assert (
        bench.call(bench.file("p.jsonl", '{"prompt": "the", "id": "a"}\n{"prompt": "cat"}'), "--max_new_tokens=2") == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "--- prompt 0 (a)",
        "the",
        "--- continuation 0 (a) (2 tokens, length)",
        "sat mat",
        "--- prompt 1",
        "cat",
        "--- continuation 1 (2 tokens, length)",
        "sat mat",
        "---",
        "tiny, policy dense, codec raw, greedy",
        "prompts: 2, new tokens: 4, ended by: 2 length, tokens/s of a batch: 2.0 with compilation",
    ]


def test_a_streamed_text_is_shown_as_it_comes_and_once(bench, capsys):
    assert bench.call("--prompt=the", "--max_new_tokens=3", "--stream", f"--out={bench.tmp / 'r.jsonl'}") == 0
    out = capsys.readouterr().out
    assert out.startswith("--- prompt\nthe\n--- continuation\nsat|mat|dog|\n---\ntiny, policy dense")
    assert bench.call("--prompt=the", "--max_new_tokens=3", "--stream", f"--out={bench.tmp / 'r.jsonl'}") == 0
    assert "--- continuation (3 tokens, length)\nsat mat dog\n---" in capsys.readouterr().out
    assert len(bench.calls) == 1


def test_finished_prompts_are_not_run_again_unless_something_differs_or_it_is_asked(bench, capsys):
    file, out = bench.file("p.txt", "the\ncat\ndog\n"), f"--out={bench.tmp / 'new' / 'r.jsonl'}"
    assert bench.call(file, out, "--json") == 0
    first, _ = records_of(capsys)
    assert bench.call(file, out, "--json", "--batch=1") == 0  # no part of what a prompt gets
    again, err = records_of(capsys)
    assert again == first and "3 of 3 prompts were already in" in err
    assert len(bench.calls) == 1
    for n, flag in enumerate(
        ["--temperature=0.5", "--stop=x", "--seed=1", "--top_k=3", "--max_new_tokens=7", "--rerun"]
    ):
        assert bench.call(file, out, flag) == 0
        assert len(bench.calls) == n + 2
    bench.file("p.txt", "the\ncat\nmat\n")
    assert bench.call(file, out, "--json") == 0
    assert [c.prompts for c in bench.calls[7:]] == [[[0, 4]]]
    (bench.folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert bench.call(file, out, "--json") == 0 and len(bench.calls) == 9
    bench.tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS[::-1])}, unk_token="dog"))
    bench.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # the same files, read as other ids
    assert bench.call(file, out, "--json") == 0
    assert [c.prompts for c in bench.calls[9:]] == [[[0, 6], [0, 5], [0, 3]]]


def test_prompts_go_beyond_the_context_where_the_policy_has_no_end(bench, capsys):
    """The engine says what fits, not the command."""
    is_told(bench, capsys, [ONE, "--max_new_tokens=200", "--policy=streaming(tokens=16)"], "must be below 96")
    endless = "--policy=streaming(tokens=16,positions=cache)"
    is_told(
        bench, capsys, [ONE, "--max_new_tokens=200", endless], "with --max_new_tokens=200: the model's context is 96"
    )
    bench.context = 300
    assert bench.call(ONE, "--max_new_tokens=200", endless) == 0 and bench.calls[0].new == 200


def test_an_interrupted_run_goes_on_with_the_batch_it_was_in(bench, capsys):
    file, out = bench.file("p.txt", "the\ncat\ndog\nmat\nsat\n"), bench.tmp / "r.jsonl"
    flags = [file, f"--out={out}", "--batch=2", "--temperature=1", "--json"]
    bench.stop_at = 1
    assert bench.call(*flags) == common.EXIT_INTERRUPTED
    assert len(out.read_text().splitlines()) == 2
    with open(out, "a") as open_file:
        open_file.write('{"script": "eval.gen')  # what a kill in the middle of a write would leave
    bench.stop_at = None
    capsys.readouterr()
    assert bench.call(*flags) == 0
    records, _ = records_of(capsys)
    assert [r["prompt"] for r in records] == ["the", "cat", "dog", "mat", "sat"]
    assert [c.prompts for c in bench.calls[1:]] == [[[0, 5], [0, 4]], [[0, 3]]]
    keys = np.concatenate([jax.random.key_data(c.key) for c in bench.calls])
    np.testing.assert_array_equal(keys, jax.random.key_data(sequence_keys(0, range(5))))
    assert len(out.read_text().splitlines()) == 5


ONE = "--prompt=the cat"
MISTAKES = [
    ((), "one of --prompt and --prompts_file"),
    ((ONE, "--prompts_file=p.txt"), "one of --prompt and --prompts_file"),
    (("--prompts_file=absent.txt",), "cannot read the prompts 'absent.txt': No such file"),
    (("--prompts_file=p.csv",), "must end in .txt or .jsonl, got 'p.csv'"),
    ((ONE, "--temperature=nan"), "--temperature must be a number from 0 (greedy)"),
    ((ONE, "--temperature=-1"), "--temperature must be a number from 0 (greedy)"),
    ((ONE, "--top_k=-1"), "--top_k must be a whole number from 0 (off)"),
    ((ONE, "--top_p=0"), "--top_p must be a number above 0 and at most 1"),
    ((ONE, "--top_p=1.5"), "--top_p must be a number above 0 and at most 1"),
    ((ONE, "--seed=-1"), "--seed must be in 0..4294967295, got -1"),
    ((ONE, "--stop="), "--stop: a stop string is a text of at least one character"),
    ((ONE, "--max_new_tokens=0"), "--max_new_tokens"),
    ((ONE, "--max_new_tokens=96"), "--max_new_tokens must be below 96, the context of tiny, got 96"),
    ((ONE, "--batch=0"), "--batch"),
    ((ONE, "--stream", "--json"), "--stream shows one text on stdout"),
    ((ONE, "--policy=swa(kv_sparsity=1.0)"), "kv_sparsity"),
    ((ONE, "--codec=int9"), "unknown name 'int9'"),
    ((ONE, "--attention_impl=pallas"), "it needs a GPU, and the device is cpu"),
    ((ONE, "--model=absent"), "absent"),
    ((ONE, "--model=random:opt-125m"), "random:opt-125m has no tokenizer"),
    ((ONE, "--out=/dev/null/r.jsonl"), "--out: cannot write results"),
    ((ONE, "--text=x"), "Unknown command line flag 'text'"),
    ((ONE, "more"), "unexpected argument 'more'"),
    (("--prompt=\udcff",), "--prompt: the prompt is not UTF-8 at character 0"),
]


def is_told(bench, capsys, flags, sentence):
    assert bench.call(*flags) == common.EXIT_MISTAKE
    out = capsys.readouterr()
    assert out.out == "" and sentence in out.err and len(out.err.strip().splitlines()) == 1
    assert not bench.calls


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_before_the_model_is_loaded(bench, capsys, flags, sentence):
    is_told(bench, capsys, flags, sentence)
    assert not bench.loads


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", "", "is empty"),
        ("p.jsonl", "\n \n", "is empty"),
        ("p.txt", b"the\n\xff", "not UTF-8: byte 4"),
        ("p.jsonl", '{"prompt": "a"}\nthe', "line 2: not an object"),
        ("p.jsonl", '\n{"text": "a"}', "line 2: not an object"),
        ("p.jsonl", "[1]", "line 1: not an object"),
        ("p.jsonl", '{"prompt": 3}', "line 1: not an object"),
        ("p.jsonl", '{"prompt": "a", "id": [1]}', "line 1: an id is a text or a whole number, got [1]"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: the prompt is not UTF-8 at character 0"),
    ],
)
def test_a_prompts_file_that_cannot_serve_is_refused_before_the_model_is_loaded(bench, capsys, name, content, sentence):
    is_told(bench, capsys, [bench.file(name, content)], sentence)
    assert not bench.loads


def test_prompts_are_all_checked_before_the_first_one_runs(bench, capsys):
    file = bench.file("p.txt", "the cat\n" + "the " * 60)
    is_told(bench, capsys, [file, "--batch=1", "--max_new_tokens=40"], "prompt 1 of 61 tokens with --max_new_tokens=40")
    is_told(bench, capsys, ["--prompt="], "prompt 0 of 1 tokens with --max_new_tokens=64: the codec needs 2 tokens")


def test_a_model_without_a_tokenizer_is_refused(bench, capsys):
    bench.tokenizer = None
    is_told(bench, capsys, [ONE], "tiny has no tokenizer")


def test_what_the_engine_refuses_is_told_in_one_sentence(bench, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("not this one")

    monkeypatch.setattr(WordEngine, "generate", refuse)
    is_told(bench, capsys, [ONE], "error: not this one")


# The library itself, on the bundled model.


@pytest.fixture(scope="module")
def engine():
    """The first two layers of the bundled model, which are quick to compile."""
    model = alisa_jax.load("bundled")
    decoder = Decoder(dataclasses.replace(model.decoder.config, n_layers=2))
    params = model.params | {"blocks": model.params["blocks"][:2]}
    return alisa_jax.Engine(dataclasses.replace(model, decoder=decoder, params=params))


@pytest.fixture(scope="module")
def bundled(engine):
    """`run(*flags)` -> exit code, with `engine`."""

    def call(*flags):
        main = lambda argv: generate.main(argv, lambda _: engine.model, lambda *_: engine)
        return common.run(main, ["generate", *flags])

    return call


def test_records_hold_what_the_engine_gives_whatever_the_batch(bundled, engine, tmp_path, capsys):
    prompts = ["import os\nimport", "def main():\n    return", "class A:"]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
    flags = [f"--prompts_file={tmp_path / 'p.jsonl'}", "--max_new_tokens=12", "--temperature=0.9", "--seed=4", "--json"]
    assert bundled(*flags) == 0
    together, _ = records_of(capsys)
    eos_ids = engine.model.eos_ids
    made = engine.generate(prompts, 12, eos_ids=eos_ids, sampling=alisa_jax.Sampling(0.9), seed=4)
    assert made.compiles == 0
    assert [r["tokens"] for r in together] == made.tokens
    assert [r["completion"] for r in together] == made.completions
    assert all(
        math.isclose(r["nats_per_token"], -np.mean(x), rel_tol=1e-5)
        for r, x in zip(together, made.logprobs, strict=True)
    )
    out = f"--out={tmp_path / 'r.jsonl'}"
    assert bundled(*flags, out, "--batch=1") == 0
    one_by_one, _ = records_of(capsys)
    assert [r["completion"] for r in one_by_one] == made.completions
    assert bundled(*flags, out, "--batch=2") == 0
    resumed, err = records_of(capsys)
    assert resumed == one_by_one and "3 of 3 prompts were already in" in err


def test_a_stream_goes_up_to_the_stop_string(bundled, engine, capsys):
    prompt, sampled = "import os\nimport", alisa_jax.Sampling(0.3)
    whole = engine.generate([prompt], 12, sampling=sampled, seed=2).completions[0]
    stop = whole[5:8]
    flags = ["--max_new_tokens=12", "--temperature=0.3", "--seed=2", "--stream", f"--stop={stop}"]
    assert bundled(f"--prompt={prompt}", *flags) == 0
    shown, _, rest = capsys.readouterr().out.partition("\n---\n")
    assert shown == f"--- prompt\n{prompt}\n--- continuation\n{whole[: whole.index(stop)]}"
    assert rest.startswith("bundled, policy dense, codec raw, temperature 0.3") and "1 stop_string" in rest


def test_the_command_continues_a_prompt_with_the_bundled_model(capsys):
    argv = ["generate", "--prompt=import os\nimport", "--max_new_tokens=8", "--policy=swa(kv_sparsity=0.5)", "--json"]
    assert common.run(generate.main, argv) == 0
    (record,), _ = records_of(capsys)
    model = alisa_jax.load("bundled")
    assert record["completion"] == model.decode(record["tokens"]) and len(record["tokens"]) == record["n"] == 8
    assert record["finish_reason"] == "length" and record["compiles"] == 3


def test_the_command_goes_on_beyond_the_context_as_the_api_does(engine, tmp_path, capsys):
    """A model that has learnt 32 positions, under a policy that needs 24 of them."""
    decoder = Decoder(dataclasses.replace(engine.model.decoder.config, n_layers=1, max_positions=32))
    params = engine.model.params | {"blocks": engine.model.params["blocks"][:1]}
    model = dataclasses.replace(engine.model, decoder=decoder, params=params)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 32}')
    policy, prompt = "streaming(tokens=24,positions=cache)", "def main():\n    return"
    argv = [
        "generate",
        f"--model={tmp_path}",
        f"--policy={policy}",
        f"--prompt={prompt}",
        "--max_new_tokens=40",
        "--json",
    ]
    assert common.run(lambda a: generate.main(a, lambda _: model), argv) == 0
    (record,), _ = records_of(capsys)
    made = alisa_jax.Engine(model, policy).generate([prompt], 40, eos_ids=model.eos_ids)
    assert record["tokens"] == made.tokens[0] and record["prompt_tokens"] + record["n"] > 32
    beyond = ["perplexity", f"--model={tmp_path}", f"--policy={policy}", "--context=64", "--max_tokens=64", "--json"]
    text, scores = "x = [1, 2, 3]\n" * 40, {}
    (tmp_path / "text.txt").write_text(text)
    for protocol in perplexity.PROTOCOLS:
        flags = [f"--text={tmp_path / 'text.txt'}", f"--protocol={protocol}"]
        assert common.run(lambda a: perplexity.main(a, lambda _: model), [*beyond, *flags]) == 0
        (scores[protocol],), _ = records_of(capsys)
    assert (
        scores["decode"]["window_tokens"] == 64
        and scores["decode"]["ids_sha256"] == scores["prefill_mask"]["ids_sha256"]
    )
    nats = [scores[protocol]["nll_nats_per_token"] for protocol in perplexity.PROTOCOLS]
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)
    argv = [*beyond, f"--text={tmp_path / 'text.txt'}", "--policy=dense"]
    assert common.run(lambda a: perplexity.main(a, lambda _: model), argv) == common.EXIT_MISTAKE
    assert "--context must be in 2..32, the context of" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_of_the_bundled_model_is_refused(bundled, capsys):
    assert bundled("--prompt=" + "a b " * 300, "--max_new_tokens=900") == common.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert "with --max_new_tokens=900: the model's context is 1024 tokens" in err and len(err.splitlines()) == 1
