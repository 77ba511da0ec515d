"""From a name or a folder to a model, and back to a folder.

| name | what is loaded |
| --- | --- |
| a folder | a Hugging Face folder |
| owner/name, owner/name@revision | the same from the hub (`hub.py`), if there is no such folder |
| a file FILE.gguf | a model of llama.cpp (`gguf.py`) |
| bundled | the model that comes with this package |
| smollm2-135m | SmolLM2-135M-Instruct, where `make real-model` has fetched it |
| random:NAME | a named shape (`shapes.py`) with random weights |

A folder has `config.json`, weights and, where present, `generation_config.json` and the files of a
tokenizer (`tokenizer.py`). Weights are safetensors or, without those, `.bin` files (`weights.py`),
in one file or in shards. `save` writes a folder that `load` and transformers both read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers

from alisa_jax.calibration import Calibration
from alisa_jax.models import dtypes, gguf, gguf_config, gguf_tokenizer, hub, names, smollm2
from alisa_jax.models import tokenizer as text_side
from alisa_jax.models.config import ModelConfig
from alisa_jax.models.decoder import Decoder, Params
from alisa_jax.models.hf import CheckpointError, config_from_hf, config_to_hf
from alisa_jax.models.pages import on_large_pages
from alisa_jax.models.params import cast, dtype_named, read_params
from alisa_jax.models.shapes import SHAPES
from alisa_jax.models.slots import expected_tensors, slots_of
from alisa_jax.models.weights import WEIGHTS, open_weights, read_json

BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "pylib_1m"
CONFIG, CALIBRATION = "config.json", "calibration.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder with its parameters and what is known about its text side."""

    decoder: Decoder
    params: Params
    tokenizer: tokenizers.Tokenizer | None  # None: a folder without one, or random weights
    name: str
    bos_id: int | None  # what the tokenizer puts before a text; None: nothing
    eos_ids: tuple[int, ...]  # what ends a text, of generation_config.json or config.json
    source: str  # the folder it was read from, or "random:NAME"
    text: text_side.TextSide | None = (
        None  # names of special tokens and chat template, where files have them
    )

    def calibration(self) -> Calibration | None:
        """The statistics that lie beside the weights as `calibration.json`, if any do."""
        path = Path(self.source or "") / CALIBRATION
        return Calibration.load(path) if self.source and path.is_file() else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` with what the tokenizer adds to it, a BOS for example.

        They are those of transformers, but for a text that begins with the BOS token: it has that
        token once. Raises CheckpointError without a tokenizer.
        """
        return self._text().encode(text)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `messages`, such as [{"role": "user", "content": "Hello"}].

        The model's chat template makes one text of them, which ends with the beginning of an answer
        unless `add_generation_prompt` is false. Special tokens that it writes become their ids, and
        none is added. Raises CheckpointError without a tokenizer, a chat template or jinja2, and
        for messages that the template refuses.
        """
        return self._text().encode_chat(messages, add_generation_prompt)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out.

        Raises CheckpointError without a tokenizer.
        """
        return self._text().tokenizer.decode(list(ids))

    def _text(self) -> text_side.TextSide:
        if self.tokenizer is None:
            raise CheckpointError(
                f"the model {self.name} has no tokenizer; give token ids instead of text."
            )
        return self.text or text_side.TextSide(self.tokenizer, self.bos_id, None, None, None)


def load(name_or_path: str | os.PathLike, dtype: Any = "auto", seed: int = 0) -> Model:
    """Load a model: a Hugging Face folder, a GGUF file, or a name; see the table above.

    Args:
      name_or_path: the folder, the file or the name. NAME is one of `SHAPES`.
      dtype: "float32", "float16" or "bfloat16" (or the NumPy type). "auto", or None, is float32
        on a CPU, and elsewhere the type that `config.json` states, or that of the token table where
        it states none; random weights are then float32, and so are quantised ones and the bundled
        model, whose file is bfloat16 to be small.
      seed: of random weights; not used otherwise.

    Raises:
      CheckpointError: in one sentence, for an unknown name, a path that is no folder, a name of
        the hub that cannot be had, a missing or damaged file, an unsupported architecture or
        setting, and a tensor missing, of a wrong shape or type, or of no use to the model.

    Warns (CheckpointWarning) of what is assumed where `config.json` is silent, and where the
    tensors say otherwise: see `agree.py`.
    """
    name = os.fspath(name_or_path)
    if dtypes.is_auto(dtype) and (name == "bundled" or name.startswith("random:")):
        dtype = "float32"
    if not dtypes.is_auto(dtype):
        dtype = dtype_named(dtype)  # what is wrong is said before anything is read
    if name.startswith("random:"):
        return _random(name, dtype, seed)
    folder, called = locate(name)
    if name == smollm2.NAME:
        smollm2.check(folder)
    if folder.suffix == gguf.SUFFIX and folder.is_file():
        return _from_gguf(folder, called, dtype)
    if not folder.is_dir():
        if name == "bundled":
            raise CheckpointError("the bundled model is not part of this installation.")
        what = f"is a file, and no {gguf.SUFFIX}" if folder.exists() else "is not a folder"
        raise CheckpointError(
            f"{name!r} {what}; give {hub.ALLOWED}, a file FILE{gguf.SUFFIX}, 'bundled', "
            f"{smollm2.NAME!r}, or 'random:NAME' with NAME one of {', '.join(SHAPES)}."
        )
    raw = read_json(folder / CONFIG)
    config = _config(folder / CONFIG, raw)
    stated = raw.get("dtype") or raw.get("torch_dtype")
    wanted = dtypes.resolve(dtype, stated, where=str(folder / CONFIG))
    generation = folder / "generation_config.json"
    ids = raw | (read_json(generation) if generation.exists() else {})
    text = text_side.read(folder, raw)  # cheap: before the weights
    decoder, params = read_params(open_weights(folder), config, wanted, folder)
    return Model(
        decoder=decoder,
        params=params,
        tokenizer=None if text is None else text.tokenizer,
        name=called,
        bos_id=_first(ids.get("bos_token_id")) if text is None else text.bos_id,
        eos_ids=_ids(ids.get("eos_token_id")),
        source=str(folder.resolve()),
        text=text,
    )


def save(
    config: ModelConfig,
    params: Params,
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    tokenizer: tokenizers.Tokenizer | None = None,
    bos_id: int | None = None,
    eos_ids: Iterable[int] = (),
) -> None:
    """Write the folder of a model: weights in `dtype` and, if given, tokenizer and special ids.

    The tokenizer that is written puts `bos_id`, where it is given, before a text. Every file
    appears whole or not at all, and `config.json` last, so a folder that has one is complete.
    Raises CheckpointError where the folder cannot be written or `params` do not have the shapes of
    `config`.
    """
    folder, wanted = Path(folder), dtype_named(dtype)
    if tokenizer is not None:
        tokenizer = text_side.with_bos(tokenizer, bos_id)
    raw = config_to_hf(config, wanted.name) | {
        "bos_token_id": bos_id,
        "eos_token_id": list(eos_ids) or None,
    }
    given = {
        (slot.path, slot.leaf): slot.value
        for slots in slots_of(config, params).values()
        for slot in slots
    }
    tensors = {}
    for name, slots in expected_tensors(Decoder(config)).items():
        pieces = []
        for path, leaf, spec in slots:
            array = given.get((path, leaf))
            if array is None or array.shape != spec.shape:
                has = "no such parameter" if array is None else f"shape {tuple(array.shape)}"
                raise CheckpointError(
                    f"{name} needs shape {spec.shape}, and the parameters have {has}."
                )
            pieces.append(cast(np.asarray(array), wanted, name))
        # The writer stores memory as it lies, so a view must be laid out first.
        tensors[name] = np.ascontiguousarray(names.join(pieces, config.head_dim))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(folder / WEIGHTS) as partial:
            safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
        if tokenizer is not None:
            with _whole(folder / "tokenizer.json") as partial:
                partial.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        special = {"bos_token_id": bos_id, "eos_token_id": list(eos_ids) or None}
        files = {"generation_config.json": special, CONFIG: raw}
        if tokenizer is not None:
            files = {text_side.TOKENIZER_CONFIG: dict(text_side.AS_IT_STANDS)} | files
        for file, content in files.items():
            with _whole(folder / file) as partial:
                partial.write_text(
                    json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
                )
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"the folder {folder} cannot be written: {error}") from error


def locate(name: str, weights: bool = True) -> tuple[Path, str]:
    """Where a model other than a random one lies, and what to call it; see `hub.locate`."""
    if name == "bundled":
        return BUNDLED, name
    if name == smollm2.NAME:
        return smollm2.find(), name
    path, called = hub.locate(name, weights)
    return path, called.removesuffix(gguf.SUFFIX)


def config_of(name_or_path: str | os.PathLike) -> ModelConfig:
    """The configuration of what `load` takes, or of a shape by its bare NAME; reads no weights.

    Raises CheckpointError, in one sentence, for what has none that `load` would read.
    """
    name = os.fspath(name_or_path)
    shape = name.removeprefix("random:")
    if shape in SHAPES:
        return SHAPES[shape]
    where, _ = locate(name, weights=False)
    if not where.exists():
        raise CheckpointError(f"{name!r} is no folder; known shapes: {', '.join(SHAPES)}.")
    if where.is_file():
        return _config(where, gguf_config.read(where))
    return _config(where / CONFIG, read_json(where / CONFIG))


def _config(where: Path, raw: Mapping[str, Any]) -> ModelConfig:
    try:
        return config_from_hf(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _from_gguf(path: Path, called: str, dtype: Any) -> Model:
    file = gguf.GgufFile(path)
    raw = gguf_config.to_hf(file)
    try:
        config = config_from_hf(raw)
        side, eos_ids = gguf_tokenizer.text_side(file.metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    wanted = dtypes.resolve(dtype, raw["torch_dtype"])
    decoder, params = read_params(dict.fromkeys(file.keys(), file), config, wanted, path)
    return Model(
        decoder=decoder,
        params=params,
        tokenizer=None if side is None else side.tokenizer,
        name=called,
        bos_id=None if side is None else side.bos_id,
        eos_ids=eos_ids,
        source=str(path.resolve()),
        text=side,
    )


def _random(name: str, dtype: np.dtype, seed: int) -> Model:
    shape = name.removeprefix("random:")
    if shape not in SHAPES:
        near = difflib.get_close_matches(shape, SHAPES, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise CheckpointError(
            f"{shape!r} is not a known shape{hint}; known are {', '.join(SHAPES)}."
        )
    decoder = Decoder(SHAPES[shape])
    params = on_large_pages(decoder.init(jax.random.key(seed), dtype))
    return Model(decoder, params, None, name, None, (), name)


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _first(value: Any) -> int | None:
    return next(iter(_ids(value)), None)


@contextlib.contextmanager
def _whole(path: Path):
    """A path to write to, moved to `path` when the block ends well and removed when it does not.

    The file gets the mode of any new file in the folder, where safetensors has the owner's alone.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
