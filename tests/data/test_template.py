"""The prompt template: its wording, what is stripped, what is left alone and what is refused.

| test                                 | proves                                             | judged against       |
| test_wording_of_the_default_template | the wording of the original inference script       | the text written out |
| test_only_the_ends_are_stripped      | white space goes at both ends and nowhere else     | the text written out |
| test_fields_in_a_text_are_left_alone | what a user wrote is never taken for a field       | the text written out |
| test_bad_template_is_refused         | each field once, prompt first; the message says so | the message          |
"""
import pytest

from mindrlhf.data.template import PROMPT_TEMPLATE, check_template, render
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
    ("", "{prompt} occurs 0 times, expected once: ''"),
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
