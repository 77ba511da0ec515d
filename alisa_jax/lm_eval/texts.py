"""Texts of the harness to token ids, and chats to texts, as its Hugging Face backend makes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from alisa_jax.lm_eval.arguments import UserError, sentences
from alisa_jax.models.chat import TemplateError
from alisa_jax.models.checkpoint import Model

log = logging.getLogger(__name__)


class Texts:
    """The text side of `model`. add_bos_token: None for what the tokenizer puts before a text."""

    def __init__(self, model: Model, add_bos_token: bool | None = None):
        self.model = model
        self.add_bos_token = add_bos_token
        named = self._id("bos_token")
        self.bos_id = model.bos_id if named is None else named  # though nothing may put it there

    @property
    def eot_id(self) -> int | None:
        """What ends a text: the tokenizer's EOS, else a token that ends generation, or None."""
        ends = [self._id("eos_token"), *self.model.eos_ids]
        known = [i for i in ends if i is not None]
        return next((i for i in known if i != self.bos_id), next(iter(known), self.bos_id))

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text without context: BOS, else the end of text."""
        token = self.eot_id if self.bos_id is None else self.bos_id
        if token is None:
            raise UserError(
                f"the model {self.model.name} has neither a BOS nor an EOS token to begin a text "
                "with"
            )
        return token

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; None: special tokens as `add_bos_token` says, none where the text has BOS."""
        tokenizer = self.model.tokenizer
        special = add_special_tokens
        if special is None:
            bos = tokenizer.decode([self.prefix_id], skip_special_tokens=False)
            begun = bool(bos) and text.startswith(bos)
            special = not begun and self.add_bos_token is not False
        if special and self.add_bos_token is None:
            return tokenizer.encode(text).ids if add_special_tokens else self.model.encode(text)
        before = [self.bos_id] if special and self.add_bos_token and self.bos_id is not None else []
        return before + tokenizer.encode(text, add_special_tokens=False).ids

    def template(self, name: str = "default") -> str:
        """The model's chat template. Raises UserError without one, and for another name."""
        found = None if self.model.text is None else self.model.text.chat_template
        if found is None:
            raise UserError(
                f"the model {self.model.name} has no chat template; leave --apply_chat_template out"
            )
        if name != "default":
            raise UserError(
                f"the model alisa applies the default chat template alone; got {name!r}"
            )
        return found

    def chat(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
        """Messages as one text, which ends inside the last one without `add_generation_prompt`.

        Where the template refuses the messages they are tried without those of the system.
        """
        self.template()
        kinds = (add_generation_prompt, not add_generation_prompt)
        with sentences():
            try:
                return self.model.text.render(messages, *kinds)
            except TemplateError as error:
                log.warning("%s Messages of the system are left out.", error)
                others = [message for message in messages if message["role"] != "system"]
                return self.model.text.render(others, *kinds)

    def _id(self, name: str) -> int | None:
        """The id of a special token that the tokenizer's files name."""
        token = None if self.model.text is None else getattr(self.model.text, name)
        return None if token is None else self.model.tokenizer.token_to_id(token)
