"""The model `alisa` of EleutherAI's lm-evaluation-harness (the extra `lm_eval`).

    alisa-lm-eval run --model alisa --tasks arc_easy --batch_size 8 \\
        --model_args pretrained=FOLDER \\
        'policy=swa(kv_sparsity=0.8,window=2k)' 'codec=int8(axis=token)'

`alisa-lm-eval` is the harness's own command line with this model registered.
`lm-eval run --model alisa` is the same where the harness reads the entry points `lm_eval.models`,
which release 0.4.13 does not. In Python, import this module, then call
`lm_eval.simple_evaluate(model="alisa", model_args={"pretrained": ...}, ...)`; a text of model_args
will do as well.

What is tokenised, how it is cut to `max_length` from the left and what a result is made of follow
the harness's backend for Hugging Face models, so that dense attention gives that backend's numbers.
Two things differ: `max_length` is by default one token less, because the token that is predicted
last has to lie in the model's context too, and sampling has no top-k of 50 unless it is asked for.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise ImportError(
        "alisa_jax.lm_eval needs the lm-evaluation-harness; install it with pip install "
        "'alisa-jax[lm-eval]'"
    ) from None

from alisa_jax import codecs, policies, spec
from alisa_jax import placement as placements
from alisa_jax.engine.engine import Engine
from alisa_jax.engine.sampling import sequence_keys
from alisa_jax.lm_eval.arguments import (
    UserError,
    asked_of,
    check_arguments,
    check_name,
    check_protocol,
    check_specs,
    count,
    pairs_of,
    sentences,
)
from alisa_jax.lm_eval.texts import Texts
from alisa_jax.models.checkpoint import load
from alisa_jax.placement import bytes_text

log = logging.getLogger(__name__)


@register_model("alisa")
class AlisaLM(TemplateLM):
    """A model under a policy, a codec and a placement, as the harness calls it.

    pretrained: a Hugging Face folder, a name of the Hub, or "bundled". policy, codec, route,
    attention_impl, placement: as of `alisa_jax.Engine`. device_kv_bytes, host_kv_bytes: budgets:
    "2GB", "512MiB", bytes, or "0.3x" for a share of the dense cache of batch_size sequences of
    max_length tokens. protocol: of
    log-likelihoods, "decode", "prefill_mask" or "prompt", as of `Engine.score`: with "prompt" a
    context is read densely, which is where methods that cut prompts show. dtype: as of
    `alisa_jax.load`. batch_size: sequences at a time. max_length: most tokens that are read.
    max_gen_toks: new tokens where a task does not say. add_bos_token: whether the BOS token
    precedes every text; by default as the tokenizer says. seed: of sampling; request i draws from
    `sequence_keys(seed, [i])`. device and max_batch_size, which the harness always hands over,
    speak of PyTorch: JAX_PLATFORMS says where JAX runs.

    Raises UserError, before anything runs, for what cannot be served.
    """

    def __init__(
        self,
        pretrained: str = "",
        policy: str = "dense",
        codec: str = "raw",
        route: str = "auto",
        attention_impl: str = "auto",
        placement: str = "resident",
        device_kv_bytes: str | float = math.inf,
        host_kv_bytes: str | float = math.inf,
        protocol: str = "decode",
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **others,
    ):
        super().__init__()
        check_specs(policy=policy, codec=codec, placement=placement)
        budgets = {"device_kv_bytes": device_kv_bytes, "host_kv_bytes": host_kv_bytes}
        check_arguments(others, AlisaLM.__init__.__annotations__)
        name = check_name(pretrained)
        check_protocol(placement, protocol)
        self.batch_size = count("batch_size", batch_size)
        self.max_gen_toks = count("max_gen_toks", max_gen_toks)
        self.protocol = protocol
        self.seed = seed
        with sentences():
            self.named = {  # as they are printed
                "policy": spec.to_text(policies.parse(policy), policies.POLICIES),
                "codec": spec.to_text(codecs.parse(codec), codecs.CODECS),
                "placement": spec.to_text(
                    placements.parse(placement or "resident"), placements.CONTROLLERS
                ),
            }
            sequence_keys(seed, [0])
            self.model = load(name, dtype)
            if self.model.tokenizer is None:
                raise UserError(f"the model {name} has no tokenizer, and the harness speaks text")
            self.texts = Texts(self.model, add_bos_token)
            c = self.model.decoder.config
            most = c.max_positions - 1
            self.max_length = most if max_length is None else count("max_length", max_length)
            if self.max_length > most:
                raise UserError(
                    f"max_length must be below {c.max_positions}, the model's context; got "
                    f"{max_length}"
                )
            stored = codecs.Raw(jax.tree.leaves(self.model.params)[0].dtype.name)
            dense_bytes = c.n_layers * stored.token_bytes(c.n_kv_heads, c.head_dim)
            dense_bytes *= self.batch_size * self.max_length
            limits = [
                bytes_text.read_bytes(str(value), dense_bytes, f"{key}: ")
                for key, value in budgets.items()
            ]
            self.engine = Engine(
                self.model,
                policy,
                codec,
                placement or "resident",
                *limits,
                route=route,
                attention_impl=attention_impl,
            )
            self.engine.validate(self.max_length + 1)
        self.ran: dict[str, str] = {}  # what ran, and why it was that

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> AlisaLM:
        """A model from "key=value,key=value"; commas inside brackets are part of the value."""
        pairs = pairs_of(arg_string)
        given = {key: utils.handle_arg_string(value) for key, value in pairs.items()}
        return cls.create_from_arg_obj(given, additional_config)

    @property
    def eot_token_id(self) -> int | None:
        return self.texts.eot_id

    @property
    def prefix_token_id(self) -> int:
        return self.texts.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template, which the harness keeps with the results."""
        if not chat_template:
            return None
        return self.texts.template("default" if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.texts.chat(chat_history, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self.texts.encode(string, add_special_tokens)

    def get_model_info(self) -> dict:
        """What the harness adds to the settings in its results."""
        ran = self.ran or {self.engine.implementation: self.engine.implementation_reason}
        return {
            "model_num_parameters": self.model.decoder.count_params(),
            "model_dtype": jax.tree.leaves(self.model.params)[0].dtype.name,
            **self.named,
            "protocol": self.protocol,
            "implementation": " and ".join(ran),
            "implementation_reason": " and ".join(dict.fromkeys(ran.values())),
        }

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in windows of `max_length` tokens that overlap by one."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            found = [(None, *utils.make_disjoint_window(piece)) for piece in pieces]
            windows += found
            owner += [i] * len(found)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(
            owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        requests: (texts or None, context ids, continuation ids), the choices of a context in a row.
        """
        sequences, longest = [], {}
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                given = texts[1] if texts else ""
                raise UserError(
                    f"the continuation {given!r:.60} has {len(continuation)} tokens; "
                    f"1 to max_length={self.max_length} can be scored"
                )
            whole = context + continuation
            if len(whole) > self.max_length + 1:
                log.warning(
                    "a context is cut from the left: %d tokens, max_length=%d",
                    len(whole),
                    self.max_length,
                )
            sequences.append(whole[-(self.max_length + 1) :])
            longest[tuple(context)] = max(len(sequences[-1]), longest.get(tuple(context), 0))
        contexts = [tuple(context) for _, context, _ in requests]
        wanted = [len(continuation) for *_, continuation in requests]
        order = sorted(
            range(len(requests)),
            key=lambda i: (-longest[contexts[i]], contexts[i], -len(sequences[i])),
        )
        batches = self._batches(order)
        with sentences():
            for batch in batches:
                self.engine.check_score(
                    [sequences[i] for i in batch], self.protocol, [wanted[i] for i in batch]
                )
        results: list = [None] * len(requests)
        with tqdm(
            total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm
        ) as bar:
            for batch in batches:
                scores = self.engine.score(
                    [sequences[i] for i in batch], self.protocol, last=[wanted[i] for i in batch]
                )
                self.ran[scores.implementation] = scores.implementation_reason
                for i, logprobs, greedy in zip(batch, scores.logprobs, scores.correct, strict=True):
                    results[i] = float(logprobs.sum(dtype=np.float64)), bool(greedy.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(batch))
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, cut before the first of its stop strings."""
        groups, prompts = {}, []
        for i, request in enumerate(requests):
            context, kwargs = request.args
            given = normalize_gen_kwargs(kwargs, self.max_gen_toks)
            asked = asked_of(given)
            room = self.max_length - asked.new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks must be below max_length={self.max_length}, "
                    f"to leave room for a prompt; got {asked.new_tokens}"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            if len(ids) > room:
                log.warning(
                    "a prompt is cut from the left: %d tokens, %d fit before max_gen_toks",
                    len(ids),
                    room,
                )
            prompts.append(ids[-room:])
            groups.setdefault(asked, []).append(i)
        batches = [
            (asked, batch)
            for asked, group in groups.items()
            for batch in self._batches(sorted(group, key=lambda i: (-len(prompts[i]), prompts[i])))
        ]
        with sentences():
            for asked, batch in batches:
                self.engine.check_generate([prompts[i] for i in batch], asked.new_tokens)
        results: list = [None] * len(requests)
        with tqdm(
            total=len(requests), desc="Running generate_until requests", disable=disable_tqdm
        ) as bar:
            for asked, batch in batches:
                # a text that is decoded by itself may lose its leading space
                stops = [text for text in asked.until if not text.startswith(" ")]
                made = self.engine.generate(
                    [prompts[i] for i in batch],
                    asked.new_tokens,
                    sampling=asked.sampling,
                    key=sequence_keys(self.seed, batch),
                    stop=stops,
                )
                self.ran[self.engine.implementation] = self.engine.implementation_reason
                for i, tokens in zip(batch, made.tokens, strict=True):
                    row = list(itertools.takewhile(lambda t: t not in self.model.eos_ids, tokens))
                    results[i] = postprocess_generated_text(
                        self.model.decode(row), list(asked.until), None
                    )
                    self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
                bar.update(len(batch))
        return results

    def _batches(self, order: Sequence[int]) -> list[Sequence[int]]:
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


def main() -> None:
    """The command `alisa-lm-eval`: the harness's command line, which knows the model `alisa`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"alisa-lm-eval: {error}", file=sys.stderr)
        sys.exit(2)
