"""Names of models on the Hugging Face hub, and the folders that they stand for.

"owner/name", or "owner/name@revision" for a branch, a tag or a commit, is downloaded once into the
cache of huggingface_hub, an extra of this package that is imported here alone and when it is
needed. Only what `load` reads is taken: configuration, the files of a tokenizer, and safetensors,
or `.bin` weights where there are no others.
"""

from __future__ import annotations

import re
from pathlib import Path

from alisa_jax.models import bin, tokenizer
from alisa_jax.models.hf import CheckpointError
from alisa_jax.models.weights import BIN_INDEX, INDEX, WEIGHTS

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_CONFIG = "config.json"
_FILES = (_CONFIG, "generation_config.json", *tokenizer.FILES, "*.safetensors", INDEX)
_BIN_FILES = ("pytorch_model*.bin", BIN_INDEX)
ALLOWED = "a local Hugging Face folder, 'owner/name' or 'owner/name@revision' of the hub"


def locate(name: str, weights: bool = True) -> tuple[Path, str]:
    """The folder that a name stands for, and what to call the model.

    A path of this machine, there or not, is itself, and always wins; the model is called as its
    folder. A hub name is the folder of its files, downloaded where they are not in the cache, and
    the model keeps the name. weights: False downloads `config.json` alone. Raises CheckpointError,
    in one sentence, if that is not possible.
    """
    path = Path(name)
    if path.exists() or not _NAME.fullmatch(name):
        return path, path.resolve().name
    return _download(name, weights), name


def _download(name: str, weights: bool) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no folder here, and names of the hub need huggingface_hub; install "
            "'alisa-jax[hub]', or give a local Hugging Face folder."
        ) from error
    repository, _, revision = name.partition("@")

    def fetch(patterns: tuple[str, ...]) -> Path:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
        return Path(folder)

    try:
        if not weights:
            return fetch((_CONFIG,))
        folder = fetch(_FILES)
        if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
            bin.import_torch(f"the hub's {name}")
            folder = fetch((*_FILES, *_BIN_FILES))
    except CheckpointError:
        raise
    except Exception as error:  # the errors of the library and its network have no common base
        raise CheckpointError(
            f"{name!r} is no folder here, and {_reason(error)}; give {ALLOWED}."
        ) from error
    return folder


def _reason(error: Exception) -> str:
    """Why a download failed, by the names of errors: their modules differ between releases."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "the hub gives it out to accounts with permission only"
    if "RevisionNotFoundError" in kinds:
        return "the hub's model has no such revision"
    if "RepositoryNotFoundError" in kinds:
        return "the hub has no model of that name, or it is private"
    return f"the hub could not be reached or did not deliver it ({type(error).__name__})"
