"""Inference from file to file: what is lost, changed or wrong without a word, when rows, signals or names are awkward.

The score of a text is its number of tokens here, but for the tests that start processes.

| test                                           | proves                                            | judged against  |
| test_an_invalid_row_ends_a_run_and_what_...    | rows before it are kept; corrected, it goes on    | a run at once   |
| test_invalid_rows_are_written_with_...         | --skip_invalid: reason and text, and the others   | rows by hand    |
| test_a_row_that_a_template_makes_no_text_...   | file and line of row and template, --skip_invalid | messages        |
| test_a_run_that_was_cut_short_goes_on ...      | the same bytes, and no window is scored twice     | a run at once   |
| test_a_killed_process_goes_on ...              | the same after SIGTERM and SIGKILL                | a run at once   |
| test_a_run_goes_on_with_what_it_was_begun ...  | other settings, weights or rows are refused       | messages        |
| test_rows_of_an_earlier_run_are_not_lost       | without --resume nothing is replaced              | bytes           |
| test_a_file_of_the_users_own_in_their_place .. | what was not made here is not replaced            | bytes           |
| test_a_run_that_ends_before_its_first_row_...  | nothing is left                                   | names           |
| test_a_full_disk_names_the_file_and_...        | and half a line is no row                         | a limit         |
| test_of_two_at_once_the_second_is_refused      | a lock that ends with its process                 | messages        |
| test_a_key_of_the_users_own_...                | no key is replaced; --score_key gives other names | rows by hand    |
| test_rows_of_other_kinds_of_files_...          | CSV, Parquet, gzip                                | rows by hand    |
| test_a_pipe_is_read_once_and_written_through   | FIFOs as input and output; nothing beside them    | rows by hand    |
| test_scores_are_normalised_ ...                | --normalize: the checkpoint's mean and std        | rows by hand    |
| test_a_run_goes_on_with_the_same_statistics .. | --resume with others is refused                   | message         |
| test_what_cannot_be_resumed_is_refused         | pipes and devices                                 | messages        |
| test_standard_output_has_the_rows_alone        | from pipe to pipe as a process                    | a run at once   |
| test_a_link_stays_and_its_target_is_written    | the link, and the target's rows                   | rows by hand    |
| test_scores_that_are_nan_are_null ...          | strict JSON, the rows are named, exit code 3      | rows by hand    |
| test_numbers_that_are_none_are_invalid_...     | strict JSON in                                    | messages        |
"""
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from conftest import EXAMPLE, SAMPLE, TINY_YAML
from helpers import ENVIRONMENT, files_of_at_most, run_script, started_by_msrun, wait_for

from mindrlhf.config.check import load_config
from mindrlhf.data.template import open_template
from mindrlhf.errors import UserError
from mindrlhf.models import row_scores
from mindrlhf.models.glm4.dimensions import backbone_weights, head_weights
from mindrlhf.scoring import text_scorer
from mindrlhf.scoring.infer import infer
from mindrlhf.scoring.plan import plan_inference
from mindrlhf.scoring.report import NotFiniteScores
from mindrlhf.scoring.score_file import ScoreFile, check_score_file
from mindrlhf.scoring.scorer import Scorer

pytestmark = pytest.mark.stack

ROWS = [{"prompt": "q" * number, "response": "a" * number, "id": number} if number % 3 else
        {"prompt": "q" * number, "pos_resp": "好", "neg_resp": "c" * number} for number in range(1, 12)]


class LengthScorer(Scorer):
    """The score of a text is its number of tokens, and NaN where the text has a Z. Windows have four questions."""

    scored = 0        # windows
    ends_at = None    # the window at which the run is cut short

    def __init__(self, config, run):
        self.rank, self.processes, self._semi_auto, self.seq_length = 0, 1, False, config.model.seq_length
        self.shapes = [(1, 256)]

    def load(self, checkpoint):
        pass

    def _score_window(self, groups):
        if LengthScorer.scored == LengthScorer.ends_at:
            raise KeyboardInterrupt
        LengthScorer.scored += 1
        return [[float("nan") if group.ids[end] == ord("Z") else float(group.positions[end] + 1) for end in group.ends]
                for group in groups]


class LetterTokenizer:
    vocab_size, control_ids = 1, {}

    def __init__(self, path):
        self.identity = {"name": path}

    def encode_batch(self, texts):
        return [[ord(letter) % 1000 for letter in text] for text in texts]


