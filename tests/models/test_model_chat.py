"""Messages to token ids by chat templates, against `apply_chat_template` of transformers."""

import dataclasses
import json
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from alisa_jax.models import CheckpointError, Model, chat
from alisa_jax.models import tokenizer as text_side
from tests.models import tokenizer_kinds as kinds
from tests.models.tokenizer_kinds import BOS, EOS, START, STOP, write_json
from tests.sentences import one_sentence

MARKED = """{% for turn in messages %}
    {% if loop.first and turn.role != 'system' %}
{{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
    {% endif %}
{{- '<|im_start|>' + turn.role + '\n' + (turn.content or '') | trim + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
IN_BRACKETS = """{{ bos_token }}{% set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = '((' ~ messages[0].content ~ '))\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles take turns: user, assistant, user, and so on.') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {{- '[ASK] ' ~ (ns.system if loop.first else '') ~ turn['content'] ~ ' [/ASK]' }}
    {%- else %}
        {{- ' ' ~ turn.content ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
WITH_HEADS = """{{- bos_token }}
{%- macro head(role) %}{{ '<|im_start|>' ~ role ~ '|\n\n' }}{% endmacro %}
{%- for turn in messages %}
    {%- if turn.role == 'ignored' %}{% continue %}{% endif %}
    {{- head(turn.role) }}
    {%- if turn.reasoning_content is defined %}{{ '<think>' ~ turn.reasoning_content }}{% endif %}
    {%- if turn.content is string %}{% generation %}{{ turn.content | trim }}{% endgeneration %}
    {%- elif turn.content is defined %}{% for part in turn.content %}{{ part | tojson }}{% endfor %}{% endif %}
    {%- if tools is not none or documents %}{{ 'never' }}{% endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""
TEMPLATES = {"marked": MARKED, "in_brackets": IN_BRACKETS, "with_heads": WITH_HEADS}
USER = {"role": "user", "content": "Hello, 2 + 2?"}
ANSWER = {"role": "assistant", "content": " Four. "}
SYSTEM = {"role": "system", "content": "You answer in one word."}
CHATS = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER, ANSWER],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": f"in the text: {STOP}\n{BOS} and {EOS}"}],
    [{"role": "user", "content": "  日本語 🙂\r\n{{ bos_token }}{% if %} <b>&amp;</b> 'quoted' \"twice\"  "}],
)
WIDER = (  # what the third template knows
    [USER, ANSWER | {"reasoning": "2 + 2 = 4"}, USER],
    [{"role": "user", "content": [{"type": "text", "text": "né <b> 'x'"}, {"n": 1, "deep": [None, True]}]}],
    [{"role": "user", "content": None, "tool_calls": None}, {"role": "ignored", "content": "x"}, USER],
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The text side and transformers' tokenizer of a folder with each template, by the template's name."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    home, made = tmp_path_factory.mktemp("chats"), {}
    for (name, template), base in zip(TEMPLATES.items(), ("qwen2", "llama2", "llama3"), strict=True):
        ends = "none" if name == "marked" else "bos"
        folder = kinds.with_config(kinds.kind(base, ends), chat_template=template).write(home / name)
        made[name] = text_side.read(folder), auto.from_pretrained(folder)
    return made


def both(pair, messages, **options):
    """Ids of the messages, ours and those of transformers."""
    ours, theirs = pair
    return ours.encode_chat(messages, **options), list(
        theirs.apply_chat_template(messages, **{"add_generation_prompt": True} | options, return_dict=False)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_of_a_chat_are_those_of_transformers(pairs, name):
    for messages in (*CHATS, *(WIDER if name == "with_heads" else ())):
        for prompt in (True, False):
            ours, theirs = both(pairs[name], messages, add_generation_prompt=prompt)
            assert ours == theirs, (messages, prompt)
    ours, _ = both(pairs[name], [SYSTEM, USER])
    assert ours.count(1) == (0 if name == "marked" else 1)  # BOS is written by the template alone
    if name != "in_brackets":
        assert 3 in ours and 4 in ours  # <|im_start|> and <|im_end|>


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.data())
def test_ids_of_any_chat_are_those_of_transformers(pairs, data):
    count = data.draw(st.integers(1, 4))
    messages = [{"role": ("user", "assistant")[i % 2], "content": data.draw(kinds.texts())} for i in range(count)]
    if data.draw(st.booleans()):
        messages = [{"role": "system", "content": data.draw(kinds.texts())}, *messages]
    for pair in pairs.values():
        ours, theirs = both(pair, messages)
        assert ours == theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_last_message_can_be_left_open(pairs, name):
    ours, theirs = pairs[name]
    for content in ("The answer is", "The answer is  ", " x"):
        messages = [USER, {"role": "assistant", "content": content}]
        special = {"bos_token": BOS, "eos_token": EOS}
        text = chat.render(ours.chat_template, messages, special, False, continue_final_message=True)
        assert text == theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert messages[1]["content"] == content


def test_the_template_of_a_file_wins_and_default_is_chosen_from_several(tmp_path):
    def read(config=None, jinja=None):
        made = kinds.with_config(kinds.kind("gpt2", "none"), **config or {}).write(tmp_path / "folder")
        (made / "chat_template.jinja").unlink(missing_ok=True)
        if jinja is not None:
            (made / "chat_template.jinja").write_text(jinja, encoding="utf-8")
        return text_side.read(made).chat_template

    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    assert read() is None and read({"chat_template": "one"}) == "one"
    assert read({"chat_template": named}) == "usual" and read({"chat_template": named[:1]}) is None
    assert read({"chat_template": "one"}, "{# é #}file") == "{# é #}file" and read(jinja="file") == "file"


def test_a_model_encodes_chats_with_the_template_of_its_folder(pairs):
    ours, _ = pairs["marked"]
    model = Model(None, None, ours.tokenizer, "small", ours.bos_id, (4,), "small", ours)
    assert model.encode_chat([USER]) == both(pairs["marked"], [USER])[1]
    closed = both(pairs["marked"], [USER, ANSWER], add_generation_prompt=False)[1]
    assert model.encode_chat([USER, ANSWER], add_generation_prompt=False) == closed
    plain = dataclasses.replace(model, text=None)
    with pytest.raises(CheckpointError, match="no chat template"):
        plain.encode_chat([USER])
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        dataclasses.replace(plain, tokenizer=None).encode_chat([USER])


def fails(message, template, messages=(USER,), **options):
    with pytest.raises(CheckpointError, match=message) as error:
        chat.render(template, list(messages), {}, **options)
    text = str(error.value)
    assert one_sentence(text)


def test_what_cannot_be_rendered_is_said_in_one_sentence(monkeypatch):
    pytest.importorskip("jinja2")
    fails("no chat template; give a text", None)
    fails("refuses the messages: Roles take turns", IN_BRACKETS, [USER, USER])
    fails("no valid Jinja: Unexpected end of template", "{% if x %}")
    fails("refuses the messages: .*has no attribute", "{{ messages.none.at.all }}")
    fails("refuses the messages: .*zero", "{{ 1 / 0 }}")
    for messages in ([], ["hello"], [{"content": "x"}], "hello"):
        fails("messages are mappings with a role and a content, at least one; got", "x", messages)
    fails("no text that could be continued", "x", [{"role": "user"}], continue_final_message=True)
    fails("leaves out the message that is to continue", "x", continue_final_message=True)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    fails(r"need jinja2; install 'alisa-jax\[chat\]'", "x")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ messages[0].update(role='x') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack):
    pytest.importorskip("jinja2")
    messages = [dict(USER)]
    with pytest.raises(chat.TemplateError):
        chat.render(attack, messages, {})
    assert messages == [USER]


def test_a_template_is_shown_plain_data(tmp_path):
    pytest.importorskip("jinja2")

    class Text(str):
        """A text with a method that a template must not reach."""

        def write(self):
            raise AssertionError

    fails("has no attribute 'write'", "{{ messages[0].content.write() }}", [{"role": "user", "content": Text("x")}])
    template = "{{ messages | tojson(sort_keys=true) }}{{ strftime_now('%Y') | length }}"
    made = chat.render(template, [{"role": "user", "content": ("é", 1.5, None, tmp_path)}], {})
    assert json.loads(made[:-1]) == [{"role": "user", "content": ["é", 1.5, None, str(tmp_path)]}] and made[-1] == "4"


def test_files_of_special_tokens_name_what_templates_see(tmp_path):
    folder = kinds.kind("gpt2", "none").write(tmp_path / "folder")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(
        folder / "special_tokens_map.json", {"bos_token": {"content": START, "lstrip": False}, "eos_token": STOP}
    )
    read = text_side.read(folder)
    assert (read.bos_token, read.eos_token, read.bos_id) == (START, STOP, None)
