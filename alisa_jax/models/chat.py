"""Chat templates: messages to one text, by Jinja in a sandbox.

A template is a program that comes with a model, so it runs in Jinja's immutable sandbox, with what
transformers offers to templates: `raise_exception`, `strftime_now`, `tojson`, `break` and
`continue`, the tag `generation`, and blocks that leave no empty lines. Jinja is an extra of this
package, imported here alone and when it is needed.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from alisa_jax.models.hf import CheckpointError

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one and the same field
MARK = "\ue000 the message ends \ue000 "  # a template that trims takes the last space


class TemplateError(CheckpointError):
    """A chat template refused the messages, or is no valid template."""


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The text of `messages`, each a mapping with a "role" and, nearly always, a "content".

    special: names and texts of the special tokens that the template may write, such as "bos_token".
    add_generation_prompt: end with the beginning of an answer. continue_final_message: end inside
    the last message, which the model is to continue. Raises CheckpointError without a template,
    without jinja2, and for messages that are none; TemplateError for what the template refuses.
    """
    if template is None:
        raise CheckpointError("the model has no chat template; give a text instead of messages.")
    turns = list(messages) if isinstance(messages, Sequence) else []
    if not turns or not all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
        raise CheckpointError(
            f"messages are mappings with a role and a content, at least one; got {messages!r:.80}."
        )
    turns = [_message(turn) for turn in turns]
    if continue_final_message:
        if not isinstance(turns[-1].get("content"), str):
            raise CheckpointError("the last message has no text that could be continued.")
        turns[-1]["content"] += MARK
    compiled = _compile(template)
    try:
        text = compiled.render(
            messages=turns,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except Exception as error:  # a template can raise what any program can
        raise TemplateError(f"the chat template refuses the messages: {_line(error)}.") from error
    if not continue_final_message:
        return text
    at = text.rfind(MARK.rstrip())
    if at < 0:
        raise CheckpointError("the chat template leaves out the message that is to continue.")
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()


def _compile(template: str):
    """The template as Jinja compiles it in its sandbox."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ImportError as error:
        raise CheckpointError(
            "chat templates need jinja2; install 'alisa-jax[chat]', or give a text instead of "
            "messages."
        ) from error

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks what a model wrote: its content as it stands."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the chat template is no valid Jinja: {_line(error)}.") from error


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it: without None, and with its reasoning under all names."""
    made = {key: value for key, value in _plain(given).items() if value is not None}
    reasoning = next((made[name] for name in REASONING if name in made), None)
    if reasoning is None:
        return made
    return {"thinking": reasoning} | made | {"reasoning_content": reasoning}


def _plain(value: Any):
    """A copy of mappings, lists and scalars alone: a template can use no method of others."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return str(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
