"""A prompt template in Jinja: what is rendered, which control tokens are some, and what is refused.

| test                                      | proves                                            | judged against  |
| test_what_transformers_offers_is_there    | tojson, namespace, break, generation, strftime    | text by hand    |
| test_white_space_of_blocks                | trim_blocks, lstrip_blocks, the last line break   | text by hand    |
| test_what_messages_are_made_of_...        | a user's characters beside a template's stay text | pieces by hand  |
| test_what_cannot_be_told_apart_is_refused | no control token of a user's and a template's     | the message     |
| test_errors_name_the_line                 | FILE:LINE: reason, in one line                    | messages        |
| test_nothing_is_executed                  | the sandbox                                       | the message     |

transformers itself renders what is exported of a template in tests/huggingface/test_against_transformers.py.
"""
import contextlib
import datetime

import pytest

from mindrlhf.data.control_tokens import Control
from mindrlhf.data.dialogue import Message
from mindrlhf.data.template import open_template, read_template
from mindrlhf.errors import UserError

USER = Control("<|user|>")


def pieces(template, *contents):
    return read_template("{#jinja#}" + template).pieces(tuple(Message("user", content) for content in contents))


def message_of(template, *contents):
    with pytest.raises(UserError) as caught:
        pieces(template, *contents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("template", "expected"), [
    ("{{ messages | tojson }}", '[{"role": "user", "content": "é<&>"}]'),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{% for m in messages * 3 %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}", "é<&>."),
    ("{{ messages[0].content | trim | upper }}{{ bos_token }}{{ tools }}", "É<&>None"),
    ("{{ strftime_now('%Y') }}{{ messages and '' }}", str(datetime.date.today().year)),
])
def test_what_transformers_offers_is_there(template, expected):
    assert "".join(pieces(template, "é<&>")) == expected


def test_white_space_of_blocks_goes_as_in_transformers():
    template = "a\n  {% if true %}\n b\n  {% endif %}\n{{ messages[0].content }}\n"
    assert pieces(template, " c ") == ["a\n b\n c "]


def test_eos_token_is_a_control_token():
    assert pieces("{{ messages[0].content }}{{ eos_token }}", "a") == ["a", Control("<|endoftext|>")]


@pytest.mark.parametrize(("template", "content", "expected"), [
    ("<|user|>{{ messages[0].content }}", "<|user|>", [USER, "<|user|>"]),
    ("<|user|>{{ messages[0].content | trim }}<|user|>", " <|user|> ", [USER, "<|user|>", USER]),
    ("{{ '<|' + messages[0].role + '|>' }}{{ messages[0].content }}", "user|>", [USER, "user|>"]),
    ("<|user|>{{ messages[0].content }}", "\ufdd0<|user|>\ufdd1", [USER, "\ufdd0<|user|>\ufdd1"]),
    ("<|user|>{{ messages[0].content[:6] }}", "<|user|>", [USER, "<|user"]),
    ("{{ messages[0].content }}<|user|>", "user", ["user", USER]),
    ("{{ messages[0].content }}", "[gMASK]", ["[gMASK]"]),
])
def test_what_messages_are_made_of_stays_text(template, content, expected):
    assert pieces(template, content) == expected


@pytest.mark.parametrize(("template", "content"), [
    ("<|{{ messages[0].content }}|>", "user"), ("{{ messages[0].content }}|>", "<|user"),
    ("{{ messages[0].content }}>", "<|user|"), ("[g{{ messages[0].content }}", "MASK] and more"),
    ("{{ messages[0].content | replace('x', '') }}", "<|uxser|>"),
    ("{% if '<' in messages[0].content %}<sop>{% endif %}{{ messages[0].content }}", "a < b"),
])
def test_what_cannot_be_told_apart_is_refused(template, content):
    assert message_of(template, content) == (
        "the .jinja template: a control token in its text is made of characters of a message, or depends on "
        "them, expected control tokens of the template alone")


@pytest.mark.parametrize(("template", "message"), [
    ("a\n{% for m in messages %}\n{{ m.content + 1 }}\n{% endfor %}",
     'the .jinja template:3: can only concatenate str (not "int") to str'),
    ("\n\n{{ messages }}{{ raise_exception('two\nlines') }}", "the .jinja template:3: two lines"),
    ("{{ messages }}\n{% if %}",
     "the .jinja template:2: not Jinja: Expected an expression, got 'end of statement block'"),
    ("{{ message }}", "the .jinja template: does not ask for messages, expected a template over them"),
    ("{{ messages }}{{ pad_token }}", "the .jinja template: asks for pad_token, expected eos_token"),
])
def test_errors_name_the_line(template, message):
    assert message_of(template, "a") == message


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}",
                                      "{{ messages | map(attribute='__class__') | list }}",
                                      "{% for i in range(10 ** 9) %}{{ messages }}{% endfor %}"])
def test_nothing_is_executed(template):
    with contextlib.suppress(UserError):
        assert "class" not in "".join(pieces(template, "a"))


def test_a_file_is_read_and_noted_with_its_content(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("<|user|>{{ messages[0].content }}\n", encoding="utf-8")
    opened = open_template(str(path))
    assert opened.noted == "{#jinja#}<|user|>{{ messages[0].content }}\n"
    assert opened.pieces((Message("user", "a"),)) == read_template(opened.noted).pieces((Message("user", "a"),))


def test_a_mark_of_utf_8_in_front_of_a_file_is_none_of_the_text(tmp_path):
    (tmp_path / "chat.jinja").write_bytes("\ufeff{{ messages[0].content }}".encode())
    assert open_template(str(tmp_path / "chat.jinja")).noted == "{#jinja#}{{ messages[0].content }}"


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot be read: No such file or directory"),
    (b"{{ x }}\xff", "not UTF-8: byte 0xff at position 8, expected a Jinja template"),
    (b"\n{{ x ", "2: not Jinja: unexpected end of template, expected 'end of print statement'."),
])
def test_a_file_that_is_no_template_is_refused(tmp_path, content, message):
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_template(str(path))
    assert str(caught.value) == f"{path}:{'' if message[0] == '2' else ' '}{message}"
