"""The formats of preference data: what each becomes, written out by hand, and which of them a row is taken for.

| test                                    | proves                                             | judged against  |
| test_a_format_gives_the_pairs_by_hand   | prompts, answers, their order, numbers and margins | literal pairs   |
| test_a_fixture_is_detected_as_itself    | by its rows, as JSON and as CSV                    | fixture's name  |
| test_precedence                         | rows with the keys of two formats                  | literal names   |
| test_prompts_are_numbered_...           | numbers go on over rows of two answers             | literal numbers |
| test_a_row_that_cannot_be_used_says_why | the checks of each format, in one line             | messages        |
| test_a_later_row_of_another_format_...  | it is invalid, never read as what it is not        | every other one |
| test_grades_...                         | margins of kinds of answers, what is refused       | literal numbers |
| test_columns_...                        | other names of keys                                | literal pairs   |
| test_implicit_prompts_are_those_of_trl  | the prompt of two dialogues                        | TRL             |
"""
import csv
import itertools
import json
import random
import subprocess

import pytest
from conftest import reference_python
from formats_by_hand import FIXTURES, MESSAGES, ONE, A, B, Q, bot, hh, said, user

from mindrlhf.data.dialogue import Message
from mindrlhf.data.formats import FORMATS, format_of
from mindrlhf.data.preference import InvalidRow, Preference, Reading, Row, Skipped, read_preferences
from mindrlhf.errors import UserError


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows):
    """A cell is text, or JSON of anything else; no value is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row[key] if isinstance(row.get(key), str) else "" if row.get(key) is None else
                          json.dumps(row[key]) for key in columns] for row in rows)
    return path


def found(path, **options):
    """What comes of a file as FIXTURES has it."""
    rows = []
    for row in read_preferences(path, **options):
        if isinstance(row, InvalidRow):
            raise row.as_error()
        if isinstance(row, Skipped):
            rows.append((row.reason, row.pairs))
            continue
        values = (row.prompt, row.chosen, row.rejected, row.margin, row.prompt_id, row.chosen_answer,
                  row.rejected_answer)
        rows.append(values)
    return rows


def filled(pairs):
    return [pair if len(pair) == 2 else (*pair, *[None] * (7 - len(pair))) for pair in pairs]


@pytest.mark.parametrize("write", [write_jsonl, write_csv], ids=["jsonl", "csv"])
@pytest.mark.parametrize("name", FIXTURES)
def test_a_format_gives_the_pairs_by_hand(tmp_path, name, write):
    path = write(tmp_path / f"rows.{write.__name__[6:]}", [row for row, _ in FIXTURES[name]])
    expected = filled(pair for _, pairs in FIXTURES[name] for pair in pairs)
    assert found(path) == expected
    assert found(path, format_name=name) == expected


def test_every_format_has_a_fixture():
    assert set(FIXTURES) == set(FORMATS)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_is_detected_as_itself(name):
    """By each of its rows; as cells of text by the first, whose answers are not empty."""
    for row, _ in FIXTURES[name]:
        assert format_of(Row("f:1", 1, row)) == name
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in FIXTURES[name][0][0].items()}
    assert format_of(Row("f:1", 1, cells, cells=True)) == name


@pytest.mark.parametrize(("row", "name"), [
    ({"prompt": "q", "pos_resp": "a", "neg_resp": "b", "chosen": "c", "rejected": "d"}, "cvalues"),
    ({"prompt": "q", "pos_resp": "a"}, "cvalues"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "subset": "s"}, "explicit"),
    ({"prompt": "q", "chosen": "[1]", "rejected": "[2]"}, "explicit"),
    ({"prompt": "q", "chosen": MESSAGES, "rejected": MESSAGES, "messages": MESSAGES}, "messages-implicit"),
    ({"messages": MESSAGES, "rejected_response": "b", "chosen": "a", "rejected": "b"}, "swift"),
    ({"instruction": "q", "chosen": "a", "rejected": "b", "prompt": "q"}, "alpaca"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "implicit"),
    ({"prompt": "q", "response": "a"}, None),
    ({"instruction": "q", "output": "a"}, None),
    ({"prompt": json.loads("[" * 900 + "]" * 900), "chosen": "a", "rejected": "b"}, None),
    ({}, None),
])
def test_precedence(row, name):
    assert format_of(Row("f:1", 1, row)) == name


def test_a_cell_that_begins_like_json_is_text_where_the_format_wants_text(tmp_path):
    row = {"prompt": "[1, 2]", "chosen": '["a"', "rejected": '{"b": 1}'}
    assert found(write_csv(tmp_path / "rows.csv", [row])) == filled(
        [((user("[1, 2]"),), (bot('["a"'),), (bot('{"b": 1}'),))])


def test_prompts_are_numbered_over_the_whole_file_and_those_without_a_pair_have_no_number(tmp_path):
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}
    two, tie = {**row, "responses": ["a", "b"], "scores": [2, 1]}, {**row, "scores": [1, 1, 1]}
    rows = list(read_preferences(write_jsonl(tmp_path / "rows.jsonl", [row, two, tie, {"prompt": 1}, row])))
    assert [pair.prompt_id for pair in rows if isinstance(pair, Preference)] == [0, 0, 0, None, 2, 2, 2]
    assert [(row.pairs, row.whole_row) for row in rows if isinstance(row, Skipped)] == [(3, True)]


def test_pku_saferlhf_has_two_preferences(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [FIXTURES["pku-saferlhf"][0][0]])
    assert found(path, reading=Reading(preference="better")) == filled([ONE])
    assert found(path, reading=Reading(preference="safer")) == filled([(Q, B, A)])


GRADES = Reading(grades=(("拒绝&正向建议", 2), ("拒绝为主", 1), ("风险回复", 0)), scale=0.5)


def graded(better, worse, **more):
    return {"prompt": "q", "pos_resp": "a", "neg_resp": "b", "pos_type": better, "neg_type": worse, **more}


def test_grades_make_the_margins_of_cvalues(tmp_path):
    """Half of the difference of both grades, whichever is the higher one; without grades there is no margin."""
    rows = [graded("拒绝&正向建议", "风险回复", margin=None), graded("拒绝为主", "风险回复", margin=""),
            graded("拒绝为主", "拒绝为主"), graded("风险回复", "拒绝&正向建议")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [pair.margin for pair in read_preferences(path, reading=GRADES)] == [1.0, 0.5, 0.0, -1.0]
    assert {pair.margin for pair in read_preferences(write_jsonl(path, rows[2:]))} == {None}
    path = write_jsonl(path, [{**graded("拒绝为主", "风险回复"), "kind": "拒绝&正向建议"}])
    pair, = read_preferences(path, reading=GRADES._replace(columns=(("pos_type", "kind"),)))
    assert pair.margin == 1.0


NO_GRADE = "which has no grade, expected one of --grades: 拒绝&正向建议, 拒绝为主, 风险回复"


@pytest.mark.parametrize(("row", "reason"), [
    (graded("拒绝", "风险回复"), f"key 'pos_type' is '拒绝', {NO_GRADE}"),
    (graded("拒绝为主", ""), f"key 'neg_type' is '', {NO_GRADE}"),
    (graded("拒绝为主", 0), "key 'neg_type' is a number, expected a string"),
    ({"prompt": "q", "pos_resp": "a", "neg_resp": "b", "pos_type": "拒绝为主"},
     "key 'neg_type' missing; found prompt, pos_resp, neg_resp, pos_type; expected pos_type, neg_type"),
])
def test_grades_leave_a_row_without_a_grade_invalid(tmp_path, row, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", [graded("拒绝为主", "风险回复"), row])
    _, invalid = read_preferences(path, reading=GRADES)
    assert invalid.as_error().messages == [f"{path}:2: {reason}"]


def test_grades_beside_a_margin_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [graded("拒绝为主", "风险回复", margin=0.5)])
    with pytest.raises(UserError) as caught:
        list(read_preferences(path, reading=GRADES))
    assert str(caught.value) == (f"{path}:1: key 'margin' is 0.5, and --grades makes margins too, expected one of "
                                 "them: leave --grades out")


IMPLICIT, CHAT = "keys 'chosen' and 'rejected'", [said("user", "q"), said("assistant", "a")]
INVALID = [
    ("explicit", {"prompt": " ", "chosen": "a", "rejected": "b"}, "key 'prompt' is empty, expected text"),
    ("explicit", {"prompt": "q", "chosen": "a"}, "key 'rejected' missing; found prompt, chosen; expected prompt, "
                                                 "chosen, rejected"),
    ("explicit", {"prompt": [], "chosen": "a", "rejected": "b"}, "key 'prompt' is an array, expected a string"),
    ("explicit", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"},
     "key 'margin' is a string, expected a number"),
    ("explicit", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10 ** 400},
     f"key 'margin' is 1{'0' * 39}, expected a finite number"),
    ("explicit", {"prompt": "q", "chosen": "a\ud800", "rejected": "b"},
     "key 'chosen' has half of a surrogate pair, which is no text"),
    ("explicit", {"prompt": "q", "chosen": "a", "rejected": "b", "system": 1},
     "key 'system' is a number, expected a string"),
    ("implicit", {"chosen": "a", "rejected": hh("q", "b")},
     "key 'chosen' begins with 'a', expected turns 'Human: ...' and 'Assistant: ...', with a blank line between them"),
    ("implicit", {"chosen": hh("q", "a"), "rejected": hh("p", "b")},
     f"{IMPLICIT} have no prompt in common, expected dialogues that begin alike, up to an answer of the assistant"),
    ("implicit", {"chosen": hh("", "a"), "rejected": hh("", "b")},
     f"{IMPLICIT}: the last message of the prompt is empty, expected text"),
    ("messages-implicit", {"chosen": CHAT, "rejected": [said("assistant", "a")]},
     f"{IMPLICIT} have no prompt in common, expected dialogues that begin alike, up to an answer of the assistant"),
    ("messages-implicit", {"chosen": [said("user", "q"), said("system", "s"), *CHAT],
                           "rejected": [said("user", "q"), said("system", "s"), said("user", "q"),
                                        said("assistant", "b")]},
     f"{IMPLICIT}: a system message that is not the first one, expected it to be the first"),
    ("messages-explicit", {"prompt": CHAT, "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
     "key 'prompt': the prompt ends with a message of the role 'assistant', expected one of the user or an "
     "observation"),
    ("messages-explicit", {"prompt": [], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
     "key 'prompt': the prompt ends with no message, expected one of the user or an observation"),
    ("messages-explicit", {"prompt": [said("user", "q")], "chosen": [said("user", "a")], "rejected": []},
     "key 'chosen': the answer begins with a message of the role 'user', expected one of the assistant"),
    ("messages-explicit", {"prompt": [said("pope", "q")], "chosen": [], "rejected": []},
     "key 'prompt', message 1: role is 'pope', expected one of system, user, assistant, observation, human, gpt, "
     "model, function_call, developer, tool, function, ipython"),
    ("messages-explicit", {"prompt": ["q"], "chosen": [], "rejected": []},
     "key 'prompt', message 1 is a string, expected an object with role and content"),
    ("messages-explicit", {"prompt": [{"role": "user"}], "chosen": [], "rejected": []},
     "key 'prompt', message 1: key 'content' missing; found role; expected role, content"),
    ("messages-explicit", {"prompt": [said("user", None)], "chosen": [], "rejected": []},
     "key 'prompt', message 1: content is null, expected a string"),
    ("messages-explicit", {"prompt": [said("system", "s"), said("user", "q")], "system": "t",
                           "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
     "key 'system' is not the system message of the dialogue, expected one of them"),
    ("alpaca", {"instruction": "", "input": "", "chosen": "a", "rejected": "b"},
     "keys 'instruction' and 'input': the last message of the prompt is empty, expected text"),
    ("alpaca", {"instruction": "q", "history": [["q"]], "chosen": "a", "rejected": "b"},
     "key 'history', item 1 is ['q'], expected a list of question and answer"),
    ("alpaca", {"instruction": "q", "output": ["a"]},
     "key 'output' has 1 items, expected the better and the worse answer"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "p"}],
                  "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
     "key 'conversations', turn 2 is of the role 'user', expected the assistant's"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "human", "value": "a"},
                  "rejected": {"from": "gpt", "value": "b"}},
     "key 'chosen': the answer begins with a message of the role 'user', expected one of the assistant"),
    ("swift", {"messages": [said("user", "q")], "rejected_response": "b"},
     "key 'messages', the last message: the answer begins with a message of the role 'user', expected one of the "
     "assistant"),
    ("swift", {"messages": CHAT}, "key 'rejected_response' missing; found messages; expected messages, "
                                  "rejected_response"),
    ("ranked", {"context": [said("user", "q")], "completions": [{"rank": 0}]},
     "key 'completions', item 1: found the keys rank, expected an object with rank and completion"),
    ("ranked", {"context": [said("user", "q")], "completions": [{"rank": True, "completion": CHAT[1:]}]},
     "key 'completions', item 1: rank is a boolean, expected a number"),
    ("ranked", {"context": [said("user", "q")], "completions": [{"rank": 0, "completion": CHAT[1:]}]},
     "key 'completions' has 1 items, expected two answers or more"),
    ("answers", {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
     "key 'scores' has 1 items, expected 2, as many as 'responses'"),
    ("answers", {"prompt": "q", "responses": ["a", 1], "scores": [1, 2]},
     "key 'responses', item 2 is a number, expected a string"),
    ("answers", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 0]},
     "keys 'scores' and 'ranks' are both there, expected one of them: --columns renames keys"),
    ("pku-saferlhf", {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 2},
     "key 'better_response_id' is 2, expected 0 or 1"),
    ("helpsteer3", {"context": MESSAGES, "response1": "a", "response2": "b", "overall_preference": -4},
     "key 'overall_preference' is -4, expected a whole number from -3 to 3"),
    ("helpsteer3", {"context": MESSAGES, "response1": "a", "response2": "b", "overall_preference": 0.5},
     "key 'overall_preference' is 0.5, expected a whole number from -3 to 3"),
    ("reward-bench-2", {"prompt": "q", "chosen": [], "rejected": ["b"]},
     "key 'chosen' is an empty list, expected at least one answer"),
]


@pytest.mark.parametrize(("name", "row", "reason"), INVALID)
def test_a_row_that_cannot_be_used_says_why(tmp_path, name, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n", encoding="utf-8")
    only, = read_preferences(path, format_name=name)
    assert str(only.as_error()) == str(UserError(f"{path}:2: {reason}"))


def test_a_cell_that_is_no_json_where_the_format_wants_a_list_says_why(tmp_path):
    """As pandas writes lists into CSV."""
    path = tmp_path / "rows.csv"
    path.write_text("messages,rejected_response\n\"[{'role': 'user'}]\",b\n")
    only, = read_preferences(path, format_name="swift")
    assert only.reason == ("key 'messages': not JSON: Expecting property name enclosed in double quotes at column 3; "
                           "expected a list of messages as JSON")


# A row of the second is also one of the first, with the same pairs.
ALSO = {("explicit", "reward-bench"), ("messages-implicit", "messages-explicit")}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_later_row_of_another_format_is_invalid(tmp_path, name):
    first = FIXTURES[name][0][0]
    for other, rows in FIXTURES.items():
        if other == name or (name, other) in ALSO:
            continue
        *_, last = read_preferences(write_jsonl(tmp_path / "rows.jsonl", [first, rows[0][0]]))
        assert isinstance(last, InvalidRow), other
        assert last.number == 2


def test_rows_of_no_known_format_are_one_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "better": "a", "worse": "b"}])
    with pytest.raises(UserError) as caught:
        read_preferences(path)
    assert str(caught.value) == (
        f"{path}:1: no format has the keys question, better, worse with values of these kinds, expected for example "
        "prompt, chosen, rejected, or prompt, pos_resp, neg_resp; --columns OURS=THEIRS renames keys, --format NAME "
        "forces a format")


def test_columns_rename_keys_and_what_had_the_name_is_not_read(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [
        {"question": "q", "better": "a", "rejected": "b", "prompt": "not this"}, {"better": "a", "rejected": "b"}])
    reading = Reading((("chosen", "better"), ("prompt", "question")))
    first, second = read_preferences(path, reading=reading)
    assert (first.prompt, first.chosen, first.rejected) == ONE
    assert second.reason == "key 'question' missing (--columns prompt=question); found better, rejected"


def test_columns_may_change_places(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "b", "rejected": "a"}])
    assert found(path, reading=Reading((("chosen", "rejected"), ("rejected", "chosen")))) == filled([ONE])


TRL = """
import json, sys
from trl.data_utils import extract_prompt
print(json.dumps([extract_prompt(row) for row in json.load(sys.stdin)]))
"""


@pytest.mark.process
@pytest.mark.skipif(reference_python() is None, reason="no torch and transformers, no $REFERENCE_PYTHON")
def test_implicit_prompts_are_those_of_trl(tmp_path):
    """Dialogues of 1 to 5 turns as lists and as strings. Of strings, theirs ends within the answer, ours before it."""
    draw, rows = random.Random(0), []
    for _ in range(50):
        turns = [draw.choice("abc") * draw.randint(1, 3) for _ in range(draw.choice((1, 3, 5)))]
        chosen, rejected = [*turns, f"x{draw.random()}"], [*turns, f"y{draw.random()}"]
        rows.append({"chosen": hh(*chosen), "rejected": hh(*rejected)})
        rows.append({key: [said(role, text) for role, text in zip(itertools.cycle(("user", "assistant")), side)]
                     for key, side in (("chosen", chosen), ("rejected", rejected))})
    theirs = json.loads(subprocess.run([reference_python(), "-c", TRL], input=json.dumps(rows), text=True, check=True,
                                       capture_output=True).stdout)
    for row, their in zip(rows, theirs):
        only, = read_preferences(write_jsonl(tmp_path / "rows.jsonl", [row]))
        if isinstance(row["chosen"], str):
            assert their["prompt"].strip() == f"{hh(*(content for _, content in only.prompt))}\n\nAssistant:".strip()
        else:
            assert [list(only.prompt), list(only.chosen), list(only.rejected)] == [
                [Message(**message) for message in their[key]] for key in ("prompt", "chosen", "rejected")]
