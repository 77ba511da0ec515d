"""What a model is, as hashes over the files that change what a run gives: a finished cell is found by them.

Weights are hashed whole up to `WHOLE_BYTES` in all. Of more, each file gives its size, its first `HEAD_BYTES` (the header,
which in a .gguf holds the tokenizer as well) and blocks of `BLOCK_BYTES` at equal distances up to its end, so that tens of
gigabytes take seconds; `model_hash` of a record says which of the two was done. A change that lies between all blocks is
not seen: the distance is the size of all weights over `SAMPLED_BYTES / BLOCK_BYTES`.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alisa_jax.models.weights import BIN_INDEX, INDEX, WEIGHTS

WHOLE_BYTES = 512 * 2**20
HEAD_BYTES = 16 * 2**20
BLOCK_BYTES = 2**16
SAMPLED_BYTES = 64 * 2**20
ALL, SAMPLED = "all bytes", "sampled blocks"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template*",
    "additional_chat_templates/*",
)
GENERATION, CALIBRATION = "generation_config.json", "calibration.json"


@dataclass(frozen=True)
class Hashes:
    """SHA-256 in hexadecimal digits; None where there is no such file."""

    model_sha256: str | None = None  # of configuration and weights
    model_hash: str | None = None  # "all bytes" or "sampled blocks" of the weights
    tokenizer_sha256: str | None = None
    generation_sha256: str | None = None
    calibration_sha256: str | None = None

    def fields(self) -> dict:
        """As a record names them; random weights have none but the first."""
        return {"model_sha256": None} if self.model_sha256 is None else asdict(self)


def of(path: Path) -> Hashes:
    """The hashes of a model folder, or of a single file of weights. Raises OSError where a file cannot be read.

    A file that has not changed is read once by a process.
    """
    if path.is_file():
        return Hashes(*_weights(_seen([path])))
    config = path / "config.json"
    return Hashes(
        *_weights(_seen([config, *weight_files(path)])),
        _whole(_seen(file for name in TOKENIZER for file in sorted(path.glob(name)) if file.is_file())),
        _whole(_seen(file for file in [path / GENERATION] if file.is_file())),
        _whole(_seen(file for file in [path / CALIBRATION] if file.is_file())),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that `alisa_jax.load` may read weights from: safetensors, `.bin` where these are not a model, indices."""
    found = sorted(folder.glob("*.safetensors"))
    if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        found += sorted(folder.glob("*.bin"))
    return found + [folder / name for name in (INDEX, BIN_INDEX) if (folder / name).exists()]


def of_ids(sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256 of sequences of token ids, each with its length before it, as little-endian int64."""
    import numpy as np

    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.asarray([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()


Seen = tuple[Path, int, int, int]  # a file, its size in bytes, its time of change in ns, its number


def _seen(paths) -> tuple[Seen, ...]:
    found = []
    for path in paths:
        stat = path.stat()
        found.append((path, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _weights(files: tuple[Seen, ...]) -> tuple[str, str]:
    digest, total = hashlib.sha256(), sum(size for _, size, _, _ in files)
    for path, size, _, _ in files:
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb", buffering=0) as file:
            for start, length in [(0, size)] if total <= WHOLE_BYTES else blocks(size, total):
                file.seek(start)
                _feed(digest, file, length)
    return digest.hexdigest(), ALL if total <= WHOLE_BYTES else SAMPLED


@functools.lru_cache(maxsize=64)
def _whole(files: tuple[Seen, ...]) -> str | None:
    digest = hashlib.sha256()
    for path, size, _, _ in files:
        digest.update(f"{path.name} {size}\n".encode() + path.read_bytes())
    return digest.hexdigest() if files else None


def blocks(size: int, total: int) -> list[tuple[int, int]]:
    """(start, bytes) of what is read of a file of `size` bytes, when all files have `total`."""
    if size <= HEAD_BYTES + BLOCK_BYTES:
        return [(0, size)]
    count = max(2, -(-size * (SAMPLED_BYTES // BLOCK_BYTES) // total))
    room = size - BLOCK_BYTES - HEAD_BYTES  # the last block ends with the file
    starts = sorted({HEAD_BYTES + i * room // (count - 1) for i in range(count)})
    return [(0, HEAD_BYTES), *((start, BLOCK_BYTES) for start in starts)]


def _feed(digest, file, length: int) -> None:
    while length > 0:
        piece = file.read(min(length, 2**22))
        if not piece:
            return
        digest.update(piece)
        length -= len(piece)
