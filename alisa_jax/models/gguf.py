"""GGUF files, in which llama.cpp keeps a whole model: settings, tokenizer and tensors.

    magic, version, two counts      little-endian, versions 2 and 3
    metadata                        keys with typed values (`gguf_config.py`, `gguf_tokenizer.py`)
    infos                           name, shape, type and place of each tensor
    data                            the tensors, most of them in blocks of quantised numbers

The head is read here, checked as it is read: it holds a hundred thousand short strings, for which
the reader of the package `gguf` needs seconds. Blocks are dequantised by that package, an extra of
this one that is imported here alone and when a file is opened.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import types
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from alisa_jax.models.hf import CheckpointError

SUFFIX, MAGIC = ".gguf", b"GGUF"
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotary frequencies; no parameter
_ALIGNMENT = 32  # of tensors, where the file does not say
_MOST_DIMS = 4
_AT_ONCE = 2**18  # numbers that are dequantised together, a multiple of every block
_TEXT, _ARRAY = 8, 9
_NUMBERS = types.MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_ENDS = types.MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_BLOCK = types.MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
# Which rows lie in the order of llama.cpp's rotary pairs, and whose heads they are.
_TURNED = types.MappingProxyType(
    {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
)


class Info(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]  # outermost first
    kind: str  # such as F16 or Q4_1
    start: int  # byte in the file
    n_bytes: int


class GgufFile:
    """One open file: metadata by key, and tensors by their Hugging Face names.

    Raises CheckpointError, in one sentence, for a file that is no GGUF, is damaged or is a part of
    several, and for a tensor that no LLaMA-like model has.
    """

    supported = tuple(
        "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 IQ2_XXS "
        "IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M IQ4_NL IQ4_XS".split()
    )

    def __init__(self, path: Path):
        self.path = path
        self._quants = _import_gguf(path)
        try:
            with path.open("rb") as file:
                start = file.read(len(MAGIC))
                if start != MAGIC:
                    raise CheckpointError(f"{path} is not a GGUF file: it begins with {start!r}.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self.metadata, self.infos = _read_head(data, path, self._quants)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except CheckpointError:
            raise
        except (struct.error, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}.") from error
        pieces = self.metadata.get("split.count", 0)
        if pieces > 1:
            raise CheckpointError(
                f"{path} is one of {pieces} pieces of a model; merge them into one file first."
            )
        self._stored = {self._name(name): name for name in self.infos if name != ROPE_FREQS}

    def __str__(self) -> str:
        return str(self.path)

    def setting(self, key: str, default: Any = None) -> Any:
        """The metadata of the file's architecture under `key`, such as "context_length"."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}", default)

    def keys(self) -> list[str]:
        return list(self._stored)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        info = self.infos[self._stored[name]]
        return info.shape, info.kind

    def read(self, name: str) -> np.ndarray:
        """The tensor as Hugging Face lays it out.

        A type of numbers is kept (bfloat16 is that of ml_dtypes); quantised blocks are float32.
        """
        stored = self._stored[name]
        array = self.read_stored(stored)
        heads = _TURNED.get(stored.split(".")[-2])
        if heads is None or self.metadata["general.architecture"] != "llama":
            return array
        # llama.cpp has channels 2i and 2i + 1 of a head as a pair, transformers i and i + H / 2.
        count = self.setting(heads, self.setting("attention.head_count"))
        pairs = array.reshape(count, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    def read_stored(self, stored: str) -> np.ndarray:
        """The tensor that the file calls `stored`, as it lies."""
        info = self.infos[stored]
        raw = np.fromfile(self.path, np.uint8, info.n_bytes, offset=info.start)
        plain = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(info.kind)
        if plain is not None:
            return raw.view(plain).reshape(info.shape)
        kind = self._quants.GGMLQuantizationType[info.kind]
        block, block_bytes = self._quants.GGML_QUANT_SIZES[kind]
        out, blocks = np.empty(math.prod(info.shape), np.float32), raw.reshape(-1, block_bytes)
        step = _AT_ONCE // block
        for start in range(0, len(blocks), step):
            row = blocks[start : start + step].reshape(1, -1)
            place = out[start * block : (start + step) * block]
            with np.errstate(all="ignore"):
                place[:] = self._quants.dequantize(row, kind)[0]
            if not np.isfinite(place).all():
                raise CheckpointError(
                    f"{self.path} is damaged: the tensor {stored} has blocks that are no numbers."
                )
        return out.reshape(info.shape)

    def _name(self, stored: str) -> str:
        """The Hugging Face name of a tensor."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
        layer, module, leaf = found.groups() if found else (None, None, None)
        name = (_ENDS if layer is None else _BLOCK).get(module)
        if name is None:
            raise CheckpointError(
                f"{self.path} holds the tensor {stored}, which no supported model has."
            )
        return f"{name}.{leaf}" if layer is None else f"model.layers.{int(layer)}.{name}.{leaf}"


class _Cursor:
    """Reads the head from its beginning on. Raises struct.error or ValueError past the end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        # The shortest decimal that is this float32: 1e-05 and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if form == "f" else value

    def text(self) -> str:
        size = self.number("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) != size:
            raise ValueError("a text goes beyond its end")
        self.at += size
        return str(raw, "utf-8")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"a list has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        if count * dtype.itemsize > len(self.data) - self.at:
            raise ValueError("a list goes beyond its end")
        values = np.frombuffer(self.data, dtype, count, self.at).tolist()
        self.at += count * dtype.itemsize
        return values


def _read_head(data: mmap.mmap, path: Path, quants: Any) -> tuple[dict[str, Any], dict[str, Info]]:
    """(metadata, where each tensor lies)."""
    cursor = _Cursor(data)
    cursor.at = len(MAGIC)
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is for big-endian machines, which is not read."
            if version & 0xFFFF == 0
            else f"{path} has version {version} of GGUF; read are 2 and 3."
        )
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"the key {key} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    found = [_read_info(cursor, quants) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    data_start = math.ceil(cursor.at / alignment) * alignment
    infos: dict[str, Info] = {}
    for name, info in found:
        info = info._replace(start=data_start + info.start)
        if name in infos:
            raise ValueError(f"the tensor {name} is there twice")
        if info.start + info.n_bytes > len(data):
            raise ValueError(
                f"the tensor {name} ends at byte {info.start + info.n_bytes}, and the file has "
                f"{len(data)}"
            )
        infos[name] = info
    return metadata, infos


def _read_info(cursor: _Cursor, quants: Any) -> tuple[str, Info]:
    name, n_dims = cursor.text(), cursor.number("I")
    if not 1 <= n_dims <= _MOST_DIMS:
        raise ValueError(f"the tensor {name} has {n_dims} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(n_dims)]))
    kind = quants.GGMLQuantizationType(cursor.number("I"))
    block, block_bytes = quants.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(
            f"the tensor {name} of {kind.name} has rows of {shape[-1]}, no multiple of {block}"
        )
    n_bytes = math.prod(shape) // block * block_bytes
    return name, Info(shape, kind.name, cursor.number("Q"), n_bytes)


def _import_gguf(path: Path):
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, which is read through the package gguf; install "
            "'alisa-jax[gguf]', or give a local Hugging Face folder."
        ) from error
    return gguf