def save_weights(value):
    """A checkpoint that is one, rm.ckpt."""
    Path("rm.ckpt").unlink(missing_ok=True)
    ms.save_checkpoint([{"name": "a", "data": ms.Tensor([value], ms.float32)}], "rm.ckpt")


@pytest.fixture(autouse=True)
def without_a_model(monkeypatch, in_tmp_path, request):
    save_weights(1.0)
    if request.node.get_closest_marker("process"):
        return
    monkeypatch.setattr(row_scores, "_WINDOW", 4)
    monkeypatch.setattr(text_scorer, "Scorer", LengthScorer)
    monkeypatch.setattr(text_scorer, "set_up_mindspore", lambda *_: None)
    monkeypatch.setattr("mindrlhf.scoring.plan.open_tokenizer", LetterTokenizer)
    monkeypatch.setattr(LengthScorer, "scored", 0)
    monkeypatch.setattr(LengthScorer, "ends_at", None)


def write_rows(path, rows):
    """Rows, or lines that are none."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    Path(path).write_bytes(b"".join(line + b"\n" for line in lines))


def read_rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def arguments(**given):
    return SimpleNamespace(**{
        "config": str(TINY_YAML), "data_file": Path("in.jsonl"), "tokenizer": "letters", "score_key": "score",
        "distributed_ckpt_path": "rm.ckpt", "seq_length": None, "output_file": Path("out.jsonl"), "resume": False,
        "prompt_template": "{prompt}{response}", "skip_invalid": False, "format": None, "columns": (),
        "normalize": None, **given})


def score(**given):
    infer(plan_inference(arguments(**given)))


def scored(rows, key="score"):
    """The rows with the scores that they must get."""
    length = [{name: len(row["prompt"]) + len(row[field]) for name, field in
               ((key, "response"), (f"pos_{key}", "pos_resp"), (f"neg_{key}", "neg_resp")) if field in row}
              for row in rows]
    return [{**row, **{name: float(value) for name, value in found.items()}} for row, found in zip(rows, length)]


def test_scores_are_normalised_by_the_statistics_of_the_checkpoint():
    write_rows("in.jsonl", ROWS)
    entries = [{"checkpoint": "a.ckpt"}, {"checkpoint": "rm.ckpt", "mean": 3, "std": 0.5}]
    Path("eval.json").write_text(json.dumps(entries))
    score(normalize=Path("eval.json"))
    assert read_rows_of("out.jsonl") == [
        {**row, **{key: (value - 3) / 0.5 for key, value in with_scores.items() if key not in row}}
        for row, with_scores in zip(ROWS, scored(ROWS))]
    Path("eval.json").write_text(json.dumps([{"checkpoint": "rm.ckpt", "mean": 3, "std": 0}]))
    with pytest.raises(UserError, match=r"--normalize: eval.json: mean and std of rm.ckpt are 3 and 0, expected"):
        plan_inference(arguments(normalize=Path("eval.json")))


def test_a_run_goes_on_with_the_same_statistics_alone():
    write_rows("in.jsonl", [*ROWS, {"prompt": "q"}])
    for std, resume in ((1, False), (2, True)):
        Path("eval.json").write_text(json.dumps([{"checkpoint": "rm.ckpt", "mean": 3, "std": std}]))
        with pytest.raises(UserError) as caught:
            score(normalize=Path("eval.json"), resume=resume)
    assert "--resume: normalize is {'mean': 3.0, 'std': 2.0}, expected {'mean': 3.0, 'std': 1.0}" in str(caught.value)


def names():
    return sorted(path.name for path in Path().iterdir() if path.name not in ("in.jsonl", "rm.ckpt", "output"))


# --- invalid rows ---------------------------------------------------------------------------------------------------

def test_an_invalid_row_ends_a_run_and_what_was_scored_is_kept():
    write_rows("in.jsonl", [*ROWS[:6], {"prompt": "q"}, *ROWS[6:]])
    with pytest.raises(UserError) as caught:
        score()
    assert str(caught.value) == (
        "in.jsonl:7: key 'pos_resp', 'neg_resp' missing; found prompt; expected prompt, pos_resp, neg_resp; "
        "--skip_invalid leaves such rows out; the rows before it are in out.jsonl.partial: --resume goes on from there")
    assert read_rows_of("out.jsonl.partial") == scored(ROWS[:6])
    write_rows("in.jsonl", ROWS)
    score(resume=True)
    assert names() == ["out.jsonl"]
    assert read_rows_of("out.jsonl") == scored(ROWS)
    assert LengthScorer.scored == 2 + 2  # the second window was not whole, and is scored again


def test_an_invalid_first_row_is_told_before_anything_is_loaded():
    write_rows("in.jsonl", [{"prompt": "q"}, *ROWS])
    with pytest.raises(UserError, match="^in.jsonl:1: key 'pos_resp', 'neg_resp' missing"):
        plan_inference(arguments())
    assert names() == []


def test_invalid_rows_are_written_with_their_reason_and_the_others_scored():
    write_rows("in.jsonl", [{"prompt": "问"}, *ROWS[:5], b"no JSON", *ROWS[5:], b"\xff"])
    score(skip_invalid=True)
    assert names() == ["out.jsonl", "out.jsonl.invalid.jsonl"]
    assert read_rows_of("out.jsonl") == scored(ROWS)
    invalid = read_rows_of("out.jsonl.invalid.jsonl")
    assert [row["line"] for row in invalid] == [1, 7, 14]
    assert [row["text"] for row in invalid] == ['{"prompt": "问"}', "no JSON", "\\xff"]
    assert "问" in Path("out.jsonl.invalid.jsonl").read_text(encoding="utf-8")
    assert invalid[1]["reason"] == "not JSON: Expecting value at column 1"


@pytest.mark.parametrize(("content", "reason"), [
    ("\n{{ raise_exception('an x') if 'x' in messages[-1].content else messages[-1].content }}", "chat.jinja:2: an x"),
    ("{{ messages[-1].content.replace('x', '') }}",
     "the prompt template makes an empty text of it, which has no score")], ids=["refused", "empty"])
def test_a_row_that_a_template_makes_no_text_of_is_invalid(content, reason):
    Path("chat.jinja").write_text(content, encoding="utf-8")
    template = open_template("chat.jinja")
    rows = [{"prompt": "q", "response": letter} for letter in "axbc"]
    write_rows("in.jsonl", rows)
    with pytest.raises(UserError) as caught:
        score(prompt_template=template)
    assert str(caught.value).startswith(f"in.jsonl:2: {reason}; --skip_invalid leaves such rows out; the rows before")
    score(prompt_template=template, skip_invalid=True, output_file=Path("rest.jsonl"))
    assert [row["response"] for row in read_rows_of("rest.jsonl")] == ["a", "b", "c"]
    assert [(row["line"], row["reason"]) for row in read_rows_of("rest.jsonl.invalid.jsonl")] == [(2, reason)]
    write_rows("in.jsonl", rows[1:])
    with pytest.raises(UserError, match=f"^in.jsonl:1: {re.escape(reason)}$"):
        plan_inference(arguments(prompt_template=template))


def test_nothing_but_invalid_rows_is_an_error():
    write_rows("in.jsonl", [b"no", b"JSON"])
    with pytest.raises(UserError, match="^--data_file: in.jsonl: 2 invalid rows alone in it, expected at least one"):
        score(skip_invalid=True)
    assert names() == ["out.jsonl.invalid.jsonl"]


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"prompt": "q", "response": "a", "note": 1e999}', "the number 1e999 is too large, expected a finite one"),
    (b'{"prompt": "q", "response": "a", "note": {"x": [NaN]}}', "found NaN, expected a finite number"),
])
def test_numbers_that_are_none_are_invalid_rows(line, reason):
    write_rows("in.jsonl", [ROWS[0], line])
    with pytest.raises(UserError, match=f"^in.jsonl:2: not JSON: {reason}; "):
        score()


# --- going on -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("left", [b"", b'{"prompt": "q', ], ids=["whole lines", "half a line"])
@pytest.mark.parametrize("skip_invalid", [False, True])
def test_a_run_that_was_cut_short_goes_on_with_the_same_bytes(monkeypatch, left, skip_invalid):
    rows = [ROWS[0], b"no JSON", *ROWS[1:]] if skip_invalid else ROWS
    write_rows("in.jsonl", rows)
    score(skip_invalid=skip_invalid, output_file=Path("at_once.jsonl"))
    monkeypatch.setattr(LengthScorer, "ends_at", 5)  # three windows at once, and then two of three
    with pytest.raises(KeyboardInterrupt):
        score(skip_invalid=skip_invalid)
    assert not Path("out.jsonl").exists()
    with open("out.jsonl.partial", "ab") as file:
        file.write(left)
    monkeypatch.setattr(LengthScorer, "ends_at", None)
    score(skip_invalid=skip_invalid, resume=True)
    assert LengthScorer.scored == 3 + 2 + 1
    assert Path("out.jsonl").read_bytes() == Path("at_once.jsonl").read_bytes()
    assert "out.jsonl.partial" not in names()
    if skip_invalid:
        assert [row["line"] for row in read_rows_of("out.jsonl.invalid.jsonl")] == [2]


def test_resume_without_anything_to_go_on_from_begins():
    write_rows("in.jsonl", ROWS)
    score(resume=True)
    assert read_rows_of("out.jsonl") == scored(ROWS)


@pytest.fixture
def cut_short(monkeypatch):
    """A run that has scored two windows of ROWS."""
    write_rows("in.jsonl", ROWS)
    monkeypatch.setattr(LengthScorer, "ends_at", 2)
    with pytest.raises(KeyboardInterrupt):
        score()
    monkeypatch.setattr(LengthScorer, "ends_at", None)
    return Path("out.jsonl.partial").read_bytes()


@pytest.mark.parametrize(("change", "given", "message"), [
    (None, {"columns": (("prompt", "response"), ("response", "prompt"))},
     "--resume: columns is {'prompt': 'response', 'response': 'prompt'}, expected None, with which out.jsonl.partial "),
    (None, {"score_key": "s"}, "--resume: score_key is 's', expected 'score', with which out.jsonl.partial was begun"),
    (None, {"prompt_template": "{prompt} {response}"}, "--resume: prompt_template is '{prompt} {response}', expected "),
    (None, {"seq_length": 64}, "--resume: model_config.seq_length is 64, expected 128"),
    (None, {"tokenizer": "others"}, "--resume: tokenizer is {'name': 'others'}, expected {'name': 'letters'}"),
    (lambda: save_weights(2.0), {}, "--resume: checkpoint is {'rm.ckpt': "),
    (lambda: write_rows("in.jsonl", ROWS[1:]), {},
     "--resume: out.jsonl.partial:1: not the row in.jsonl:1, expected the data file that it was made from"),
    (lambda: write_rows("in.jsonl", ROWS[:7]), {},
     "--resume: out.jsonl.partial:8: the data file has ended before, expected the data file"),
    (lambda: Path("out.jsonl.partial.json").unlink(), {}, "out.jsonl.partial.json is missing, which says what"),
], ids=["columns", "score key", "template", "length", "tokenizer", "weights", "rows", "fewer rows", "no record"])
def test_a_run_goes_on_with_what_it_was_begun_with_alone(cut_short, change, given, message):
    if change:
        change()
    with pytest.raises(UserError) as caught:
        score(**{"resume": True, **given})
    assert str(caught.value).startswith(message)
    assert Path("out.jsonl.partial").read_bytes() == cut_short


def test_rows_of_an_earlier_run_are_not_lost(cut_short):
    with pytest.raises(UserError) as caught:
        plan_inference(arguments())
    assert str(caught.value) == ("out.jsonl.partial: it has rows that an earlier run has scored, expected none: "
                                 "--resume goes on from there; to begin again, delete it")
    with pytest.raises(UserError, match="it has rows that an earlier run has scored"):
        ScoreFile(Path("out.jsonl"), {}, False, 4)
    assert Path("out.jsonl.partial").read_bytes() == cut_short


@pytest.mark.parametrize(("name", "content", "message"), [
    ("out.jsonl.partial", b"a line without an end", "out.jsonl.partial.json is missing, which says what"),
    ("out.jsonl.partial", b"lines\n", "out.jsonl.partial: it has rows that an earlier run has scored"),
    ("out.jsonl.partial.json", b'{"my": "notes"}', "out.jsonl.partial.json: not made by this program"),
])
def test_a_file_of_the_users_own_in_their_place_is_left_alone(name, content, message):
    write_rows("in.jsonl", ROWS)
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        score()
    assert str(caught.value).startswith(message)
    assert Path(name).read_bytes() == content


def test_a_run_that_ends_before_its_first_row_leaves_nothing(monkeypatch):
    write_rows("in.jsonl", ROWS)
    monkeypatch.setattr(LengthScorer, "ends_at", 0)
    with pytest.raises(KeyboardInterrupt):
        score(skip_invalid=True)
    assert names() == []


def write_two_rows():
    with ScoreFile(Path("out.jsonl"), {"score_key": 1}, True, 1) as file:
        file.write(b"a row\n")
        file.write(b"another row\n")


def test_a_full_disk_names_the_file_and_what_was_scored_goes_on():
    Path("out.jsonl.partial.json").write_text('{"score_key": 1}\n', encoding="utf-8")
    Path("out.jsonl.partial").write_bytes(b"a\n")
    with files_of_at_most(9), pytest.raises(OSError, match="File too large: 'out.jsonl.partial'"):
        write_two_rows()
    with ScoreFile(Path("out.jsonl"), {"score_key": 1}, True, 1) as file:
        assert file.kept == 2
    assert Path("out.jsonl.partial").read_bytes() == b"a\na row\n"


def test_of_two_at_once_the_second_is_refused(in_tmp_path):
    (in_tmp_path / "link.jsonl").symlink_to("out.jsonl")
    with ScoreFile(Path("out.jsonl"), {}, False, 4) as first:
        first.write(b"a row\n")
        for start in (check_score_file, lambda path, resume: ScoreFile(path, {}, resume, 4)):
            for resume in (False, True):
                with pytest.raises(UserError, match="out.jsonl.partial: another inference is writing it; expected one"):
                    start(Path("link.jsonl"), resume)
        first.finish()
    assert Path("out.jsonl").read_bytes() == b"a row\n"
    check_score_file(Path("out.jsonl"), False)
    assert names() == ["link.jsonl", "out.jsonl"]


# --- keys -----------------------------------------------------------------------------------------------------------

ROWS_OF_OTHER_KINDS = {
    "explicit": ({"prompt": "q", "chosen": "abc", "rejected": "d"}, {"chosen_score": 4.0, "rejected_score": 2.0}),
    "answers": ({"prompt": "q", "responses": ["a", "bcd"], "scores": [2, 1]}, {"score": [2.0, 4.0]}),
    "no scores": ({"prompt": "q", "responses": ["a", "bcd", "ef"]}, {"score": [2.0, 4.0, 3.0]}),
    "helpsteer3": ({"context": [{"role": "user", "content": "q"}], "response1": "a", "response2": "bcd",
                    "overall_preference": 2}, {"score": [2.0, 4.0]}),
    "pku-saferlhf": ({"prompt": "q", "response_0": "a", "response_1": "bcd", "better_response_id": 1},
                     {"score": [2.0, 4.0]}),
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]},
                 {"score": 3.0}),
    "prompt of messages": ({"prompt": [{"role": "user", "content": "q"}], "response": "ab"}, {"score": 3.0}),
    "a response too": ({"prompt": "q", "chosen": "abc", "rejected": "d", "response": "x", "responses": ["y"]},
                       {"chosen_score": 4.0, "rejected_score": 2.0}),
    "too long": ({"prompt": "q", "response": "a" * 200}, {"score": 128.0, "cut": True}),
}


@pytest.mark.parametrize("kind", ROWS_OF_OTHER_KINDS)
def test_answers_of_any_format_are_scored_in_the_rows_own_order(kind):
    row, scores = ROWS_OF_OTHER_KINDS[kind]
    write_rows("in.jsonl", [row, row])
    score()
    assert read_rows_of("out.jsonl") == [{**row, **scores}] * 2


def test_renamed_columns_stay_what_they_are_in_the_output():
    row = {"question": "q", "better": "abc", "worse": "d", "prompt": "another"}
    write_rows("in.jsonl", [row])
    score(columns=(("prompt", "question"), ("chosen", "better"), ("rejected", "worse")))
    assert read_rows_of("out.jsonl") == [{**row, "chosen_score": 4.0, "rejected_score": 2.0}]


def test_a_key_under_which_a_cut_would_be_said_is_never_replaced():
    write_rows("in.jsonl", [{"prompt": "q", "response": "a", "cut": False}])
    with pytest.raises(UserError, match="in.jsonl:1: the row has a key 'cut', under which it would be said that its "):
        score()


@pytest.mark.parametrize("key", ["score", "pos_score", "neg_score"])
def test_a_key_of_the_users_own_is_never_replaced(key):
    fields = {"response": "a"} if key == "score" else {"pos_resp": "a", "neg_resp": "b"}
    write_rows("in.jsonl", [ROWS[0], {"prompt": "q", **fields, key: "mine"}])
    with pytest.raises(UserError) as caught:
        score()
    assert str(caught.value).startswith(
        f"in.jsonl:2: the row has a key {key!r}, which its score would replace, expected none: --score_key NAME ")
    assert read_rows_of("out.jsonl.partial") == scored(ROWS[:1])
    Path("out.jsonl.partial").unlink()
    score(score_key="reward")
    assert read_rows_of("out.jsonl") == scored([ROWS[0], {"prompt": "q", **fields, key: "mine"}], "reward")


# --- other kinds of files -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["in.csv", "in.parquet", "in.jsonl.gz"])
def test_rows_of_other_kinds_of_files_are_scored(name):
    rows = [{"prompt": "q", "response": "a\nb", "id": "1"}, {"prompt": "好", "response": "", "id": "2"}]
    if name == "in.csv":
        Path(name).write_text('prompt,response,id\nq,"a\nb",1\n好,,2\n', encoding="utf-8")
    elif name == "in.parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, which comes with MindFormers")
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), name)
    else:
        Path(name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    score(data_file=Path(name))
    assert read_rows_of("out.jsonl") == scored(rows)


# --- pipes, devices and links ---------------------------------------------------------------------------------------

def test_a_pipe_is_read_once_and_written_through():
    os.mkfifo("in.fifo")
    os.mkfifo("out.fifo")
    written = []
    content = "".join(json.dumps(row) + "\n" for row in ROWS)
    threads = [threading.Thread(target=lambda: Path("in.fifo").write_text(content, encoding="utf-8"), daemon=True),
               threading.Thread(target=lambda: written.append(Path("out.fifo").read_bytes()), daemon=True)]
    for thread in threads:
        thread.start()
    score(data_file=Path("in.fifo"), output_file=Path("out.fifo"))
    for thread in threads:
        thread.join(10)
    assert [json.loads(line) for line in written[0].splitlines()] == scored(ROWS)
    assert names() == ["in.fifo", "out.fifo"]


@pytest.mark.parametrize(("given", "message"), [
    ({"data_file": Path("in.fifo")}, "--resume: --data_file is in.fifo, which has only what was not read yet"),
    ({"output_file": Path("in.fifo")}, "--resume: --output_file is in.fifo, which keeps nothing of earlier runs"),
    ({"output_file": Path("/dev/stdout")}, "--resume: --output_file is /dev/stdout, which keeps nothing of"),
])
def test_what_cannot_be_resumed_is_refused(given, message):
    os.mkfifo("in.fifo")
    write_rows("in.jsonl", ROWS)
    with pytest.raises(UserError) as caught:
        plan_inference(arguments(resume=True, **given))
    assert str(caught.value).startswith(message)


def test_a_pipe_is_not_shared_among_processes(monkeypatch, in_tmp_path):
    os.mkfifo("in.fifo")
    config = TINY_YAML.read_text(encoding="utf-8").replace("use_parallel: False", "use_parallel: True")
    (in_tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    started_by_msrun(monkeypatch, "2")
    with pytest.raises(UserError, match="--data_file: in.fifo: a pipe or a device, expected a file, for each of the 2"):
        plan_inference(arguments(data_file=Path("in.fifo"), config=str(in_tmp_path / "run.yaml")))


def test_a_link_stays_and_its_target_is_written(in_tmp_path):
    write_rows("in.jsonl", ROWS)
    (in_tmp_path / "elsewhere").mkdir()
    Path("out.jsonl").symlink_to("elsewhere/rows.jsonl")
    score()
    assert Path("out.jsonl").is_symlink()
    assert read_rows_of("elsewhere/rows.jsonl") == scored(ROWS)
    assert [path.name for path in Path("elsewhere").iterdir()] == ["rows.jsonl"]


# --- scores that are no numbers -------------------------------------------------------------------------------------

def test_scores_that_are_nan_are_null_and_their_rows_named():
    rows = [{"prompt": "q", "response": "Z" if number in (3, 5, 6, 8, 9) else "a"} for number in range(1, 12)]
    rows[2] = {"prompt": "q", "pos_resp": "a", "neg_resp": "Z"}
    write_rows("in.jsonl", rows)
    with pytest.raises(NotFiniteScores) as caught:
        score()
    assert caught.value.code == 3
    assert str(caught.value) == ("5 rows have a score that is NaN or infinite, null in out.jsonl: in.jsonl:3, "
                                 "in.jsonl:5, in.jsonl:6, in.jsonl:8 and 1 more")
    found = read_rows_of("out.jsonl")
    assert "NaN" not in Path("out.jsonl").read_text(encoding="utf-8")
    assert (found[2]["pos_score"], found[2]["neg_score"]) == (2.0, None)
    assert [row.get("score", 0) for row in found] == [2.0, 2.0, 0, 2.0, None, None, 2.0, None, None, 2.0, 2.0]


def test_scores_that_are_nan_are_counted_over_a_resume(monkeypatch):
    write_rows("in.jsonl", [{"prompt": "q", "response": "Z"}] * 9)
    monkeypatch.setattr(LengthScorer, "ends_at", 1)
    with pytest.raises(KeyboardInterrupt):
        score()
    monkeypatch.setattr(LengthScorer, "ends_at", None)
    with pytest.raises(NotFiniteScores, match="^9 rows have a score that is NaN"):
        score(resume=True)


# --- processes ------------------------------------------------------------------------------------------------------

@pytest.fixture
def job(in_tmp_path):
    """Arguments of reward_infer.py for a model with random weights and the sample's rows."""
    size = load_config(TINY_YAML).model.dimensions
    random = np.random.default_rng(0)
    Path("rm.ckpt").unlink()
    ms.save_checkpoint([{"name": weight.name, "data": ms.Tensor(random.normal(0, 0.1, weight.shape), ms.float32)}
                        for weight in (*backbone_weights(size), *head_weights(size))], "rm.ckpt")
    (in_tmp_path / "in.jsonl").write_bytes((SAMPLE / "test.jsonl").read_bytes())
    return ["--config", str(TINY_YAML), "--tokenizer", str(SAMPLE / "tokenizer.model"), "--distributed_ckpt_path",
            "rm.ckpt"]


