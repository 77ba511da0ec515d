"""What finds a finished cell: hashes over every file that changes a result, whole or in blocks, and over the ids scored."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_jax import records
from eval.script import hashes, inputs
from eval.script.common import UserError

SAYS_SOMETHING = {"script": "test"}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "one" / "checkpoint-1000"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "tokenizer.json").write_text("{}")
    return made


def found_again(path, before: inputs.Card, after: inputs.Card) -> bool:
    """Whether a cell of the model `after` finds the record of `before`."""
    results = records.Results(path)
    results.add(records.make_record(SAYS_SOMETHING | before.fields(), {"n": 1}))
    return results.find(SAYS_SOMETHING | after.fields()) is not None


def test_folders_that_differ_after_16_mib_do_not_share_a_cell(folder, tmp_path):
    start = bytes(16 * 2**20)
    (folder / "model.safetensors").write_bytes(start + b"step 1000 of one run")
    other = tmp_path / "two" / folder.name
    shutil.copytree(folder, other)
    assert found_again(tmp_path / "r.jsonl", inputs.card(str(folder)), inputs.card(str(other)))  # the same, elsewhere
    (other / "model.safetensors").write_bytes(start + b"step 1000 of another")
    one, two = inputs.card(str(folder)), inputs.card(str(other))
    assert (one.name, one.hashes.model_hash) == (two.name, "all bytes") and one.sha256 != two.sha256
    assert not found_again(tmp_path / "s.jsonl", one, two)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja"),
        *("generation_config.json", "calibration.json"),
    ],
)
def test_a_file_that_comes_is_repaired_or_goes_makes_new_cells(folder, tmp_path, name):
    path, cards = folder / name, []
    path.unlink(missing_ok=True)
    for content in (None, "{}", "{ }", None):
        path.parent.mkdir(exist_ok=True)
        path.unlink() if content is None and path.exists() else content and path.write_text(content)
        cards.append(inputs.card(str(folder)))
    absent, new, repaired, gone = cards
    assert absent == gone and len({str(c.fields()) for c in cards}) == 3
    assert {c.sha256 for c in cards} == {absent.sha256}  # the weights are the same
    for i, (a, b) in enumerate([(absent, new), (new, repaired), (repaired, gone)]):
        assert not found_again(tmp_path / f"{i}.jsonl", a, b)


def test_a_hash_of_all_bytes_is_that_of_names_sizes_and_contents(folder):
    """Records of small models keep the hash that they were made with."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    assert inputs.card(str(folder)).sha256 == digest.hexdigest()
    golden = records.read(Path(__file__).parents[2] / "eval" / "results" / "golden.jsonl")
    assert inputs.card("bundled").sha256 in {r["model_sha256"] for r in golden if r["model"] == "bundled"}


def test_weights_that_load_reads_are_hashed_beside_files_that_it_does_not(folder):
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"one")
    before = inputs.card(str(folder)).sha256
    (folder / "pytorch_model.bin").write_bytes(b"two")
    assert inputs.card(str(folder)).sha256 != before
    (folder / "model.safetensors.index.json").write_text("{}")  # says which shard holds what
    assert inputs.card(str(folder)).sha256 != before


def test_one_file_of_weights_has_a_hash(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF and tensors")
    one = hashes.of(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF and tensorz")
    assert one.model_hash == "all bytes" and one.model_sha256 != hashes.of(tmp_path / "m.gguf").model_sha256


def test_a_file_is_read_once_by_a_process(folder):
    inputs.card(str(folder))
    read = hashes._weights.cache_info().misses
    assert inputs.card(str(folder)) == inputs.card(str(folder)) and hashes._weights.cache_info().misses == read


def test_a_file_that_cannot_be_read_is_told(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"--model: no model at .*No such file or directory \(config.json\)"):
        inputs.card(str(folder))


@settings(max_examples=100)
@given(st.integers(0, 10**11), st.integers(0, 10**12))
def test_blocks_lie_in_order_from_the_first_byte_to_the_last(size, others):
    found = hashes.blocks(size, max(hashes.WHOLE_BYTES + 1, size + others))
    assert found[0][0] == 0 and sum(found[-1]) == size
    if len(found) > 1:
        starts = [start for start, _ in found]
        assert starts == sorted(set(starts)) and found[0] == (0, hashes.HEAD_BYTES)
        distances = [b - a for a, b in itertools.pairwise(starts[1:])]
        assert max(distances, default=0) - min(distances, default=0) <= 1  # spread evenly
        assert sum(length for _, length in found) <= hashes.HEAD_BYTES + hashes.SAMPLED_BYTES + 2 * hashes.BLOCK_BYTES


def test_of_large_weights_head_tail_size_and_blocks_count_and_the_record_says_so(folder, monkeypatch):
    monkeypatch.setattr(hashes, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(hashes, "HEAD_BYTES", 64)
    monkeypatch.setattr(hashes, "BLOCK_BYTES", 8)
    monkeypatch.setattr(hashes, "SAMPLED_BYTES", 80)
    path, content = folder / "model.safetensors", bytearray(range(200)) * 20

    def card(data) -> inputs.Card:
        path.write_bytes(data)
        hashes._weights.cache_clear()
        return inputs.card(str(folder))

    whole = card(content)
    assert whole.fields()["model_hash"] == "sampled blocks"
    total = len(content) + (folder / "config.json").stat().st_size
    read = {i for start, length in hashes.blocks(len(content), total) for i in range(start, start + length)}
    assert {0, 63, len(content) - 1} <= read and len(read) <= 64 + 80 + 16
    for i in (0, 63, len(content) - 1, sorted(read)[len(read) // 2 + 20]):
        changed = content.copy()
        changed[i] ^= 1
        assert card(changed).sha256 != whole.sha256
    assert card(content + b"x").sha256 != whole.sha256 and card(content).sha256 == whole.sha256


def test_ids_are_hashed_with_their_borders():
    assert hashes.of_ids([[1, 2], [3]]) == hashes.of_ids([(1, 2), (3,)])
    assert len({hashes.of_ids(ids) for ids in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2], [4]], [])}) == 5
