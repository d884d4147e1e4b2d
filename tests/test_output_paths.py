"""Names that output goes to.

| test                                     | proves                                         | judged against   |
| test_a_link_is_followed ...              | to its end, there or not; a circle is refused  | the file system  |
| test_what_is_written_to_and_never_...    | FIFOs and devices, not files and folders       | the file system  |
| test_standard_output_that_is_a_file ...  | a file behind /dev/fd is named                 | message          |
| test_an_output_that_is_an_input ...      | links, hard links, files in folders            | messages         |
"""
import os
from pathlib import Path

import pytest

from mindrlhf.errors import UserError
from mindrlhf.output_paths import check_outputs, follow_link, is_stream


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def test_a_link_is_followed_to_its_end_unless_it_leads_in_a_circle(tmp_path):
    for name, target in (("out", "second"), ("second", "absent"), ("one", "two"), ("two", "one")):
        (tmp_path / name).symlink_to(target)
    assert follow_link(tmp_path / "out") == follow_link(tmp_path / "absent") == tmp_path / "absent"
    assert message_of(follow_link, tmp_path / "one") == (
        f"{tmp_path / 'one'}: a link that leads in a circle, expected a name to write to")


def test_what_is_written_to_and_never_replaced_is_a_stream(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "file").touch()
    assert [is_stream(path) for path in (tmp_path / "fifo", tmp_path / "link", Path("/dev/null"))] == [True] * 3
    assert [is_stream(path) for path in (tmp_path / "file", tmp_path, tmp_path / "absent")] == [False] * 3


def test_standard_output_that_is_a_file_is_named_instead_of_cut_off(tmp_path):
    (tmp_path / "log").write_text("old")
    with open(tmp_path / "log", "a", encoding="utf-8") as file:
        number = Path(f"/dev/fd/{file.fileno()}")
        assert message_of(is_stream, number) == (
            f"{number}: leads to the file {tmp_path / 'log'}, expected that file's own name")
    assert (tmp_path / "log").read_text() == "old"


def test_an_output_that_is_an_input_is_named(tmp_path):
    source, model = tmp_path / "source.jsonl", tmp_path / "model"
    source.write_text("rows")
    (model / "rank_0").mkdir(parents=True)
    (model / "rank_0" / "a.ckpt").write_text("weights")
    (model / "scores.jsonl").write_text("of an earlier run")
    (tmp_path / "link").symlink_to("source.jsonl")
    (tmp_path / "around").symlink_to(tmp_path)
    os.link(source, tmp_path / "hard")
    os.link(model / "rank_0" / "a.ckpt", tmp_path / "hard.ckpt")
    inputs = {"--data_file": source, "--tokenizer": None, "--model": model}
    for output, read, flag in [(source, source, "--data_file"), (tmp_path / "link", source, "--data_file"),
                               (tmp_path / "hard", source, "--data_file"), (model, model, "--model"),
                               (tmp_path / "around" / "link", source, "--data_file"),
                               (model / "rank_0" / "a.ckpt", model / "rank_0" / "a.ckpt", "--model"),
                               (tmp_path / "hard.ckpt", model / "rank_0" / "a.ckpt", "--model")]:
        assert message_of(check_outputs, {"--output": output}, inputs) == (
            f"--output: {output} is {read}, which this run reads ({flag}), expected another name")
        check_outputs({"--output": output}, {"--other": tmp_path / "missing"})
    check_outputs({"--output": [model / "scores.jsonl", model / "new.ckpt", tmp_path / "new"]}, inputs)
    check_outputs({"--output": Path("/dev/null")}, {"--data_file": Path("/dev/null")})