@pytest.mark.process
def test_standard_output_has_the_rows_alone(job, in_tmp_path):
    at_once = run_script(in_tmp_path, "reward_infer.py", *job, "--data_file", "in.jsonl")
    assert at_once.returncode == 0, at_once.stderr
    assert "Sample:" not in at_once.stdout
    assert "Sample:" in (in_tmp_path / "output" / "log" / "rank_0" / "info.log").read_text(encoding="utf-8")
    piped = subprocess.run([sys.executable, str(EXAMPLE / "reward_infer.py"), *job, "--data_file", "/dev/stdin",
                            "--output_file", "/dev/stdout"], input=Path("in.jsonl").read_bytes(), capture_output=True,
                           env=ENVIRONMENT, check=False)
    assert piped.returncode == 0, piped.stderr.decode()
    assert piped.stdout == Path("output/scores.jsonl").read_bytes()
    assert b"wrote the scores of 93 rows to /dev/stdout" in piped.stderr


IN_WINDOWS_OF_8 = """
import sys, time
from mindrlhf.models import row_scores
from mindrlhf.scoring import scorer
row_scores._WINDOW = 8
whole = scorer.Scorer._score_window
def slowly(self, groups):
    time.sleep(0.2)
    return whole(self, groups)
scorer.Scorer._score_window = slowly
sys.argv[:] = sys.argv[1:]
__file__ = sys.argv[0]
exec(compile(open(__file__).read(), __file__, "exec"))
"""


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9),
                                              pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)])
def test_a_killed_process_goes_on_with_the_same_bytes(job, in_tmp_path, number, code):
    command = [sys.executable, "-c", IN_WINDOWS_OF_8, str(EXAMPLE / "reward_infer.py"), *job, "--data_file", "in.jsonl"]
    at_once = subprocess.run([*command, "--output_file", "at_once.jsonl"], env=ENVIRONMENT, capture_output=True,
                             check=False)
    assert at_once.returncode == 0, at_once.stderr.decode()
    command += ["--output_file", "out.jsonl", "--resume"]
    partial = in_tmp_path / "out.jsonl.partial"
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 40)
        process.send_signal(number)
    assert process.returncode == code
    assert not Path("out.jsonl").exists()
    last = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
    assert last.returncode == 0, last.stderr.decode()
    assert b"--resume: going on after" in last.stdout
    assert Path("out.jsonl").read_bytes() == Path("at_once.jsonl").read_bytes()
    assert names() == ["at_once.jsonl", "out.jsonl"]
