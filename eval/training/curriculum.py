"""What a training run sees: its config, and the batch of every step as a function of the seed and the step's number.

A `TrainConfig` is a Python file's `CONFIG` (see `configs/train/`): a model and a list of stages, each with its own length
and mix of text, copies and lookups (`eval.text.episodes`).
"""

import dataclasses
import runpy
from pathlib import Path

import numpy as np
import tokenizers

from alisa_jax.models.decoder import ModelConfig
from eval.text import episodes

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID, FIRST_ORDINARY_ID = 0, 1, 2


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
        if self.ids < self.length:
            raise ValueError(f"an episode draws `length` different ids: a stage needs ids >= length, got {self}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run. The learning rate rises over `warmup_steps`, stays, and falls to a tenth in the last `decay_steps`."""

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
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def decay_begin(self) -> int:
        """The step from which the learning rate falls."""
        return self.total_steps - self.decay_steps

    def past(self, step: int) -> dict:
        """All that the first `step` steps depend on, as plain values: what comes after may be another config's."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("stages", "decay_steps")}
        stages, left = [], step
        for stage in self.stages:
            if (taken := min(left, stage.steps)) > 0:
                stages.append(dataclasses.asdict(stage) | {"steps": taken})
                left -= taken
        decay = [self.decay_begin, self.decay_steps] if self.decay_begin < step else None
        return fields | {"stages": stages, "decay": decay}

    def tokens(self, step: int) -> int:
        """Tokens in the batches of the first `step` steps."""
        return sum(s["steps"] * s["batch"] * s["length"] for s in self.past(step)["stages"])

    def stage_at(self, step: int) -> Stage:
        """The stage of step `step`, from 0; IndexError beyond the end."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"the run ends {step + 1} steps earlier")


def load_config(path: str) -> TrainConfig:
    """Read `CONFIG` of a Python file; raises ValueError in one sentence for what does not make a run."""
    if not Path(path).is_file():
        raise ValueError(f"no training config at {path!r}")
    values = runpy.run_path(path).get("CONFIG")
    try:
        model, stages = ModelConfig(**values["model"]), tuple(Stage(**stage) for stage in values["stages"])
        config = TrainConfig(**{**values, "model": model, "stages": stages})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path!r} does not define a CONFIG that eval.train can read: {error}") from None
    if not stages or config.context > model.max_positions:
        raise ValueError(f"{path!r} needs stages, none longer than max_positions={model.max_positions}")
    if not 0 < config.decay_steps <= config.total_steps - config.warmup_steps:
        raise ValueError(f"{path!r} has {config.total_steps} steps, too few to warm up and decay in")
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
    """The batch of step `step` -> tokens [B, T] int32, weights [B, T] float32, is_text [B] bool.

    `weights` are those of token t as a target: 1 in text, `answer_weight` for the answers of recall episodes, else 0.
    Half of all rows begin with BOS, half of the recall episodes have text from `stream` as filler.
    """
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
