"""Windows: which tokens are scored, and how many bytes and words they are."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from eval.script.common import UserError, ratio_stderr
from eval.text import windows

pytestmark = pytest.mark.slow

TEXT = "def f(x):\n    return x + 1\n\nnaïve café 日本語 🙂🙂 zażółć\tend  of text\n" * 3


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["def return x end of text"] * 5, trainer)
    return tokenizer


sizes = st.integers(2, 23).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c), st.integers(0, 70)))


@given(sizes, st.booleans())
def test_windows_score_each_token_once_and_hold_no_more_than_the_context(size, bos):
    context, stride, extra = size
    n = context - bos + extra
    plan = windows.plan(n, context, stride, bos)
    scored = [t for w in plan for t in range(w.score, w.stop)]
    assert scored == sorted(set(scored))
    unscored = set(range(n)) - set(scored)
    if stride < context:
        assert unscored == (set() if bos else {0})
    elif bos:
        assert unscored == {t for t in range(n) if t % context == context - 1}
    else:
        assert unscored == {t for t in range(n) if t % context == 0}
    for w in plan:
        assert w.stop - w.start + bos <= context
        assert w.start % stride == 0 and w.start <= w.score < w.stop
        assert bos or w.score > w.start  # something stands before every scored token


def test_a_hand_written_plan_with_overlap():
    W = windows.Window
    assert windows.plan(11, context=5, stride=3, bos=True) == [
        W(0, 0, 4),
        W(3, 4, 7),
        W(6, 7, 10),
        W(9, 10, 11),
    ]
    assert windows.plan(11, context=5, stride=3, bos=False) == [W(0, 1, 5), W(3, 5, 8), W(6, 8, 11)]


def test_a_text_of_exactly_one_window_is_enough_and_one_token_less_is_refused():
    assert len(windows.plan(16, 17, 16, True)) == 1
    with pytest.raises(UserError, match="15 tokens, less than the 16 of one window with context=17"):
        windows.plan(15, 17, 16, True)


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_a_stride_outside_the_context_is_refused(stride):
    with pytest.raises(UserError, match=f"stride={stride}, context=8"):
        windows.plan(100, 8, stride, True)


def test_bytes_and_words_of_all_tokens_are_those_of_the_text(byte_level):
    text = windows.tokenize(TEXT, byte_level)
    assert text.byte_count.sum() == len(TEXT.encode())
    assert text.word_count.sum() == len(TEXT.split())
    assert (text.byte_count >= 0).all() and (text.word_count >= 0).all()


def test_bytes_of_any_prefix_are_those_of_its_decoding_and_no_character_is_cut(byte_level):
    whole = byte_level.encode(TEXT, add_special_tokens=False).ids
    shortened = 0
    for n in range(1, len(whole)):
        text = windows.tokenize(TEXT, byte_level, max_tokens=n)
        assert n - 4 < len(text.tokens) <= n
        shortened += len(text.tokens) < n
        prefix = byte_level.decode(text.tokens.tolist(), skip_special_tokens=False)
        assert "\ufffd" not in prefix and TEXT.startswith(prefix)
        assert text.byte_count.sum() == len(prefix.encode())
        assert text.word_count.sum() == len(prefix.split())
    assert shortened  # some cut would have gone through a character


def test_bytes_with_byte_fallback_tokens_are_exact(stories):
    text = windows.tokenize(TEXT, Tokenizer.from_file(str(stories / "tokenizer.json")))
    assert text.byte_count.sum() == len(TEXT.encode())
    assert text.word_count.sum() == len(TEXT.split())


def test_spread_windows_reach_both_ends_and_are_not_repeated():
    plan = windows.plan(16 * 20, 17, 16, True)
    some = windows.spread(plan, 7)
    assert len(some) == 7 and some[0] == plan[0] and some[-1] == plan[-1]
    assert windows.spread(plan, 500) == plan


@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_documents_are_the_beginnings_of_those_that_fill_one(byte_level, bos):
    body = 12 - bos
    long, short = ("abcdghijklmpqs " * 2, "zażółć gęślą jaźń", "return x, x, x, x, x, x"), ("end", "def f(x)")
    characters = f" {windows.DOCUMENT_END}\n".join([long[0], short[0], long[1], long[2], short[1], ""])
    source = windows.Source("t.txt", "0", characters)
    assert source.fields["windows_of"] == "documents"
    text, plan = windows.sample(source, byte_level, 12, 11, 9, bos)
    found = [windows.sequence(text, w, 7 if bos else None) for w in plan]
    wanted = [byte_level.encode(document.strip()).ids[:body] for document in long]
    assert found == [[7, *ids] if bos else ids for ids in wanted]
    assert [w.stop - w.score for w in plan] == [body if bos else body - 1] * 3
    assert int(text.byte_count.sum()) == sum(len(document.strip().encode()) for document in long)
    assert len(windows.sample(source, byte_level, 12, 11, 2, bos)[1]) == 2
    with pytest.raises(UserError, match="none of the 6 documents of t.txt has the"):
        windows.sample(source, byte_level, 200, 199, 2, bos)


def test_windows_of_a_text_without_documents_are_those_of_its_plan(byte_level):
    source = windows.Source("t.txt", "0", TEXT)
    text, plan = windows.sample(source, byte_level, 16, 15, 4, True)
    whole = windows.plan(len(text.tokens), 16, 15, True)
    assert set(plan) <= set(whole) and len(plan) == 4 and source.fields == {"data": "t.txt", "data_sha256": "0"}


def test_sequences_begin_with_bos_where_there_is_one():
    text = windows.Text(np.arange(10, dtype=np.int32), np.ones(10, int), np.ones(10, int))
    assert windows.sequence(text, windows.Window(3, 4, 6), 99) == [99, 3, 4, 5]
    assert windows.sequence(text, windows.Window(3, 4, 6), None) == [3, 4, 5]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffthe cat\r\n".encode())
    source = windows.read(str(tmp_path / "t.txt"))
    assert source.characters == "the cat\r\n"
    assert source.sha256 == hashlib.sha256("\ufeffthe cat\r\n".encode()).hexdigest()


def test_a_bos_that_the_text_has_is_not_there_twice(byte_level):
    marked = Tokenizer.from_str(byte_level.to_str())
    marked.add_special_tokens(["<s>"])
    bos_id = marked.token_to_id("<s>")
    marked.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    for characters, tokenizer in ((TEXT, marked), (f"<s>{TEXT}", marked), (TEXT, byte_level)):
        text = windows.tokenize(characters, tokenizer)
        assert text.tokens.tolist() == byte_level.encode(TEXT).ids
        assert text.byte_count.sum() == len(TEXT.encode())
    joined = windows.Source("t.txt", "0", f"<s>{TEXT}<|endoftext|>\n<s>{TEXT}")
    text, plan = windows.sample(joined, marked, 17, 16, 2, True)
    assert [text.tokens[w.start : w.stop].tolist() for w in plan] == [byte_level.encode(TEXT.strip()).ids[:16]] * 2


def test_reading_refuses_missing_empty_and_non_utf8_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    for name, why in [
        ("absent.txt", "No such file"),
        ("latin.txt", "not UTF-8: byte 2"),
        ("empty.txt", "is empty"),
    ]:
        with pytest.raises(UserError, match=why):
            windows.read(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot read"):
        windows.read(str(tmp_path))


def test_reading_keeps_line_ends_and_names_the_file_without_its_folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    source = windows.read(str(tmp_path / "a.txt"))
    assert source.characters == "one\r\ntwo" and source.name == "a.txt" and len(source.sha256) == 64


def test_the_stderr_of_equal_clusters_is_that_of_their_means():
    totals, counts = [3.0, 5.0, 7.0, 4.0], [2, 2, 2, 2]
    means = np.asarray(totals) / 2
    assert math.isclose(ratio_stderr(totals, counts), means.std(ddof=1) / 2)
    assert ratio_stderr([3.0], [2]) is None
