"""Text as it comes: the incremental detokeniser, stop strings and streaming, on the bundled model."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

import alisa_jax
from alisa_jax.engine import Sampling, generate, stops
from alisa_jax.models import Decoder

HOLE = "\ufffd"
PROMPTS = ["def fibonacci(n):\n", "import os\nimport", "class Foo:\n    def __init__", "x"]
NEW = 18


@pytest.fixture(scope="module")
def bundled():
    """The first two layers of the bundled model, which are quick to compile, and its tokenizer."""
    model = alisa_jax.load("bundled")
    decoder = Decoder(dataclasses.replace(model.decoder.config, n_layers=2))
    params = model.params | {"blocks": model.params["blocks"][:2]}
    return alisa_jax.Engine(dataclasses.replace(model, decoder=decoder, params=params), "dense")


@pytest.fixture(scope="module")
def free(bundled):
    return bundled.generate(PROMPTS, NEW, eos_ids=())


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer that decodes as LLaMA's do: word marks are spaces, the first is dropped, unknown bytes are tokens."""
    words = ["<s>", "\u2581", "a", "\u2581b", "\u2581\u2581", "日", "é"] + [
        f"<0x{b:02X}>" for b in "\n日é".encode() + b"\xff"
    ]
    made = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(dict.fromkeys(words))}, merges=[], byte_fallback=True)
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken("<s>", special=True)])
    return made


def token_lists(size, text_ids=None):
    """Lists of any token ids, or of those of a text with some left out, so that characters are cut and joined."""
    anything = st.lists(st.integers(0, size - 1), max_size=14)
    if text_ids is None:
        return anything
    alphabet = st.sampled_from("ab \n.é日🙂\ufffd")
    cut = st.tuples(st.text(alphabet, max_size=8), st.integers(0, 9), st.integers(0, 9))
    return anything | cut.map(lambda c: text_ids(c[0])[c[1] % 3 : len(text_ids(c[0])) - c[2] % 3])


def joined(tokenizer, prompt, new, stop=(), every=(1,)):
    """(pieces, completion, tokens taken) when text is asked for after every[0], every[1], ... tokens, in turn."""
    text = stops.Completion(lambda ids: tokenizer.decode(list(ids)), prompt, stop, stops.byte_runs(tokenizer))
    pieces, taken, waiting, turn = [], 0, 0, 0
    for token in new:
        taken, waiting = taken + 1, waiting + 1
        hit = text.push(token)
        if hit or waiting == every[turn % len(every)]:
            pieces.append(text.show())
            waiting, turn = 0, turn + 1
        if hit:
            break
    whole = text.end()
    return [*pieces, text.show()], whole, taken


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_pieces_joined_are_the_text_of_the_new_tokens(bundled, sentencepiece, kind):
    tokenizer = bundled.model.tokenizer if kind == "byte level" else sentencepiece
    encode = (lambda text: tokenizer.encode(text).ids) if kind == "byte level" else None
    lists = token_lists(tokenizer.get_vocab_size(), encode)

    @hypothesis.given(lists, lists, st.lists(st.integers(1, 5), min_size=1, max_size=3))
    @hypothesis.settings(max_examples=300)
    @hypothesis.example([], [8, 9, 10, 0, 13], [1])  # with byte fallback: 日, <s>, a byte that spoils it
    def check(prompt, new, every):
        pieces, whole, _ = joined(tokenizer, prompt, new, every=every)
        assert "".join(pieces) == whole
        given, both = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
        if both.startswith(given):
            assert given + whole == both
        else:  # the prompt ended inside a character or in a run of bytes that the new tokens spoil
            assert HOLE in given + both and both.endswith(whole)

    check()


def test_a_stop_string_ends_the_text_where_it_first_shows(bundled):
    tokenizer = bundled.model.tokenizer
    lists = token_lists(tokenizer.get_vocab_size(), lambda text: tokenizer.encode(text).ids)
    stop_lists = st.lists(st.text(st.sampled_from("ab \n.é日🙂"), min_size=1, max_size=3), min_size=1, max_size=3)

    @hypothesis.given(lists, stop_lists, st.lists(st.integers(1, 5), min_size=1, max_size=3))
    @hypothesis.settings(max_examples=300)
    @hypothesis.example(tokenizer.encode("bab a").ids, ["ab ", "ba"], [1])
    def check(new, stop, every):
        pieces, whole, taken = joined(tokenizer, [0], new, stop, every)
        assert "".join(pieces) == whole
        for n in range(len(new) + 1):  # the first number of tokens whose text holds a stop string
            text = tokenizer.decode(new[:n])
            found = [i for s in stop if (i := text.rstrip(HOLE).find(s)) >= 0]
            if found:
                assert (whole, taken) == (text[: min(found)], n)
                return
        assert (whole, taken) == (tokenizer.decode(new), len(new))

    check()


