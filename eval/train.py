"""Train a small decoder on the standard library's source and on recall episodes, and export it.

    python -m eval.train --config=configs/train/pylib_1m.py --workdir=runs/pylib_1m --out=alisa_jax/bundled/pylib_1m

Half of the episodes (the shares are the config's) are text windows, half are recall (`eval.episodes`), whose loss counts
the answers only. Everything that a step sees is a function of the seed and of the step's number, so a run that was
stopped and started again ends with the same parameters, bit for bit, as one that was not. `--stop_at=N` trains up to step
N at most and then exports: with 0, the newest checkpoint is exported as it is.

Without `--json` a summary goes to stdout; with it, stdout holds one JSON line, the record without its loss curve. Progress
goes to stderr. The whole record, loss curve and held-out list included, is `training.json` in the exported folder.
"""

import dataclasses
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
from absl import app, flags, logging
from tqdm import tqdm

from alisa_jax.models import checkpoint
from alisa_jax.models.decoder import Decoder, ModelConfig
from alisa_jax.models.rope import rotate
from alisa_jax.records import environment
from eval import episodes

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID, FIRST_ORDINARY_ID = 0, 1, 2
QUERY_BLOCK = 128
PREVIOUS_TOKEN_LOGIT = 32.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """`steps` steps of `batch` episodes of `length` tokens; `copy` and `lookup` are shares, the rest is text.

    Recall draws from the first `ids` ordinary token ids: with few of them, copying is learnt several times sooner.
    """

    steps: int
    length: int
    batch: int
    copy: float
    lookup: float
    ids: int

    def __post_init__(self):
        if min(self.steps, self.batch) < 1 or self.length < 32:
            raise ValueError(f"a stage needs steps >= 1, batch >= 1 and length >= 32, got {self}")
        if min(self.copy, self.lookup) < 0 or self.copy + self.lookup > 1:
            raise ValueError(f"the shares of a stage must be at least 0 and sum to at most 1, got {self}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run. The learning rate rises over `warmup_steps`, stays, and falls to a tenth over the last `decay_steps`."""

    model: ModelConfig
    stages: tuple[Stage, ...]
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    weight_decay: float
    beta2: float
    clip_norm: float
    answer_weight: float  # weight of an answer of a recall episode against a token of text

    @property
    def context(self) -> int:
        """The longest stage, in tokens."""
        return max(stage.length for stage in self.stages)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def decay_begin(self) -> int:
        return self.total_steps - self.decay_steps

    def past(self, step: int) -> dict:
        """All that the first `step` steps depend on, as plain values: a stopped run may go on with another future."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("stages", "decay_steps")}
        stages, left = [], step
        for stage in self.stages:
            if (taken := min(left, stage.steps)) > 0:
                stages.append(dataclasses.asdict(stage) | {"steps": taken})
                left -= taken
        decay = [self.decay_begin, self.decay_steps] if self.decay_begin < step else None
        return fields | {"stages": stages, "decay": decay}

    def stage_at(self, step: int) -> Stage:
        """The stage of step `step` (from 0)."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


def load_config(path: str) -> TrainConfig:
    """Read `CONFIG` of a Python file; raises ValueError in one sentence for what does not make a run."""
    if not Path(path).is_file():
        raise ValueError(f"no training config at {path!r}")
    values = runpy.run_path(path).get("CONFIG")
    try:
        config = TrainConfig(
            **{
                **values,
                "model": ModelConfig(**values["model"]),
                "stages": tuple(Stage(**s) for s in values["stages"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path!r} does not define a CONFIG as eval.train reads it: {error}") from None
    if config.context > config.model.max_positions:
        raise ValueError(f"{path!r} has a stage longer than max_positions={config.model.max_positions}")
    return config


def train_tokenizer(texts, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of `vocab_size` entries, the first two of which open and close a document."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, files) -> np.ndarray:
    """Files one after the other, each as BOS text EOS: [n] int32."""
    encoded = tokenizer.encode_batch([text for _, text in files], add_special_tokens=False)
    return np.concatenate([[BOS_ID, *e.ids, EOS_ID] for e in encoded]).astype(np.int32)


def make_batch(config: TrainConfig, stage: Stage, stream: np.ndarray, seed: int, step: int):
    """The batch of step `step`: tokens [B, T] int32, weights [B, T] float32 (of token t as a target), text rows [B] bool."""
    rng = np.random.default_rng([seed, step])
    tokens = np.empty((stage.batch, stage.length), np.int32)
    weights = np.ones((stage.batch, stage.length), np.float32)
    is_text = np.zeros(stage.batch, bool)
    cuts, offset = np.cumsum([stage.copy, stage.lookup]), rng.random()
    for row in range(stage.batch):
        start = rng.integers(0, len(stream) - stage.length)
        window = stream[start : start + stage.length]
        bos_id = BOS_ID if rng.random() < 0.5 else None
        # Kinds are dealt by share, not drawn: every batch of a stage has the same mix, up to one row.
        kind = int(np.searchsorted(cuts, (row + offset) / stage.batch, side="right"))
        if kind < len(episodes.KINDS):
            ids = np.arange(FIRST_ORDINARY_ID, config.model.vocab_size)[: stage.ids]
            filler = window if rng.random() < 0.5 else None
            tokens[row], answers = episodes.recall_episode(
                rng, ids, stage.length, episodes.KINDS[kind], bos_id=bos_id, filler=filler
            )
            weights[row] = config.answer_weight * answers
        else:
            tokens[row], is_text[row] = window, True
            tokens[row, 0] = window[0] if bos_id is None else bos_id
    weights[:, 0] = 0
    return tokens, weights, is_text


def causal_attend(q: jax.Array, k: jax.Array, v: jax.Array):
    """q [B, T, N, H], k and v [B, T, K, H] -> (out [B, T, N, H], None): softmax(q k^T H**-0.5 + causal mask) v.

    In blocks of queries, each against the keys up to its end, which saves nearly half of the work at T = 1024.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G = N // K
    q = (q * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, T], [B, K, T, H]
    outs = []
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        n = end - begin
        logits = q[:, :, :, begin:end].reshape(B, K, G * n, H) @ k[..., :end]
        hidden = jnp.arange(end)[None, :] > jnp.arange(begin, end)[:, None]
        logits = jnp.where(hidden[None, None, None], -jnp.inf, logits.reshape(B, K, G, n, end))
        probs = jax.nn.softmax(logits, axis=-1).reshape(B, K, G * n, end)
        outs.append((probs @ v[:, :, :end]).reshape(B, K, G, n, H))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), None


def token_losses(decoder: Decoder, params: Any, tokens: jax.Array):
    """(nats [B, T-1] of tokens 1.. given what precedes them, whether argmax hits them [B, T-1] bool)."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    x = decoder.embed(params, tokens, positions)
    for layer in range(decoder.config.n_layers):
        x, _ = decoder.block(params, layer, x, positions, causal_attend)
    logits = decoder.unembed(params, x[:, :-1])
    targets = tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == targets


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; weight decay on matrices only."""
    peak = config.learning_rate
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, config.warmup_steps),
            optax.linear_schedule(peak, 0.1 * peak, config.decay_steps),
        ],
        [max(config.warmup_steps, config.decay_begin)],
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def initial_params(decoder: Decoder, key: jax.Array):
    """Random parameters of a LLaMA, nudged towards the circuit that recall needs; training finds the rest much sooner.

    In layer 0, half of the heads attend to the previous token: all tokens share one direction, which their queries and keys
    map to vectors that agree best one position apart. In the layers above, half of the variance of each q is that of its k
    and half of each o that of its v transposed, so that at first equal tokens attend to each other and what is attended is
    copied ("mimetic initialisation", arXiv 2305.09828, here with a positive sign for values).
    """
    c = decoder.config
    init_key, shared_key = jax.random.split(key)
    params, groups = decoder.init(init_key), c.n_heads // c.n_kv_heads
    first, *others = params["blocks"]

    shared = jax.random.normal(shared_key, (c.d_model,))
    shared = shared / jnp.linalg.norm(shared)
    quick = jnp.where(
        jnp.arange(c.head_dim) < max(1, c.head_dim // 6), 1.0, 0.0
    )  # the fastest rotary frequencies
    # The norm sends half of each token's length, (D / 2) ** 0.5, along `shared`: the logit one apart is PREVIOUS_TOKEN_LOGIT.
    quick = quick * (2 * PREVIOUS_TOKEN_LOGIT * c.head_dim**0.5 / c.d_model / jnp.sum(quick)) ** 0.5
    one = jnp.ones((1, 1), jnp.int32)
    later = rotate(quick[None, None, None, :], one, c.rope_theta, c.rope_scaling)
    half = max(1, c.n_kv_heads // 2)
    q, k = jnp.tile(quick, half * groups), jnp.tile(later.ravel(), half)
    for name, vector in (("q", q), ("k", k)):
        kernel = first[name]["kernel"]
        first[name] = {"kernel": kernel.at[:, : vector.size].add(shared[:, None] * vector[None, :])}
    table = params["embed"]["tokens"]["table"]
    params["embed"] = {"tokens": {"table": table + shared[None, :]}}

    for block in others:
        q, k, v, o = (block[name]["kernel"] for name in "qkvo")
        k, v = (
            jnp.repeat(x.reshape(c.d_model, c.n_kv_heads, c.head_dim), groups, axis=1).reshape(c.d_model, -1)
            for x in (k, v)
        )
        block["q"] = {"kernel": (q + k) * 0.5**0.5}
        block["o"] = {"kernel": (o + v.T * (jnp.std(o) / jnp.std(v))) * 0.5**0.5}
    return params


def make_step(decoder: Decoder, tx: optax.GradientTransformation):
    """The jitted train step: (params, opt_state, tokens, weights, is_text) -> (params, opt_state, metrics)."""

    def loss(params, tokens, weights, is_text):
        nats, hits = token_losses(decoder, params, tokens)
        weights = weights[:, 1:]
        text = jnp.where(is_text[:, None], weights, 0.0)
        answer = jnp.where(is_text[:, None], 0.0, (weights > 0).astype(jnp.float32))
        mean = lambda value, weight: jnp.sum(value * weight) / jnp.maximum(jnp.sum(weight), 1.0)
        metrics = {
            "text_nats": mean(nats, text),
            "answer_nats": mean(nats, answer),
            "answer_accuracy": mean(hits.astype(jnp.float32), answer),
        }
        return mean(nats, weights), metrics

    def step(params, opt_state, tokens, weights, is_text):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens, weights, is_text)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its int32 step counts by Python floats
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def evaluate(
    decoder, params, stream: np.ndarray, length: int, batch: int, windows: int, recall: int, seed: int
) -> dict:
    """Held-out nats per token over `windows` windows of `length` tokens, and recall accuracy by kind and filler.

    Windows lie end to end in `stream`, each behind a BOS. Recall: `recall` episodes of each kind with random filler and
    with text as filler, over all ordinary ids; accuracy is the share of answers that argmax predicts.
    """
    losses = jax.jit(lambda params, tokens: token_losses(decoder, params, tokens))
    step = length - 1
    windows = min(windows, len(stream) // step)
    if windows < 1:
        raise ValueError(f"the held-out text has {len(stream)} tokens, fewer than one window of {length}")
    text = np.full((windows, length), BOS_ID, np.int32)
    text[:, 1:] = stream[: windows * step].reshape(windows, step)

    def run(tokens):
        # The last batch is filled up with its first row, which is cut off again: one shape, one compilation.
        for i in range(0, len(tokens), batch):
            part = tokens[i : i + batch]
            full = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
            yield from zip(*(np.asarray(x)[: len(part)] for x in losses(params, full)), strict=True)

    result = {
        "length": length,
        "heldout_nats_per_token": float(np.mean([nats for nats, _ in run(text)])),
        "heldout_tokens": windows * step,
    }
    ids = np.arange(FIRST_ORDINARY_ID, decoder.config.vocab_size)
    for kind in episodes.KINDS:
        for filler in ("random", "text"):
            made = []
            for i in range(recall):
                rng = np.random.default_rng([seed, length, i])
                start = rng.integers(0, len(stream) - length)
                words = stream[start : start + length] if filler == "text" else None
                made.append(episodes.recall_episode(rng, ids, length, kind, bos_id=BOS_ID, filler=words))
            hits = [
                h[a[1:]] for (_, h), (_, a) in zip(run(np.stack([t for t, _ in made])), made, strict=True)
            ]
            result[f"{kind}_{filler}_accuracy"] = float(np.mean(np.concatenate(hits)))
            result[f"{kind}_{filler}_answers"] = int(sum(len(h) for h in hits))
    return result


def train(config: TrainConfig, workdir, seed=0, stop_at=None, log_every=20, save_every=100, corpus_root=None):
    """Train from the newest checkpoint in `workdir` (or from nothing) -> (params, tokenizer, record).

    Stops after step `stop_at` (default: the end). A run goes on where the steps done so far are the same under `config`;
    what has not begun may differ. `save_every` must be a multiple of `log_every`. Raises ValueError
    where `workdir` holds a run of another config, seed or text.
    """
    if save_every % log_every:
        raise ValueError(f"save_every must be a multiple of log_every, got {save_every} and {log_every}")
    files = episodes.corpus(corpus_root)
    text = {"train_files": len(files.train), "train_sha256": files.train_sha256}
    text |= {"heldout_files": [path for path, _ in files.heldout], "heldout_sha256": files.heldout_sha256}
    source = {"seed": seed, "text": text}
    decoder = Decoder(config.model)
    tx = optimizer(config)
    workdir = Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer_file = workdir / "tokenizer.json"
    if not tokenizer_file.exists():
        trained = train_tokenizer((text for _, text in files.train), config.model.vocab_size)
        (workdir / "tokenizer.json.part").write_text(trained.to_str(), encoding="utf-8")
        (workdir / "tokenizer.json.part").rename(tokenizer_file)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    stream, heldout = encode(tokenizer, files.train), encode(tokenizer, files.heldout)
    step_fn = make_step(decoder, tx)
    params = initial_params(decoder, jax.random.key(seed))
    state, done, history, wall_s = {"params": params, "opt_state": tx.init(params)}, 0, [], 0.0
    end = config.total_steps if stop_at is None else min(stop_at, config.total_steps)

    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=False)
    with ocp.CheckpointManager(workdir / "checkpoints", options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            names = {"state": ocp.args.StandardRestore(state), "run": ocp.args.JsonRestore()}
            restored = manager.restore(latest, args=ocp.args.Composite(**names))
            state, run = restored["state"], restored["run"]
            if run["past"] != config.past(latest) or run["source"] != source:
                raise ValueError(
                    f"{workdir} holds a run with another config, seed or text; give another workdir"
                )
            done, history, wall_s = latest, run["history"], run["wall_s"]
        params, opt_state = state["params"], state["opt_state"]
        began, sums = time.perf_counter() - wall_s, []
        with tqdm(total=config.total_steps, initial=done, unit="step", disable=None, file=sys.stderr) as bar:
            for step in range(done, end):
                stage = config.stage_at(step)
                batch = make_batch(config, stage, stream, seed, step)
                params, opt_state, metrics = step_fn(params, opt_state, *batch)
                sums.append(metrics)
                bar.update()
                done = step + 1
                if done % log_every == 0 or done == end:
                    means = {key: float(np.mean([m[key] for m in sums])) for key in metrics}
                    history.append({"step": done, "length": stage.length, **means})
                    bar.set_postfix({key: f"{value:.3f}" for key, value in means.items()})
                    sums = []
                if done % save_every == 0 or done == end:
                    wall_s = time.perf_counter() - began
                    run = {"past": config.past(done), "source": source, "history": history, "wall_s": wall_s}
                    items = {"state": ocp.args.StandardSave({"params": params, "opt_state": opt_state})}
                    manager.save(
                        done, args=ocp.args.Composite(**items, run=ocp.args.JsonSave(run)), force=True
                    )
    tokens = sum(config.stage_at(s).batch * config.stage_at(s).length for s in range(done))
    record = {"steps": done, "trained_tokens": tokens, "wall_s": wall_s, "config": dataclasses.asdict(config)}
    record |= source | {"history": history}
    return params, tokenizer, heldout, record


def export(config: TrainConfig, params, tokenizer, heldout, record: dict, out) -> dict:
    """Write the folder that `alisa_jax.load` reads, in bfloat16, evaluate what it holds, and add `training.json`."""
    out = Path(out)
    checkpoint.save(config.model, params, out, jnp.bfloat16, tokenizer, BOS_ID, (EOS_ID,))
    stored = checkpoint.load(out, dtype=jnp.float32)
    lengths = [n for n in (128, 256, 512, 1024, 2048) if n < config.context] + [config.context]
    record = record | {
        "evaluation": [
            evaluate(stored.decoder, stored.params, heldout, n, max(1, 4096 // n), 32, 16, record["seed"] + 1)
            for n in lengths
        ],
        "non_embedding_params": stored.decoder.count_params(embedding=False),
        "params": stored.decoder.count_params(),
        "environment": environment(),
        "optax": optax.__version__,
        "tokenizers": tokenizers.__version__,
    }
    part = out / "training.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.rename(out / "training.json")
    return record


def define_flags():
    flags.DEFINE_string("config", "configs/train/pylib_1m.py", "Python file that defines CONFIG.")
    flags.DEFINE_string(
        "workdir", "runs/pylib_1m", "Folder of checkpoints; a run that was stopped there goes on."
    )
    flags.DEFINE_string("out", None, "Folder to export to: WORKDIR/export by default.")
    flags.DEFINE_integer("seed", 0, "Seed of the weights and of the data.", lower_bound=0)
    flags.DEFINE_integer(
        "stop_at", None, "Stop after this step instead of at the end of the config.", lower_bound=0
    )
    flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.", lower_bound=1)
    flags.DEFINE_bool("json", False, "Print the record as one JSON line and nothing else.")


def main(argv):
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        config = load_config(args.config)
        out = Path(args.out or Path(args.workdir) / "export")
        out.mkdir(parents=True, exist_ok=True)
        *trained, record = train(config, args.workdir, args.seed, args.stop_at, save_every=args.save_every)
        record = export(config, *trained, {"command": command_line(), **record}, out)
    except (ValueError, OSError, checkpoint.CheckpointError) as error:
        sys.exit(f"eval.train: {error}")
    if args.json:
        print(json.dumps({key: value for key, value in record.items() if key != "history"}))
        return
    print(
        f"{record['steps']} steps, {record['trained_tokens']:,} tokens, {record['wall_s'] / 60:.0f} min -> {out}"
    )
    for row in record["evaluation"]:
        recall = ", ".join(
            f"{k.removesuffix('_accuracy')} {v:.3f}" for k, v in row.items() if k.endswith("_accuracy")
        )
        print(
            f"length {row['length']}: held-out {row['heldout_nats_per_token']:.3f} nats per token; {recall}"
        )


def command_line() -> str:
    """The command as a person would type it."""
    return " ".join(["python -m eval.train", *sys.argv[1:]])


if __name__ == "__main__":
    define_flags()
    app.run(main)
