"""Values of command-line flags: what is taken, and that everything else is refused with what was found.

| test                                        | proves                                       | judged against |
| test_boolean_is_what_it_says                | the text False is False                      | literal values |
| test_positive_int_is_a_whole_number_above_0 | numbers that are taken                       | literal values |
| test_grades_are_of_kinds_of_answers         | names with = in them, numbers of any sign    | literal values |
| test_other_values_are_refused               | the message says what was found and expected | messages       |
| test_flags_are_taken_in_full_only           | an abbreviation is an unknown flag           | exit code 2    |
"""
import argparse

import pytest

from mindrlhf.cli import boolean, grades, new_parser, not_used, positive_int, positive_number, template


@pytest.mark.parametrize(("text", "value"), [
    ("True", True), ("true", True), ("1", True), ("yes", True), (" TRUE ", True),
    ("False", False), ("false", False), ("0", False), ("no", False), ("FALSE", False),
])
def test_boolean_is_what_it_says(text, value):
    assert boolean(text) is value


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("8192", 8192), (" 7 ", 7), ("+3", 3)])
def test_positive_int_is_a_whole_number_above_0(text, value):
    assert positive_int(text) == value


def test_grades_are_of_kinds_of_answers():
    assert grades("拒绝&正向建议=2, 拒绝为主 =1,a=b=-0.5") == (("拒绝&正向建议", 2.0), ("拒绝为主", 1.0), ("a=b", -0.5))


GRADE = "expected KIND=GRADE with a number as the grade, and commas between several"


@pytest.mark.parametrize(("kind", "text", "message"), [
    (grades, "", f"found '', {GRADE}"),
    (grades, "拒绝", f"found '拒绝', {GRADE}"),
    (grades, "拒绝=2,=1", f"found '=1', {GRADE}"),
    (grades, "拒绝=nan", f"found '拒绝=nan', {GRADE}"),
    (grades, "拒绝=2,拒绝 =1", "found '拒绝' twice, expected each kind once"),
    (positive_number, "0", "found '0', expected a number above 0"),
    (positive_number, "inf", "found 'inf', expected a number above 0"),
    (positive_number, "", "found '', expected a number above 0"),
    (boolean, "maybe", "found 'maybe', expected True or False"),
    (boolean, "", "found '', expected True or False"),
    (boolean, "2", "found '2', expected True or False"),
    (positive_int, "0", "found '0', expected a whole number above 0"),
    (positive_int, "-1", "found '-1', expected a whole number above 0"),
    (positive_int, "1.5", "found '1.5', expected a whole number above 0"),
    (positive_int, "1e3", "found '1e3', expected a whole number above 0"),
    (positive_int, "", "found '', expected a whole number above 0"),
    (positive_int, "many", "found 'many', expected a whole number above 0"),
    (not_used("use b"), "a", "found 'a', which has no effect here: use b"),
    (template, "{prompt}", "{response} occurs 0 times, expected once: '{prompt}'"),
    (template, "{response}{prompt}", "{response} comes before {prompt}: '{response}{prompt}'"),
])
def test_other_values_are_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert str(caught.value) == message


def test_template_of_a_shell_gets_its_line_breaks():
    assert template(r"{prompt}\n{response}").noted == "{prompt}\n{response}"


@pytest.fixture
def parser():
    parser = new_parser("What it does.")
    parser.add_argument("--seq_length", type=positive_int)
    parser.add_argument("--resume", type=boolean)
    return parser


def test_parser_hands_the_values_on(parser):
    assert vars(parser.parse_args(["--seq_length", "8", "--resume", "False"])) == {"seq_length": 8, "resume": False}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seq", "8"], "unrecognized arguments: --seq 8"),
    (["--unknown", "8"], "unrecognized arguments: --unknown 8"),
    (["--resume", "maybe"], "argument --resume: found 'maybe', expected True or False"),
    (["--seq_length", "0"], "argument --seq_length: found '0', expected a whole number above 0"),
], ids=["abbreviated", "unknown", "neither true nor false", "no length"])
def test_flags_are_taken_in_full_only(parser, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")