@pytest.mark.parametrize(
    "text, stop, length", [("ab", "abc", 2), ("aab", "aabaac", 3), ("abc", "abc", 0), ("xa", "aa", 1), ("", "a", 0)]
)
def test_what_may_begin_a_stop_string_is_held_back(text, stop, length):
    assert stops.held(text, stop) == length


def cuts(tokenizer, given, tokens, stop):
    """(tokens, text) that a free run leaves when `stop` ends it, worked out on whole texts."""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(given + tokens[:n])[len(tokenizer.decode(given)) :]
        if stop in text:
            return tokens[:n], text[: text.index(stop)]
    return tokens, text


def across_a_border(tokenizer, tokens):
    """A text that ends inside one token and began inside one before it."""
    parts = [tokenizer.decode([t]) for t in tokens]
    i = next(i for i in range(6, len(parts) - 1) if parts[i] and parts[i + 1] and HOLE not in parts[i] + parts[i + 1])
    return parts[i][-2:] + parts[i + 1][:2]


@pytest.mark.parametrize("s", [None, Sampling(0.8, top_k=50)], ids=["greedy", "sampled"])
def test_a_stop_string_across_tokens_cuts_text_and_tokens_of_its_sequence_alone(bundled, free, s):
    tokenizer = bundled.model.tokenizer
    unstopped = free if s is None else bundled.generate(PROMPTS, NEW, eos_ids=(), sampling=s, seed=4)
    stop = across_a_border(tokenizer, unstopped.tokens[0])
    ended = bundled.generate(PROMPTS, NEW, eos_ids=(), sampling=s, seed=4, stop=stop)
    given = [bundled.model.encode(p) for p in PROMPTS]
    expected = [cuts(tokenizer, ids, t, stop) for ids, t in zip(given, unstopped.tokens, strict=True)]
    assert ended.compiles == 0
    assert list(zip(ended.tokens, ended.completions, strict=True)) == expected
    hit = [len(t) < NEW or stop in c for t, c in zip(ended.tokens, unstopped.completions, strict=True)]
    assert hit[0] and not all(hit)
    assert ended.finish_reasons == ["stop_string" if h else "length" for h in hit]
    assert ended.texts == [p + c for p, c in zip(PROMPTS, ended.completions, strict=True)]
    assert [len(x) for x in ended.logprobs] == [len(x) for x in ended.margins] == [len(t) for t in ended.tokens]


def test_nothing_depends_on_the_size_of_chunks(bundled, monkeypatch):
    results = []
    for steps in (1, 3, 8, 64):
        monkeypatch.setattr(generate, "LISTENING_STEPS", steps)
        pieces = [""] * len(PROMPTS)

        def on_text(i, piece, pieces=pieces):
            pieces[i] += piece

        made = bundled.generate(
            PROMPTS, 40, sampling=Sampling(0.9), seed=2, stop=["\n\n", "self", "."], eos_ids=[80], on_text=on_text
        )
        assert pieces == made.completions
        results.append((made.tokens, made.completions, made.finish_reasons, made.texts))
    assert results[0] == results[1] == results[2] == results[3]
    assert "stop_string" in results[0][2] and len(set(map(len, results[0][0]))) > 1


def test_text_is_shown_while_it_is_made_and_held_back_only_while_a_stop_string_may_begin(bundled, free):
    pieces = []
    text = free.completions[1]
    made = bundled.generate(
        PROMPTS[1:2], NEW, eos_ids=(), stop=text[-3:] + "never", on_text=lambda i, p: pieces.append((i, p))
    )
    assert made.completions == [text] and made.finish_reasons == ["length"]
    assert "".join(p for _, p in pieces) == text and {i for i, _ in pieces} == {0}
    assert len(pieces) >= NEW // generate.LISTENING_STEPS and all(p for _, p in pieces)
    assert pieces[-1][1].endswith(text[-3:])


def test_a_stop_token_is_told_from_the_length_and_what_was_held_back_is_shown(bundled, free):
    last = free.tokens[0][5]
    n = free.tokens[0].index(last) + 1
    shown = []
    until = bundled.model.tokenizer.decode(free.tokens[0][:n])
    made = bundled.generate(
        PROMPTS[:1], NEW, eos_ids=[last], stop=until[-2:] + "never", on_text=lambda i, p: shown.append(p)
    )
    assert made.finish_reasons == ["stop_token"] and made.tokens == [free.tokens[0][:n]]
    assert "".join(shown) == made.completions[0] == until


