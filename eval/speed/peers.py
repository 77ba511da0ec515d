"""The peers' sides of `eval.bench`: `transformers` on the same weights, the same made-up caches and the same threads.

Decoding is a greedy loop by hand around `model(...)` under `torch.inference_mode()`: `.generate` does more between two
steps, so this flatters the peer. Attention is the model's default on a CPU, `scaled_dot_product_attention`. "compiled" is
`torch.compile` of the forward as it comes. torch and transformers are imported here alone, inside functions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
import warnings

import numpy as np

from eval.speed.cells import Cell, System


def installed() -> bool:
    """Whether the extra `parity` is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def versions() -> dict:
    """Of torch and transformers, None where one is not installed."""
    found = {}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def threads() -> int:
    """Let torch use every core, as XLA does by default; returns their number."""
    count = os.cpu_count() or 1
    if installed():
        import torch

        torch.set_num_threads(count)
    return count


def model(ours):
    """The transformers model of our model's weights, through a folder that is removed."""
    from alisa_jax.models import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        shown = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.save(ours.decoder.config, ours.params, folder)
                found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        finally:
            if shown:
                transformers.utils.logging.enable_progress_bar()
    return found.eval()


def reads(read_bytes: int, side: int) -> dict:
    """Torch's ways to read memory and to multiply, for `bench_limits.rates`."""
    import torch

    row, square = torch.ones(2048, read_bytes // 4 // 2048), torch.ones(side, side)
    vector = torch.ones(row.shape[1])
    return {
        "read": {"torch matrix-vector product": lambda: row @ vector, "torch sum": lambda: row.sum()},
        "matmul": {"torch": lambda: square @ square},
    }


class _Side:
    """What the sides share: quiet calls without gradients, and a count of compiled graphs."""

    def __init__(self, model, system: System):
        import torch

        self.model, self.compiles = model, 0
        self._call = model
        if system.compiled:
            torch._dynamo.reset()
            self._call = torch.compile(model.forward)

    def values(self) -> dict:
        """What its record says beside times."""
        return {"implementation": f"torch:{self.model.config._attn_implementation}"}

    def _run(self, function):
        import torch

        counted = torch._dynamo.utils.counters["stats"]
        before = counted["unique_graphs"]
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = function()
        self.compiles += counted["unique_graphs"] - before
        return out


class Decoding(_Side):
    """Greedy decoding of B sequences from a cache that is filled layer by layer."""

    def __init__(self, model, system: System, cell: Cell, start: int):
        import torch
        import transformers

        super().__init__(model, system)
        self.cell, self.at = cell, start
        if system.cache == "static":
            self.cache = transformers.StaticCache(config=model.config, max_cache_len=cell.context)
        else:
            self.cache = transformers.DynamicCache(config=model.config)
        self.token = torch.zeros(cell.batch, 1, dtype=torch.long)

    def fill(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Give the next layer the keys and values of `start` tokens."""
        import torch

        del q
        with torch.inference_mode():
            self.cache.update(*(torch.from_numpy(x).transpose(1, 2).contiguous() for x in (k, v)), layer)

    def advance(self) -> np.ndarray:
        """The tokens [B, steps] of one round."""
        return self._run(self._round)

    def _round(self):
        import torch

        made = []
        for _ in range(self.cell.steps):
            at = torch.full((1, 1), self.at, dtype=torch.long)
            out = self._call(input_ids=self.token, past_key_values=self.cache, position_ids=at, use_cache=True)
            self.token = out.logits[:, -1].argmax(-1, keepdim=True)
            self.at += 1
            made.append(self.token)
        return torch.cat(made, 1).numpy()

    def values(self) -> dict:
        """What its record says beside times."""
        held = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        return super().values() | {"kv_bytes": sum(x.numel() * x.element_size() for x in held)}


class Prefilling(_Side):
    """B prompts that are read again and again into an empty cache; logits of the last token alone."""

    def __init__(self, model, system: System, tokens: np.ndarray):
        import torch

        super().__init__(model, system)
        self.tokens, self._bytes = torch.from_numpy(tokens.astype(np.int64)), 0

    def advance(self) -> np.ndarray:
        """The greedy tokens [B, 1] that follow the prompts."""
        return self._run(self._read)

    def _read(self):
        import transformers

        cache = transformers.DynamicCache(config=self.model.config)
        out = self._call(input_ids=self.tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._bytes = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        return out.logits[:, -1].argmax(-1, keepdim=True).numpy()

    def values(self) -> dict:
        """What its record says beside times."""
        return super().values() | {"kv_bytes": self._bytes}


class Scoring(_Side):
    """Windows of a text, a group of them in one forward without a cache."""

    def score(self, sequences: list[list[int]]) -> float:
        """Nats of all tokens of the sequences but their first."""
        return self._run(lambda: self._score(sequences))

    def _score(self, sequences):
        import torch

        longest = max(map(len, sequences))
        tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])  # what is behind is not seen
        logp = torch.log_softmax(self._call(input_ids=tokens, use_cache=False).logits[:, :-1], -1)
        each = logp.gather(2, tokens[:, 1:, None])[..., 0].double()
        return -sum(float(row[: len(ids) - 1].sum()) for row, ids in zip(each, sequences, strict=True))
