"""The prompt template: its wording, what is stripped, what is left alone and what is refused.

| test                                 | proves                                             | judged against       |
| test_wording_of_the_default_template | the wording of the original inference script       | the text written out |
| test_only_the_ends_are_stripped      | white space goes at both ends and nowhere else     | the text written out |
| test_fields_in_a_text_are_left_alone | what a user wrote is never taken for a field       | the text written out |
| test_bad_template_is_refused         | each field once, prompt first; the message says so | the message          |
| test_what_is_noted_is_read_back      | the same pieces, of each kind; today's strings     | the noted strings    |
| test_pieces_of_...                   | control tokens, dialogues                          | pieces by hand       |

Ids are those of test_text_encoder.py, the exported templates those of tests/huggingface.
"""
import pytest

from mindrlhf.data.control_tokens import Control
from mindrlhf.data.dialogue import Message
from mindrlhf.data.template import PROMPT_TEMPLATE, check_template, open_template, read_template, render
from mindrlhf.errors import UserError


def test_wording_of_the_default_template():
    assert PROMPT_TEMPLATE == "根据一下问题，写一个合适的回答。\n\n### 问题：\n{prompt}\n\n### 回答：\n{response}"


def test_default_template_holds_question_and_answer():
    assert render(PROMPT_TEMPLATE, "天为什么是蓝的？", "因为散射。") == (
        "根据一下问题，写一个合适的回答。\n\n### 问题：\n天为什么是蓝的？\n\n### 回答：\n因为散射。")


@pytest.mark.parametrize(("prompt", "response", "expected"), [
    ("  why? ", "because\n", "Q why? A because."),
    ("\n\tone\n\ntwo\r\n", " a  b ", "Q one\n\ntwo A a  b."),
    ("\u3000为什么\u3000", "\u3000因为", "Q 为什么 A 因为."),
    ("why?", "   ", "Q why? A ."),
])
def test_only_the_ends_are_stripped(prompt, response, expected):
    assert render("Q {prompt} A {response}.", prompt, response) == expected


@pytest.mark.parametrize(("prompt", "response", "expected"), [
    ("say {response}", "no", "Q say {response} A no"),
    ("say {prompt}", "{prompt}{response}", "Q say {prompt} A {prompt}{response}"),
    ("{0} {} }{ {{x}}", "{", "Q {0} {} }{ {{x}} A {"),
    (r"\n %s \1", "$x", r"Q \n %s \1 A $x"),
])
def test_fields_in_a_text_are_left_alone(prompt, response, expected):
    assert render("Q {prompt} A {response}", prompt, response) == expected


def test_text_after_the_response_is_kept():
    assert render("{prompt}|{response}</s>", "a", "b") == "a|b</s>"


def test_literal_backslash_n_of_a_shell_becomes_a_line_break():
    assert check_template(r"{prompt}\n\nA: {response}") == "{prompt}\n\nA: {response}"


def test_good_template_is_returned_unchanged():
    assert check_template(PROMPT_TEMPLATE) == PROMPT_TEMPLATE


@pytest.mark.parametrize(("template", "message"), [
    ("{response}", "{prompt} occurs 0 times, expected once: '{response}'"),
    ("{prompt}", "{response} occurs 0 times, expected once: '{prompt}'"),
    ("{prompt} {prompt} {response}", "{prompt} occurs 2 times, expected once: '{prompt} {prompt} {response}'"),
    ("{prompt} {response}{response}", "{response} occurs 2 times, expected once: '{prompt} {response}{response}'"),
    ("{response} {prompt}", "{response} comes before {prompt}: '{response} {prompt}'"),
])
def test_bad_template_is_refused(template, message):
    with pytest.raises(UserError) as caught:
        check_template(template)
    assert str(caught.value) == f"--prompt_template: {message}"


@pytest.mark.parametrize(("asked", "noted"), [
    (PROMPT_TEMPLATE, PROMPT_TEMPLATE), ("glm4-chat", "glm4-chat"), ("{prompt}|{response}", "{prompt}|{response}"),
    ("<sop>{prompt}|{response}", "{#control tokens#}<sop>{prompt}|{response}"),
    (r"\<sop>{prompt}|{response}", r"{#control tokens#}\<sop>{prompt}|{response}"),
])
def test_what_is_noted_is_read_back(asked, noted):
    dialogue = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"))
    assert open_template(asked).noted == noted
    assert read_template(noted).pieces(dialogue) == open_template(asked).pieces(dialogue)
    assert read_template(noted).noted == noted


@pytest.mark.parametrize(("template", "pieces"), [
    ("<sop>Q {prompt}<|user|>\n{response}", [Control("<sop>"), "Q ", "<|user|>", Control("<|user|>"), "\n", "b"]),
    (r"\<|user|>{prompt}:{response}", ["<|user|>", "<|user|>", ":", "b"]),
    (r"a\b{prompt}{response}\[gMASK][gMASK]", ["a\\b", "<|user|>", "b", "[gMASK]", Control("[gMASK]")]),
])
def test_pieces_of_a_text_template(template, pieces):
    found = open_template(template).pieces((Message("user", " <|user|> "), Message("assistant", "b")))
    assert [piece for piece in found if piece] == pieces


def test_an_answer_without_a_question_is_refused():
    with pytest.raises(UserError, match="expected a message of the user in front of the first one of the assistant"):
        open_template(PROMPT_TEMPLATE).pieces((Message("system", "s"), Message("assistant", "b")))


@pytest.mark.parametrize("text", ["", "glm4_chat", "chat.jinja2"])
def test_a_name_that_is_none_is_answered_with_what_there_is(text):
    with pytest.raises(UserError) as caught:
        open_template(text)
    assert str(caught.value) == (f"--prompt_template: found {text!r}, expected a text with {{prompt}} and "
                                 "{response}, glm4-chat, or the name of a .jinja file")


@pytest.mark.parametrize("noted", ["", "{prompt}", "glm4"])
def test_what_no_release_notes_is_refused(noted):
    with pytest.raises(UserError, match="the noted prompt template is "):
        read_template(noted)