def test_without_stop_strings_the_text_is_prompt_and_completion(bundled, free):
    assert free.finish_reasons == ["length"] * 4
    assert free.texts == [p + c for p, c in zip(PROMPTS, free.completions, strict=True)]
    assert free.texts == [
        bundled.model.decode(bundled.model.encode(p) + t) for p, t in zip(PROMPTS, free.tokens, strict=True)
    ]


@pytest.mark.parametrize(
    "stop, parts",
    [("", ("at least one character", "''")), ([""], ("''",)), (["a", 3], ("got 3",)), (["\ufffd"], ("U+FFFD",))],
)
def test_stop_strings_that_are_none_are_refused(bundled, stop, parts):
    with pytest.raises(ValueError) as error:
        bundled.generate(PROMPTS, 2, stop=stop)
    assert all(p in str(error.value) for p in parts) and "\n" not in str(error.value)


def test_text_is_refused_where_there_is_no_tokenizer(random_model):
    engine = alisa_jax.Engine(random_model(), "dense")
    for arguments in (dict(stop="a"), dict(on_text=print)):
        with pytest.raises(
            ValueError, match="stop strings and on_text need text, and the model random has no tokenizer"
        ):
            engine.generate([[1]], 2, **arguments)
    assert engine.compiles == 0


MARKS = ("<|im_end|>", "<|eot|>")


@pytest.fixture(scope="module")
def marked():
    """A tokenizer of one token a letter or special token; special tokens are ids 4 and 5."""
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate("ab c")}, merges=[]))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return made


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(st.integers(0, 5), max_size=14), st.data())
def test_stop_strings_may_hold_special_tokens(marked, new, data):
    part = st.sampled_from([*"ab c", *MARKS])
    some = st.lists(part, min_size=1, max_size=3).map("".join)
    stop = data.draw(st.lists(some, min_size=1, max_size=3))
    special = stops.special_in(marked, stop)
    assert special == {i: mark for i, mark in enumerate(MARKS, start=4) if any(mark in s for s in stop)}
    text = stops.Completion(lambda ids: marked.decode(list(ids)), [0], stop, stops.byte_runs(marked), special)
    pieces, taken = [], 0
    for token in new:
        taken += 1
        hit = text.push(token)
        pieces.append(text.show())
        if hit:
            break
    whole = text.end()
    assert "".join([*pieces, text.show()]) == whole
    for n in range(len(new) + 1):  # the first number of tokens whose text, special tokens included, holds a stop string
        full = marked.decode(new[:n], skip_special_tokens=False)
        for i in set(range(4, 6)) - set(special):  # those that no stop string names are no text at all
            full = full.replace(MARKS[i - 4], "")
        found = [i for s in stop if (i := full.find(s)) >= 0]
        if found:
            cut = full[: min(found)]
            assert (whole, taken) == (cut.replace(MARKS[0], "").replace(MARKS[1], ""), n)
            return
    assert (whole, taken) == (marked.decode(new), len(new))


def test_a_special_token_as_a_stop_string_ends_a_completion(bundled, free):
    row, tokens = max(enumerate(free.tokens), key=lambda pair: (1 in pair[1], pair[1].index(1) if 1 in pair[1] else 0))
    n, pieces = tokens.index(1) + 1, []
    made = bundled.generate(PROMPTS, NEW, eos_ids=(), stop="<|eos|>", on_text=lambda i, p: pieces.append((i, p)))
    assert made.finish_reasons[row] == "stop_string" and made.tokens[row] == tokens[:n]
    given = bundled.model.encode(PROMPTS[row])
    before, after = bundled.model.decode(given), bundled.model.decode(given + tokens[: n - 1])
    assert made.completions[row] == after[len(before) :]
    assert "".join(p for i, p in pieces if i == row) == made.completions[row]


def test_a_sequence_ends_at_the_model_s_own_eos_unless_told_otherwise(bundled, free):
    assert bundled.model.eos_ids == (1,)
    made = bundled.generate(PROMPTS, NEW)
    for tokens, whole, reason in zip(made.tokens, free.tokens, made.finish_reasons, strict=True):
        n = whole.index(1) + 1 if 1 in whole else NEW
        assert tokens == whole[:n] and reason == ("stop_token" if 1 in whole else "length")
    assert "stop_token" in made.finish_reasons
    other = max(free.tokens[0])
    assert bundled.generate(PROMPTS[:1], NEW, eos_ids=[other]).tokens == [
        free.tokens[0][: free.tokens[0].index(other) + 1]
    ]
