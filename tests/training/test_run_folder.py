"""Several runs in one output folder: one at a time, and each with files of its own.

| test                                     | proves                                          | judged against     |
| test_a_run_is_refused_while_another ...  | the kernel's lock, which ends with the process  | another process    |
| test_the_dry_run_is_refused_as_the ...   | and keeps no one out                            | names and message  |
| test_a_new_run_has_the_first_number ...  | whatever an earlier run has left                | names by hand      |
| test_a_resumed_run_keeps_its_number ...  | here, of a copy, beside another of that number  | numbers by hand    |
| test_a_branch_for_each_resumption ...    | what it left, over processes too                | branches by hand   |
| test_a_second_run_replaces_nothing ...   | two runs, and their evaluations, in one folder  | the bytes of one   |
"""
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from conftest import SAMPLE
from helpers import convert_file, run_of_one_process, run_script, wait_for, write_tiny_yaml

from mindrlhf import locks
from mindrlhf.checkpoints.find import Place
from mindrlhf.checkpoints.training_notes import read_training_notes, write_data_settings
from mindrlhf.data.template import PROMPT_TEMPLATE
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.training import dry_run, run_folder
from mindrlhf.training.run_folder import choose_run, only_run_in, run_notes
from mindrlhf.weights.ckpt_file import notes_as_bytes

pytestmark = pytest.mark.stack

HOLD = """
import sys, time
from pathlib import Path
from mindrlhf.training.run_folder import only_run_in
with only_run_in(Path(sys.argv[1]), print):
    Path(sys.argv[1], "held").touch()
    time.sleep(600)
"""


def refused(folder):
    try:
        with only_run_in(folder, pytest.fail):
            return None
    except UserError as error:
        return str(error)


@pytest.mark.process
def test_a_run_is_refused_while_another_lives_and_not_after_it_was_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)])
    wait_for((tmp_path / "held").exists)
    assert refused(tmp_path) == (f"output_dir: {tmp_path}: another training run is alive in this folder; wait for its "
                                 "end or choose another folder")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert refused(tmp_path) is None


def test_a_run_is_refused_in_a_process_with_the_same_id(tmp_path):
    """As in two containers; the second is this process itself."""
    with only_run_in(tmp_path, pytest.fail):
        assert "another training run is alive in this folder" in refused(tmp_path)
    assert refused(tmp_path) is None


def test_the_dry_run_is_refused_as_the_run_would_be_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mindrlhf.training.check_parts.check_parts", lambda config: None)
    monkeypatch.setattr(dry_run, "check_space", lambda plan: None)
    plan = SimpleNamespace(config=SimpleNamespace(output=tmp_path / "output"))
    dry_run.check_run(plan)
    assert not list(tmp_path.iterdir())
    with only_run_in(tmp_path / "output", pytest.fail), pytest.raises(UserError) as caught:
        dry_run.check_run(plan)
    assert str(caught.value) == (f"output_dir: {tmp_path}/output: another training run is alive in this folder; wait "
                                 "for its end or choose another folder")
    dry_run.check_run(plan)
    assert refused(tmp_path / "output") is None


def test_without_locks_a_warning_is_given(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    said = []
    with only_run_in(tmp_path, said.append):
        pass
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}: this file system has no locks (Operation not supported): see to it")


@pytest.mark.parametrize(("left", "number"), [
    ((), 0), (("log/a.log", "strategy/"), 0), (("metrics.csv",), 1), (("curves_3.png",), 4),
    (("checkpoint/data_settings_2.json",), 3), (("strategy/ckpt_strategy_rank_0.ckpt",), 1),
    (("strategy_before_7/a.ckpt",), 0), (("checkpoint/rank_1/a_rank_1_4-1_2.ckpt",), 5),
    (("checkpoint_network/rank_0/b_rank_0-network.ckpt",), 1), (("eval_2.csv",), 3), (("eval.csv",), 1),
    (("tensorboard_1/events.out.tfevents.1.a.2",), 2),
    (("eval.json", "eval_scores.png", "eval_1.json"), 0), (("checkpoint_best/rank_0/b_rank_0_1-best.ckpt",), 2)])
def test_a_new_run_has_the_first_number_that_no_file_has(tmp_path, left, number):
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    place = choose_run(tmp_path, tmp_path, None, 0, 1)
    assert (place.number, place.branch, place.left) == (number, 0, ())
    assert len(place.run) == 18
    assert place.run != choose_run(tmp_path, tmp_path, None, 0, 1).run


