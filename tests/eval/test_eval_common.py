"""What the scripts share: where compiled programs are kept, files that are written in one step, and a model's card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alisa_jax.models import CheckpointWarning
from eval.script import common, inputs

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def config(monkeypatch, tmp_path):
    """No folder is named by the environment; what a test sets in JAX is undone."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def parse(*argv):
    return common.parse(common.shared_flags("bundled", "", None), ["x", *argv], "doc")


def test_programs_are_kept_in_the_users_folder_of_caches_by_default(config, tmp_path):
    parse()
    folder = tmp_path / "caches" / "alisa_jax"
    assert folder.is_dir() and jax.config.jax_compilation_cache_dir == str(folder)


def test_a_folder_can_be_named_and_none_as_well(config, tmp_path):
    parse(f"--compile_cache={tmp_path / 'here'}")
    assert (tmp_path / "here").is_dir() and jax.config.jax_compilation_cache_dir == str(tmp_path / "here")
    parse("--compile_cache=none")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here") and not (tmp_path / "caches").exists()


def test_the_environment_goes_before_the_default(config, monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
    parse()
    assert jax.config.jax_compilation_cache_dir == before and not (tmp_path / "caches").exists()


def test_a_folder_that_cannot_be_made_is_told_and_stops_only_who_named_it(config, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="--compile_cache: cannot make the folder"):
        parse(f"--compile_cache={tmp_path / 'file' / 'in'}")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    parse()
    assert "compiled programs are not kept" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    code = """
import sys, jax, jax.numpy as jnp
from eval.script import common
hits = []
jax.monitoring.register_event_listener(lambda event, **kwargs: hits.append(event) if "cache_hit" in event else None)
common.keep_programs(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(3))[0, 0], len(hits))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    root = Path(common.__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "programs")]
    first, second = (
        subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first[0] == second[0] and first[1] == "0" and int(second[1]) > 0


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    common.write(tmp_path / "new" / "a.md", "one")
    common.write(tmp_path / "new" / "a.md", "two")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.md"] and (
        tmp_path / "new" / "a.md"
    ).read_text() == "two"
    (tmp_path / "b.md").mkdir()
    with pytest.raises(common.UserError, match="cannot write 'b.md'"):
        common.write(tmp_path / "b.md", "three")
    assert not list(tmp_path.glob("*.part"))


def test_the_card_of_a_model_has_the_context_that_load_gives_it(tmp_path):
    raw = {"model_type": "mistral", "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.warns(CheckpointWarning, match="no max_position_embeddings; 131072 are assumed"):
        assert inputs.card(str(tmp_path)).max_positions == 131072
    (tmp_path / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 64, "sliding_window": 48}))
    with pytest.warns(CheckpointWarning, match="its context is 48 tokens here, not 64"):
        assert inputs.card(str(tmp_path)).max_positions == 48


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"max_position_embeddings": "64"}', "--model: max_position_embeddings is '64'; it must be a whole number"),
        ("version https://git-lfs.github.com/spec/v1\n", "config.json is a pointer of git-lfs"),
        ("[]", "is no model configuration"),
    ],
)
def test_the_card_of_a_model_says_what_is_wrong_with_its_configuration(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(common.UserError, match=message):
        inputs.card(str(tmp_path))
