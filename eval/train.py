"""Train a small decoder on the standard library's source and on recall episodes, and export it.

    python -m eval.train --config=configs/train/pylib_1m.py --workdir=runs/pylib_1m --out=alisa_jax/bundled/pylib_1m

About half of the episodes are text windows, the others are recall (`eval.text.episodes`), whose loss counts the answers
only. The data of a step is a function of the seed and the step's number, so a run that was stopped and started again ends
with the same parameters, bit for bit, as one that was not. `--stop_at=N` trains up to step N at most and then exports; with
0 it exports the newest checkpoint. A run continues from its checkpoint under a changed config if the finished steps are the
same in both.

Without `--json` a summary goes to stdout; with it, stdout holds one JSON line, the record without its loss curve. The
whole record, loss curve and held-out list included, is `training.json` in the exported folder. `--figure=FILE.png` draws the
loss curve of the `training.json` that is in `--out`, and trains nothing:

    python -m eval.train --out=alisa_jax/bundled/pylib_1m --figure=eval/results/pylib_1m_training.png
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
from absl import flags, logging
from tqdm import tqdm

from alisa_jax.models import checkpoint
from alisa_jax.models.decoder import Decoder
from alisa_jax.records import environment
from eval.drawing import training
from eval.script import common
from eval.text import episodes
from eval.training import curriculum, learning

EVALUATED_LENGTHS = (128, 256, 512, 1024, 2048)
EVALUATED_EPISODES = 16  # of each kind and filler


def train(config: curriculum.TrainConfig, workdir, seed=0, stop_at=None, log_every=20, save_every=100, library=None):
    """Train from the newest checkpoint in `workdir`, or from nothing -> (params, tokenizer, held-out tokens, record).

    Stops after step `stop_at` (default: the end). `save_every` is a multiple of `log_every`; `library` is the folder of
    the text (default: the standard library). Raises ValueError where `workdir` holds a run with another past, seed or text.
    """
    if save_every % log_every:
        raise ValueError(f"save_every must be a multiple of log_every, got {save_every} and {log_every}")
    workdir = Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    files = episodes.corpus(library)
    tokenizer = _tokenizer(workdir / "tokenizer.json", files, config.model.vocab_size)
    stream, heldout = curriculum.encode(tokenizer, files.train), curriculum.encode(tokenizer, files.heldout)
    text = {"train_files": len(files.train), "train_sha256": files.train_sha256}
    text |= {"heldout_files": [path for path, _ in files.heldout], "heldout_sha256": files.heldout_sha256}
    source = {"seed": seed, "text": text}

    decoder, optimizer = Decoder(config.model), learning.optimizer(config)
    step_fn = learning.make_step(decoder, optimizer)
    params = learning.initial_params(decoder, jax.random.key(seed))
    state, done, history, wall_s = {"params": params, "opt_state": optimizer.init(params)}, 0, [], 0.0
    end = config.total_steps if stop_at is None else min(stop_at, config.total_steps)
    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
    with ocp.CheckpointManager(workdir / "checkpoints", options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            parts = {"state": ocp.args.StandardRestore(state), "run": ocp.args.JsonRestore()}
            restored = manager.restore(latest, args=ocp.args.Composite(**parts))
            state, run = restored["state"], restored["run"]
            if run["past"] != config.past(latest) or run["source"] != source:
                raise ValueError(f"{workdir} holds a run with another config, seed or text; give another workdir")
            done, history, wall_s = latest, run["history"], run["wall_s"]

        params, opt_state = state["params"], state["opt_state"]
        began, recent = time.perf_counter() - wall_s, []
        with tqdm(total=config.total_steps, initial=done, unit="step", disable=None) as bar:
            for step in range(done, end):
                stage = config.stage_at(step)
                batch = curriculum.make_batch(config, stage, stream, seed, step)
                params, opt_state, metrics = step_fn(params, opt_state, *batch)
                recent.append(metrics)
                bar.update()
                done = step + 1
                if done % log_every == 0 or done == end:
                    means = {key: float(np.mean([m[key] for m in recent])) for key in metrics}
                    history.append({"step": done, "length": stage.length, **means})
                    bar.set_postfix({key: f"{value:.3f}" for key, value in means.items()})
                    recent = []
                if done % save_every == 0 or done == end:
                    wall_s = time.perf_counter() - began
                    run = {"past": config.past(done), "source": source, "history": history, "wall_s": wall_s}
                    parts = {"state": ocp.args.StandardSave({"params": params, "opt_state": opt_state})}
                    manager.save(done, args=ocp.args.Composite(**parts, run=ocp.args.JsonSave(run)), force=True)
    record = {"steps": done, "trained_tokens": config.tokens(done), "wall_s": wall_s}
    record["heldout_bytes_per_token"] = sum(len(text.encode()) for _, text in files.heldout) / len(heldout)
    return params, tokenizer, heldout, record | {"config": dataclasses.asdict(config)} | source | {"history": history}


def export(config: curriculum.TrainConfig, params, tokenizer, heldout, record: dict, out) -> dict:
    """Write the folder that `alisa_jax.load` reads, in bfloat16, measure what it holds, and add `training.json`."""
    eos_ids = (curriculum.EOS_ID,)
    checkpoint.save(config.model, params, out, jnp.bfloat16, tokenizer, curriculum.BOS_ID, eos_ids)
    stored = checkpoint.load(out, dtype=jnp.float32)
    lengths = [n for n in EVALUATED_LENGTHS if n < config.context] + [config.context]
    measure = functools.partial(learning.evaluate, stored.decoder, stored.params, heldout)
    record = record | {
        "evaluation": [measure(n, EVALUATED_EPISODES, record["seed"] + 1) for n in lengths],
        "params": stored.decoder.count_params(),
        "non_embedding_params": stored.decoder.count_params(embedding=False),
        "environment": environment(),
        "optax": optax.__version__,
        "tokenizers": tokenizers.__version__,
    }
    part = Path(out) / "training.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(Path(out) / "training.json")
    return record


def main(argv: Sequence[str]) -> None:
    """flags -> config -> loop -> record."""
    values = flags.FlagValues()
    where = {"flag_values": values}
    flags.DEFINE_string("config", "configs/train/pylib_1m.py", "Python file that defines CONFIG.", **where)
    flags.DEFINE_string("workdir", "runs/pylib_1m", "Folder of checkpoints; a run stopped there goes on.", **where)
    flags.DEFINE_string("out", None, "Folder to export to; WORKDIR/export by default.", **where)
    flags.DEFINE_integer("seed", 0, "Seed of the weights and of the data.", lower_bound=0, **where)
    flags.DEFINE_integer("stop_at", None, "Stop after this step, not at the end.", lower_bound=0, **where)
    flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.", lower_bound=1, **where)
    flags.DEFINE_bool("json", False, "The record on stdout as one JSON line; all else on stderr.", **where)
    flags.DEFINE_bool("help", False, "Show this text.", short_name="h", **where)
    flags.DEFINE_string("figure", None, "Draw the loss curve of --out as this PNG and stop.", **where)
    values = common.parse(values, argv, __doc__)
    if values.figure:
        return _draw(values.out, values.figure)
    logging.set_verbosity(logging.WARNING)
    try:
        config = curriculum.load_config(values.config)
        out = Path(values.out or Path(values.workdir) / "export")
        out.mkdir(parents=True, exist_ok=True)
        (out / "training.json.part").touch()
        *trained, record = train(config, values.workdir, values.seed, values.stop_at, save_every=values.save_every)
        command = {"command": " ".join(["python -m eval.train", *argv[1:]])}
        record = export(config, *trained, command | record, out)
    except (ValueError, OSError) as error:
        raise common.UserError(str(error)) from None
    except KeyboardInterrupt:
        common.say("interrupted: the same command goes on from the newest checkpoint in --workdir")
        sys.exit(common.EXIT_INTERRUPTED)
    head = f"{record['steps']} steps, {record['trained_tokens']:,} tokens, {record['wall_s'] / 60:.0f} min -> {out}"
    columns = [key for key in record["evaluation"][0] if key.endswith(("length", "token", "accuracy"))]
    rows = [
        [common.number(row[key], "g" if key == "length" else ".3f") for key in columns] for row in record["evaluation"]
    ]
    short = {key: value for key, value in record.items() if key != "history"}
    common.emit([short], f"{head}\n{common.table(columns, rows, left=0)}", values.json)


def _draw(out: str | None, figure: str) -> None:
    """The loss curve of the record in the folder `out`."""
    if out is None:
        raise common.UserError("--figure draws the training.json of --out: give --out")
    path = Path(out) / "training.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise common.UserError(f"--out: no training record at {str(path)!r}: {error}") from None
    common.say(training.plot(record, Path(figure)))


def _tokenizer(path: Path, files: episodes.Corpus, vocab_size: int) -> tokenizers.Tokenizer:
    """The run's tokenizer: the one in its folder, or one trained on the training files and put there."""
    if not path.exists():
        trained = curriculum.train_tokenizer((text for _, text in files.train), vocab_size)
        path.with_suffix(".part").write_text(trained.to_str(), encoding="utf-8")
        path.with_suffix(".part").replace(path)
    return tokenizers.Tokenizer.from_file(str(path))


if __name__ == "__main__":
    sys.exit(common.run(main))
