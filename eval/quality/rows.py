"""The rows of `eval.compare`: which methods fit a share of the bytes, at which size, and what a row holds and reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax

from alisa_jax import codecs, policies, spec
from alisa_jax.policies.base import Dims
from eval.quality.sample import Sizes
from eval.script.common import UserError

FIT = 1.02  # how far above a share the bytes of a codec alone may be


@dataclass(frozen=True)
class Entry:
    """A row: what runs, and for which share; None: dense attention, whose bytes are what they are."""

    policy: str
    codec: str
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.policy} with {self.codec}"

    @property
    def method(self) -> str:
        """The name of the policy."""
        return self.policy.split("(")[0]


def candidates(
    model, shares: Sequence[float], chosen: Sequence[str], methods: Sequence[str], sizes: Sizes
) -> tuple[list[Entry], dict[str, str]]:
    """The rows but that of dense attention with raw, and why methods have no size for a share.

    Every codec is a row with dense attention; `chosen` are those that policies are combined with.
    """
    config, dtype = model.decoder.config, jax.tree.leaves(model.params)[0].dtype
    try:
        calibration = model.calibration()
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    entries = [Entry("dense", codec) for codec in dict.fromkeys((*chosen, *codecs.CODECS)) if codec != "raw"]
    refused = {}
    for share in shares:
        for codec in chosen:
            room = Room(share, codec, config, dtype, sizes)
            for name in methods:
                try:
                    one = room.fitted(policies.POLICIES[name], config, calibration)
                except ValueError as error:
                    refused[f"{name} with {codec} at {share:g}"] = str(error)
                    continue
                if one is not None:
                    entries.append(Entry(spec.to_text(one, policies.POLICIES), codec, share))
    return entries, refused


def listed(records: Mapping[Entry, dict], share: float) -> dict[Entry, dict]:
    """The rows of the table of a share: its own, and codecs alone that fit it, by name; dense attention comes first."""

    def fits(entry: Entry, record: dict) -> bool:
        alone = entry.share is None and (entry.codec == "raw" or record["held_frac"] <= FIT * share)
        return alone or entry.share == share

    found = [item for item in records.items() if fits(*item)]
    return dict(sorted(found, key=lambda item: (item[0].codec != "raw" or item[0].method != "dense", str(item[0]))))


def traffic(values: Mapping, dense: Mapping | None, entry: Entry, model, sizes: Sizes) -> dict:
    """Bytes of K and V that a row holds, of the arrays, and reads at a step, both over those of the record `dense`.

    held_frac: at the end. read_frac: of the tokens attended, and of labels where a policy searches them; never more than is
    held, as where a prompt was shortened and all of the rest is attended. budget_frac: the one of them that the share is of.
    """
    config, one = model.decoder.config, policies.parse(entry.policy)
    room = Room(1.0, entry.codec, config, jax.tree.leaves(model.params)[0].dtype, sizes)
    held = values["kv_bytes_per_token"] / (values if dense is None else dense)["kv_bytes_per_token"]
    read = values["attended_frac"] * room.token_bytes + room.sequence_bytes / sizes.tokens
    if one.needs_query:
        read += label_bytes(one.resolve(config, model.calibration()), config, sizes.tokens)
    read = min(held, read / room.raw_bytes)
    return {"held_frac": held, "read_frac": read, "budget_frac": read if one.selects and not one.evicts else held}


class Room:
    """How many tokens a share has room for: bytes are of one layer and one sequence."""

    def __init__(self, share: float, codec: str, config, dtype, sizes: Sizes):
        K, H = config.n_kv_heads, config.head_dim
        raw, stored = (codecs.parse(text).resolve(dtype) for text in ("raw", codec))
        self.share, self.codec, self.sizes = share, codec, sizes
        self.raw_bytes, self.token_bytes = raw.token_bytes(K, H), stored.token_bytes(K, H)
        self.sequence_bytes = stored.sequence_bytes(K, H)

    def fitted(self, kind: type, config, calibration):
        """The policy `kind` at this size; None where it has none, or room for all. Raises ValueError, in one sentence."""
        one, known = self._sized(kind, config, calibration, 0.0)
        if known is not None and known.needs_query:
            one, _ = self._sized(kind, config, calibration, label_bytes(known, config, self.sizes.tokens))
        return one

    def _sized(self, kind: type, config, calibration, label: float):
        sizes = self.sizes
        free = (self.share * self.raw_bytes - label) * sizes.tokens - self.sequence_bytes
        held = free / self.token_bytes  # tokens at the end
        kept = round(held * sizes.prompt_tokens / sizes.tokens)
        if kept >= sizes.prompt_tokens:
            return None, None
        if kept < 1:
            raise ValueError(f"what {self.codec} stores of a sequence, and labels to search, leave no room for tokens")
        one = kind.sized(kept, sizes.prompt_tokens)
        if one is None:
            return None, None
        known = one.resolve(config, calibration)
        if known.appends or known.reads_layer(sizes.prompt_tokens) is not None:
            kept = round(held) - sizes.new_tokens
            if kept < 1:
                raise ValueError(
                    f"all {sizes.new_tokens} new tokens are kept, and there is room for {round(held)} tokens"
                )
            one = kind.sized(kept, sizes.prompt_tokens)
        return one, known


def label_bytes(policy, config, tokens: int) -> float:
    """Bytes of statistics that a policy which `needs_query` searches at a step, for each token, mean over layers."""
    dims = Dims(1, config.n_heads, config.n_kv_heads, tokens, tokens, config.head_dim)
    each = jax.eval_shape(lambda: [policy.for_layer(i).init(dims) for i in range(config.n_layers)])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(each)) / (tokens * config.n_layers)
