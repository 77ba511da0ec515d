"""The corpus and the recall episodes: the answers are where they are said to be, and nothing depends on chance."""

import hashlib

import numpy as np
import pytest

from eval.text import episodes

pytestmark = pytest.mark.slow

IDS = np.arange(2, 702)


def first_places(tokens, t):
    """Where, before position t, the token before t stood; by a plain loop."""
    return [i for i in range(t - 1) if tokens[i] == tokens[t - 1]]


@pytest.mark.parametrize("kind", episodes.KINDS)
@pytest.mark.parametrize("length", [17, 24, 37, 128, 509])
@pytest.mark.parametrize("bos_id", [None, 0])
def test_every_answer_follows_the_same_token_as_in_its_one_source(kind, length, bos_id):
    for seed in range(20):
        tokens, answers = episodes.recall_episode(np.random.default_rng(seed), IDS, length, kind, bos_id=bos_id)
        assert tokens.shape == answers.shape == (length,)
        assert tokens.dtype == np.int32 and answers.dtype == bool
        assert answers.any() and not answers[0]
        assert bos_id is None or tokens[0] == bos_id
        for t in np.flatnonzero(answers):
            sources = first_places(tokens, t)
            assert sources and {tokens[i + 1] for i in sources} == {tokens[t]}


@pytest.mark.parametrize("kind", episodes.KINDS)
def test_an_episode_is_a_function_of_the_seed(kind):
    one, two, other = (episodes.recall_episode(np.random.default_rng(s), IDS, 97, kind) for s in (5, 5, 6))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert (one[0] != other[0]).any()


def test_a_copy_keeps_the_asked_span_and_distance():
    tokens, answers = episodes.recall_episode(np.random.default_rng(3), IDS, 211, "copy", span=23, distance=151)
    places = np.flatnonzero(answers)
    assert len(places) == 22 and places[-1] - places[0] == 21
    np.testing.assert_array_equal(tokens[places], tokens[places - 151])
    assert len(set(tokens)) == 211 - 23


def test_a_copy_recurs_every_distance_tokens_while_it_fits():
    tokens, answers = episodes.recall_episode(np.random.default_rng(3), IDS, 100, "copy", span=20, distance=20)
    places = np.flatnonzero(answers)
    np.testing.assert_array_equal(tokens[places], tokens[places - 20])
    assert len(places) in (3 * 19, 4 * 19) and places[-1] > 80


def test_a_lookup_asks_each_pair_before_it_asks_one_twice():
    for seed in range(10):
        tokens, answers = episodes.recall_episode(np.random.default_rng(seed), IDS, 113, "lookup", span=7)
        values = tokens[answers]
        counts = np.unique(values, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1 or len(counts) < 7
        assert all((tokens[: np.flatnonzero(answers)[0]] == value).sum() == 1 for value in values)


def test_filler_stands_between_the_parts():
    filler = np.full(61, 7, np.int32)
    ids = np.arange(100, 200)
    tokens, answers = episodes.recall_episode(
        np.random.default_rng(0), ids, 61, "copy", filler=filler, span=5, distance=50
    )
    assert (tokens == 7).sum() == 61 - 10
    assert answers.sum() == 4 and (tokens[answers] >= 100).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "recite"}, "unknown kind of recall episode 'recite'; known: copy, lookup"),
        ({"length": 8}, "at least 17 tokens"),
        ({"length": 701}, "only 700 were given"),
        ({"filler": np.zeros(5, np.int32)}, "needs as many filler tokens, got 5"),
        ({"span": 40, "distance": 80}, "span <= distance <= 100 - span"),
        ({"kind": "lookup", "distance": 50}, "`distance` is for copies"),
        ({"kind": "lookup", "span": 60}, "pairs of"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, sentence):
    call = {"length": 100, "kind": "copy"} | arguments
    with pytest.raises(ValueError, match=sentence):
        episodes.recall_episode(np.random.default_rng(0), IDS, **call)


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


@pytest.fixture
def library(tmp_path):
    write(tmp_path, {f"package{i % 3}/module{i}.py": f"x = {i}\n".encode() for i in range(80)})
    return tmp_path


def test_the_split_is_disjoint_complete_and_by_path_alone(library):
    made = episodes.corpus(library)
    train, heldout = ({path for path, _ in part} for part in (made.train, made.heldout))
    assert not train & heldout and len(train | heldout) == 80
    for path in train | heldout:
        first = int(hashlib.sha256(path.encode()).hexdigest()[:16], 16)
        assert (first % 20 == 0) == (path in heldout)
    assert episodes.heldout_text(library) == "".join(text for _, text in made.heldout)


def test_the_hash_covers_the_bytes_of_the_held_out_files_only(library):
    before = episodes.corpus(library)
    (library / before.train[0][0]).write_text("changed = True\n")
    after = episodes.corpus(library)
    assert after.heldout_sha256 == before.heldout_sha256 and after.train_sha256 != before.train_sha256
    (library / before.heldout[0][0]).write_text("changed = True\n")
    assert episodes.corpus(library).heldout_sha256 != before.heldout_sha256


def test_files_that_are_no_library_code_are_left_out(library):
    before = episodes.corpus(library)
    write(
        library,
        {
            "test/a.py": b"a\n",
            "package0/tests/b.py": b"b\n",
            "site-packages/c.py": b"c\n",
            "_sysconfigdata_x.py": b"d\n",
            "latin.py": "# \u00e9\n".encode("latin-1"),
            "empty.py": b"",
            "notes.txt": b"not Python\n",
        },
    )
    assert episodes.corpus(library) == before


def test_a_folder_without_source_files_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no usable split of Python source files"):
        episodes.corpus(tmp_path)


def test_this_interpreters_library_gives_a_usable_split():
    made = episodes.corpus()
    size = {part: sum(len(text) for _, text in getattr(made, part)) for part in ("train", "heldout")}
    assert size["train"] > 2_000_000 and size["heldout"] > 50_000
    assert made == episodes.corpus()