def save(path, place, step):
    """A checkpoint to resume from, of a place in a run; None: of an earlier release."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"step_num": np.array(step)}
    if place:
        notes = notes_as_bytes({"run": {**run_notes(place), "step": step}})
        values["training_notes"] = np.frombuffer(notes, np.uint8)
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in values.items()], str(path))
    path.chmod(0o600)
    return path


def test_a_resumed_run_keeps_its_number_unless_another_run_has_it(tmp_path):
    here, there, copy = tmp_path / "here", tmp_path / "there", tmp_path / "copy.ckpt"
    own = save(here / "checkpoint" / "rank_0" / "a_rank_0_1-1_3.ckpt", Place(1, "own"), 3)
    write_data_settings(here / "checkpoint", {"run": run_notes(Place(1, "own"))}, 1)
    assert choose_run(here, here, own, 0, 1) == Place(1, "own", 1, ((0, 3),))
    copy.write_bytes(own.read_bytes())
    assert choose_run(here, here, copy, 0, 1) == Place(1, "own", 1, ((0, 3),))
    assert choose_run(there, there, own, 0, 1).number == 1
    save(there / "checkpoint" / "rank_0" / "a_rank_0_1-1_7.ckpt", Place(1, "other"), 7)
    write_data_settings(there / "checkpoint", {"run": run_notes(Place(1, "other"))}, 1)
    assert choose_run(there, there, own, 0, 1) == Place(2, "own", 1, ((0, 3),))
    old = save(there / "checkpoint" / "rank_0" / "a_rank_0-1_5.ckpt", None, 5)
    place = choose_run(there, there, old, 0, 1)
    assert (place.number, place.branch, place.left) == (0, 1, ((0, 5),))
    assert len(place.run) == 18


def test_a_branch_for_each_resumption_is_the_same_for_all_processes(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint" / "rank_0"
    first = save(folder / "a_rank_0-1_3.ckpt", Place(0, "own"), 3)
    save(folder / "a_rank_0-1_5.ckpt", Place(0, "own", 4, ((0, 3),)), 5)
    assert choose_run(tmp_path, tmp_path, first, 0, 1) == Place(0, "own", 5, ((0, 3),))
    monkeypatch.setattr(run_folder, "stack_over_processes",
                        lambda mine: np.stack([[*mine[:2], 1, 2, 3], [6, 2, 9, 9, 9]]))
    assert choose_run(tmp_path, tmp_path, first, 0, 2) == Place(6, "own", 5, ((0, 3),))
    assert choose_run(tmp_path, tmp_path, None, 0, 2).run == "000001000002000003"


@pytest.mark.process
def test_a_second_run_replaces_nothing_that_the_first_has_written(tmp_path, tmp_path_factory):
    """The second with another template; a third, while another run lives in the folder, is refused."""
    shutil.copytree(run_of_one_process(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    template, output = "问 {prompt} 答 {response}", tmp_path / "output"
    config = write_tiny_yaml(tmp_path / "second.yaml", edits={"epochs: 5": "epochs: 1"})
    convert_file(tmp_path / "train.jsonl", tmp_path / "second.mindrecord",
                 open_tokenizer(SAMPLE / "tokenizer.model"), 128, template)

    def start(name, *args):
        result = run_script(tmp_path, name, "--config", config, *args)
        return result.returncode, result.stdout + result.stderr

    def evaluated(data):
        code, log = start("reward_eval.py", "--eval_dataset", data, "--distributed_ckpt_path",
                          "output/checkpoint_network")
        assert code == 0, log[-3000:]
        assert "its scores mean little" not in log
        return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*")
                if path.is_file() and path.relative_to(output).parts[0] != "log" and path.name != "meta.json"}

    first = evaluated("train.mindrecord")
    code, log = start("reward_train.py", "--train_dataset", "second.mindrecord")
    assert code == 0, log[-3000:]
    second = evaluated("second.mindrecord")
    assert first.items() <= second.items()
    added = sorted(name for name in second.keys() - first.keys() if "rank_0" not in name)
    assert added == ["checkpoint/data_settings_1.json", "checkpoint_network/data_settings_1.json", "curves_1.png",
                     "eval_1.json", "eval_groups_1.png", "eval_scores_1.jsonl", "eval_scores_1.png", "metrics_1.csv"]
    for number, asked in (("", PROMPT_TEMPLATE), ("_1", template)):
        notes = read_training_notes(output / "checkpoint_network/rank_0" / f"glm4_tiny_rank_0{number}-network.ckpt")
        assert (notes.values["prompt_template"], notes.values["model"]["rope_ratio"]) == (asked, 1)
    with only_run_in(output, pytest.fail):
        code, log = start("reward_train.py", "--train_dataset", "second.mindrecord")
    assert code == 1
    assert log.splitlines()[-1] == ("reward_train.py: error: output_dir: output: another training run is alive in this "
                                    "folder; wait for its end or choose another folder")
