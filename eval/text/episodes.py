"""Text and recall tasks for training and evaluation: both are made on the machine, nothing is downloaded.

Text is the source of the Python standard library as found on this machine. A file is held out when the first 8 bytes
of the SHA-256 of its path (relative to the library's folder) are divisible by 20 as a big-endian number, so the split
depends neither on the order of files nor on their contents; two machines with the same
`Corpus.heldout_sha256` hold out the same bytes.

Recall episodes are token sequences in which some tokens are decided by an earlier part of the sequence:

    copy      BOS  filler  segment  filler  segment ...            answers: each later segment but for its first token
    lookup    BOS  key value key value ...  filler  key value ...  answers: the values of the queried keys

`answer_mask[t]` marks token t as such an answer. Random tokens are drawn without repetition within an episode, so
that an answer is decided by the one earlier place where the token before it stood.
"""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT_ONE_IN = 20
KINDS = ("copy", "lookup")
# Tests are not library code; the other folders are not part of the library proper, or hold generated tables.
EXCLUDED_FOLDERS = frozenset(
    "test tests idlelib lib2to3 site-packages dist-packages __pycache__ encodings pydoc_data".split()
)
EXCLUDED_PREFIXES = (
    "_sysconfigdata",
    "config-",
)  # written when the interpreter was built: they differ by machine


@dataclass(frozen=True)
class Corpus:
    """Files as (path relative to the library's folder, text), sorted by path."""

    train: tuple[tuple[str, str], ...]
    heldout: tuple[tuple[str, str], ...]

    @property
    def heldout_sha256(self) -> str:
        """Hash over the paths and bytes of the held-out files, in order."""
        return _sha256(self.heldout)

    @property
    def train_sha256(self) -> str:
        """Hash over the paths and bytes of the training files, in order."""
        return _sha256(self.train)


def corpus(root: str | Path | None = None) -> Corpus:
    """Read every `.py` file under `root` (default: this interpreter's standard library) and split it.

    Left out: `EXCLUDED_FOLDERS` at any depth, names that start with `EXCLUDED_PREFIXES`, empty files and files that
    are not UTF-8. Raises FileNotFoundError where either part of the split would be empty.
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    parts: tuple[list, list] = ([], [])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS & set(relative.parts) or any(p.startswith(EXCLUDED_PREFIXES) for p in relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            parts[is_held_out(relative.as_posix())].append((relative.as_posix(), text))
    if not parts[False] or not parts[True]:
        raise FileNotFoundError(f"no usable split of Python source files under {str(root)!r}")
    return Corpus(train=tuple(parts[False]), heldout=tuple(parts[True]))


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the held-out part; `relative_path` has forward slashes."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def heldout_text(root: str | Path | None = None) -> str:
    """The held-out files of `corpus(root)`, one after the other."""
    return "".join(text for _, text in corpus(root).heldout)


def recall_episode(
    rng: np.random.Generator,
    ids: Sequence[int],  # token ids to draw from: the vocabulary without special tokens
    length: int,
    kind: str,
    *,
    bos_id: int | None = None,
    filler: np.ndarray | None = None,
    span: int | None = None,
    distance: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One episode: (tokens [length] int32, answer_mask [length] bool). Deterministic in the state of `rng`.

    `filler`: token ids (`length` of them or more, e.g. real text) to use between the parts instead of random ids; an
    answer may then have other sources than the one meant. `span`: tokens of the copied segment, or pairs of the lookup;
    random by default. `distance`: copy only, tokens from the start of the segment to the start of its copy; random by
    default. The segment is copied every `distance` tokens for as long as it fits. In a lookup the range follows from
    the order of the queries, which is random.
    Keys and values of a lookup have one or two tokens each, the same within an episode.
    Raises ValueError for an unknown kind, for parts that do not fit and for too few ids.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of recall episode {kind!r}; known: {', '.join(KINDS)}")
    if length < 17:
        raise ValueError(f"a recall episode needs at least 17 tokens, got length={length}")
    if len(ids) < length:
        raise ValueError(f"an episode of {length} tokens draws that many different ids, but only {len(ids)} were given")
    if filler is not None and len(filler) < length:
        raise ValueError(f"an episode of {length} tokens needs as many filler tokens, got {len(filler)}")
    fresh = rng.permutation(np.asarray(ids, np.int32))[:length]
    head = 0 if bos_id is None else 1
    build = _copy if kind == "copy" else _lookup
    tokens, answers = build(rng, fresh, length - head, filler, span, distance)
    if head:
        tokens, answers = np.concatenate([[bos_id], tokens]), np.concatenate([[False], answers])
    return tokens.astype(np.int32), answers


def _copy(rng, fresh, length, filler, span, distance):
    if distance is None:
        # Log-uniform, so that near and far copies are equally common at any length.
        low, high = (span, length - span) if span is not None else (8, 3 * length // 4)
        distance = int(low * (high / low) ** rng.random())
    if span is None:
        span = most = min(distance, length - distance)
        if rng.random() < 0.5:
            span = int(rng.integers(4, most + 1))
    if not 2 <= span <= distance <= length - span:
        raise ValueError(f"a copy needs 2 <= span <= distance <= {length} - span, got {span=}, {distance=}")
    start = int(rng.integers(0, min(distance, length - span - distance) + 1))
    tokens = fresh[:length].copy() if filler is None else filler[:length].copy()
    tokens[start : start + span] = fresh[start : start + span]
    answers = np.zeros(length, bool)
    for copy in range(start + distance, length - span + 1, distance):
        tokens[copy : copy + span] = tokens[start : start + span]
        answers[copy + 1 : copy + span] = True
    return tokens, answers


def _lookup(rng, fresh, length, filler, span, distance):
    if distance is not None:
        raise ValueError("`distance` is for copies; in a lookup it follows from the order of the queries")
    key, value = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    width = key + value
    most = length // (2 * width)  # so that every pair can be asked once
    pairs = int(rng.integers(2, most + 1)) if span is None else span
    if not 2 <= pairs <= most:
        raise ValueError(f"a lookup of {length} tokens holds 2 to {most} pairs of {width} tokens, got {pairs}")
    asked = (length - pairs * width) // width
    if rng.random() < 0.5:
        asked = int(rng.integers(1, asked + 1))
    table = fresh[: pairs * width].reshape(pairs, width)
    order = np.concatenate([rng.permutation(pairs) for _ in range(asked // pairs + 1)])[:asked]
    gap = length - (pairs + asked) * width
    middle = fresh[pairs * width :][:gap] if filler is None else filler[:gap]
    tokens = np.concatenate([table.ravel(), middle, table[order].ravel()])
    answers = np.zeros(length, bool)
    answers[length - asked * width :].reshape(asked, width)[:, key:] = True
    return tokens, answers


def _sha256(files) -> str:
    digest = hashlib.sha256()
    for path, text in files:
        digest.update(path.encode() + b"\0" + text.encode() + b"\0")
    return digest.hexdigest()
