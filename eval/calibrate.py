"""Statistics of a model's queries, keys and values over a text, for the methods that choose channels by them.

    python -m eval.calibrate --model=FOLDER --text=FILE --out=FOLDER/calibration.json
    python -m eval.calibrate --model=bundled --digits=5 --out=alisa_jax/bundled/pylib_1m/calibration.json

The model reads `--tokens` tokens densely, in blocks of `--block_tokens` that begin with its BOS token where it has one. The
second command made the file of the bundled model from its training text, in half a minute on two cores. `--order=random`
shuffles the documents of the whole text by `--seed`, in pieces of at most 16384 characters, joins them, and cuts them into
blocks (so Double Sparsity takes 256 texts of at most 512 tokens); `running` reads the text in its order. The file holds, for
every channel over all tokens, the least and greatest k and v and the means of |q|, |k| and |q k|; `alisa_jax/calibration.py`
says why.

An engine reads the file calibration.json of the model's folder. The table shows the share of sum |q k| in the top quarter of
the channels by |q k|, |q| and |k| (0.25 if channels were equal), and the range of a head's widest channel over that of its
median channel, for keys and values; means over heads.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from eval.script import common, inputs
from eval.script.common import UserError
from eval.text import episodes, windows

TRAIN = "bundled:train"
TOKENS, BLOCK_TOKENS = 131072, 512
PIECE_CHARACTERS, PIECES_AT_ONCE = 16384, 64


def config(argv: Sequence[str]) -> tuple[flags.FlagValues, inputs.Card]:
    """The flags, checked as far as they can be without the model, and what the model is; raises UserError."""
    values = common.shared_flags(model="bundled", text="", out=None)
    del values.text, values.out, values.rerun  # they mean other things here
    where, one = {"flag_values": values}, {"lower_bound": 1, "flag_values": values}
    flags.DEFINE_string(
        "text", TRAIN, f"A UTF-8 file, {TRAIN} (what the bundled model learnt from) or {windows.BUNDLED}.", **where
    )
    flags.DEFINE_integer("tokens", None, f"Tokens to read. Default: {TOKENS}, or what the text has.", **one)
    flags.DEFINE_integer("block_tokens", None, f"Tokens of a block. Default: {BLOCK_TOKENS}, or the context.", **where)
    flags.DEFINE_enum("order", "random", ("random", "running"), "Blocks from the whole text, or as it stands.", **where)
    flags.DEFINE_integer("batch", 8, "Blocks that run together.", **one)
    flags.DEFINE_integer("digits", 9, "Significant digits of every number; 9 keep float32 as it is.", 1, 9, **where)
    flags.DEFINE_string("out", None, "The file to write, such as calibration.json.", **where)
    flags.DEFINE_bool("rerun", False, "Write --out anew where it is there already.", **where)
    common.dtype_flag(values)
    common.parse(values, argv, __doc__)
    if not 0 <= values.seed < 2**32:
        raise UserError(f"--seed must be in 0..{2**32 - 1}, got {values.seed}")
    if not values.out:
        raise UserError("give --out, the file to write, such as calibration.json")
    out = Path(values.out)
    if out.is_dir() or (out.exists() and not values.rerun):
        what = "a folder: give the file to write" if out.is_dir() else "there already; --rerun writes it anew"
        raise UserError(f"--out: {values.out!r} is {what}")
    card = inputs.card(values.model, values.dtype)
    if card.sha256 is None:
        raise UserError(f"--model: {card.name} has no tokenizer, which a text needs")
    block = min(BLOCK_TOKENS, card.max_positions) if values.block_tokens is None else values.block_tokens
    if not 2 <= block <= card.max_positions:
        raise UserError(f"--block_tokens must be in 2..{card.max_positions}, the context of {card.name}, got {block}")
    if values.tokens is not None and values.tokens < block:
        raise UserError(f"--tokens must be at least the {block} of one block, got {values.tokens}")
    values.block_tokens = block
    return values, card


def read(path: str) -> windows.Source:
    """The text `path`; documents of the bundled training text are its files. Raises UserError as `windows.read`."""
    if path != TRAIN:
        return windows.read(path)
    corpus = episodes.corpus()
    joined = windows.DOCUMENT_END.join(text for _, text in corpus.train)
    return windows.Source("stdlib-train", corpus.train_sha256, joined)


def blocks(source: windows.Source, model, values) -> np.ndarray:
    """Token ids [n, block_tokens]; raises UserError where the text is too short."""
    documents = (document.strip() for document in source.characters.split(windows.DOCUMENT_END))
    size, tokenizer = PIECE_CHARACTERS, inputs.tokenizer(model)
    pieces = [document[i : i + size] for document in documents for i in range(0, len(document), size)]
    if values.order == "random":
        np.random.default_rng(values.seed).shuffle(pieces)
    head = [] if model.bos_id is None else [model.bos_id]
    body = values.block_tokens - len(head)
    wanted = (TOKENS if values.tokens is None else values.tokens) // values.block_tokens
    ids: list[int] = []
    for i in range(0, len(pieces), PIECES_AT_ONCE):
        encoded = tokenizer.encode_batch(pieces[i : i + PIECES_AT_ONCE], add_special_tokens=False)
        ids.extend(token for one in encoded for token in one.ids)
        if len(ids) >= wanted * body:
            break
    n = min(wanted, len(ids) // body)
    if n < (1 if values.tokens is None else wanted):
        raise UserError(
            f"--tokens: {wanted} blocks of {values.block_tokens} tokens are asked for, and {source.name} has"
            f" {len(ids)} tokens, which make {n}"
        )
    found = np.array(ids[: n * body], np.int32).reshape(n, body)
    return np.concatenate([np.tile(np.array(head, np.int32), (n, 1)), found], axis=1)


def measure(calibration) -> dict:
    """The values of the record, lists by layer; see the module."""
    L, N, K, H = calibration.sizes
    weights = {"qk": calibration.qk_abs, "q": calibration.q_abs, "k": np.repeat(calibration.k_abs, N // K, axis=1)}
    held = {}
    for name, weight in weights.items():
        first = np.argsort(-weight, axis=-1, kind="stable")[..., : max(1, H // 4)]
        share = np.take_along_axis(calibration.qk_abs, first, -1).sum(-1) / calibration.qk_abs.sum(-1)
        held[f"held_frac_by_{name}_per_layer"] = share.mean(axis=1).tolist()
    for part in ("k", "v"):
        width = getattr(calibration, f"{part}_max") - getattr(calibration, f"{part}_min")
        widest = width.max(-1) / np.median(width, axis=-1)
        held[f"{part}_range_over_median_per_layer"] = widest.mean(axis=1).tolist()
    return held


def main(argv: Sequence[str], load: Callable = inputs.load) -> None:
    """flags -> config -> load -> dense pass -> file and record. The argument beside `argv` is for tests."""
    values, card = config(argv)
    source = read(values.text)
    model = inputs.model(inputs.loading(load, values.dtype), values.model)
    start = time.perf_counter()
    tokens = blocks(source, model, values)
    from alisa_jax.analysis.calibrate import calibrate

    data = f"{len(tokens)} {values.order} blocks of {values.block_tokens} tokens of {source.name}, seed {values.seed}"
    try:
        calibration = calibrate(model, tokens, values.batch, data, progress=True)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    out = Path(values.out)
    common.write(out, calibration.to_json(values.digits))
    names = "block_tokens order seed digits"
    cell = {"script": "eval.calibrate", **card.fields(), "data": source.name, "data_sha256": source.sha256}
    cell |= {name: getattr(values, name) for name in names.split()}
    found = {**measure(calibration), "blocks": len(tokens), "n": calibration.n_tokens, "out": out.name}
    how = {"implementation": "xla:dense", "warmup": 0, "repeats": 1, "batch": values.batch}
    record = inputs.record(None, cell, found, time.perf_counter() - start, how)
    common.emit([record], report(record), values.json)


def report(record: dict) -> str:
    """What people read."""
    parts = ("qk", "q", "k")
    columns = [record[f"held_frac_by_{name}_per_layer"] for name in parts]
    columns += [record[f"{part}_range_over_median_per_layer"] for part in ("k", "v")]
    rows = [(str(i), *(common.number(x) for x in row)) for i, row in enumerate(zip(*columns, strict=True))]
    head = ("layer", *(f"held by {name}" for name in parts), "k range", "v range")
    r = record
    return (
        f"{common.table(head, rows)}\n{r['model']} on {r['data']} ({r['data_sha256'][:12]}): {r['blocks']} {r['order']}"
        f" blocks of {r['block_tokens']} tokens, seed {r['seed']}; written to {r['out']}"
    )


if __name__ == "__main__":
    sys.exit(common.run(main))
