"""Two entry scripts at once, the second of them started at a random moment of the first.

| test                           | proves                                                           | judged against |
| test_of_two_that_write_the_... | each has the result of a run alone, or is refused in a line, not | files, tensors |
|                                | both of them; nothing else is changed                            | of a run alone |
| test_what_reads_data_...       | the result is that of the old or of the new data, or the reader  | runs alone on  |
|                                | is refused; what replaces the data is whole                      | either         |
| test_what_reads_weights_...    | the result is that of one step, of whichever, or the reader is   | that step's    |
|                                | refused; training is not disturbed                               | weights later  |
"""
import random
import re
import shutil
import time

import pytest
from conftest import SAMPLE
from entry_scripts import (
    COMMANDS,
    CONVERT,
    contents,
    end,
    make_inputs,
    result_of,
    run_alone,
    start,
    unfinished,
    unnumbered,
)
from helpers import write_tiny_yaml
from mutations import FULL, SEED, outcomes_of

from mindrlhf.checkpoints.find import list_checkpoints
from mindrlhf.weights.ckpt_file import read_ckpt
from mindrlhf.weights.safetensors_file import read_safetensors_folder

# Chosen pairs are in tests/test_atomic.py, tests/training/test_run_folder.py and tests/scoring/test_infer.py.
pytestmark = [pytest.mark.stack, pytest.mark.process, pytest.mark.long]

REPLACES_DATA = f"{CONVERT} --src_file other.jsonl --dst_file data.mindrecord"
TRAINS_ANEW = "reward_train.py --config often.yaml --train_dataset ../data.mindrecord"  # in the folder `base`
TIMES = 12 if FULL else 2


@pytest.fixture(scope="module")
def outcomes():
    yield from outcomes_of("two at once")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("two_at_once"))
    rows = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[100:200]
    (folder / "other.jsonl").write_text("\n".join(rows), encoding="utf-8")
    write_tiny_yaml(folder / "base" / "often.yaml", edits={"save_checkpoint_steps: 50": "save_checkpoint_steps: 2",
                                                           "keep_checkpoint_max: 5": "keep_checkpoint_max: 100"})
    return folder


def two_at_once(first, second, after):
    """Start two commands, the second so many seconds after the first; how they ended, and both as text.

    Args:
        first, second: (folder, command)
    """
    processes = [start(*first)]
    time.sleep(after)
    processes.append(start(*second))
    ended = [end(process) for process in processes]
    said = f"the second one after {after:.2f} s: {ended[1]}\nthe first one: {ended[0]}"
    assert not any("Traceback" in one.log for one in ended), said
    return ended, said


def is_refused(ended):
    """Whether a script has said in one line why it does not go on."""
    return ended.exit_code == 1 and len(re.findall(r"(?m)^\S+\.py: error: ", ended.log)) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_of_two_that_write_the_same_each_has_the_whole_result_or_is_refused(name, inputs, tmp_path, outcomes):
    chance, command = random.Random(f"{SEED} two at once {name}"), COMMANDS[name]
    shutil.copytree(inputs, tmp_path / "alone")
    seconds, expected = run_alone(tmp_path / "alone", command), result_of(name, tmp_path / "alone")
    for place in range(TIMES):
        work = tmp_path / str(place)
        shutil.copytree(inputs, work)
        here = contents(work)
        ended, said = two_at_once((work, command), (work, command), chance.uniform(0, 1.1 * seconds))
        whole = sum(not one.exit_code for one in ended)
        assert whole >= 1, said
        assert whole + sum(map(is_refused, ended)) == 2, said
        assert not unfinished(work), said
        found = result_of(name, work)
        assert (unnumbered(found) if whole == 2 else found) == expected, said  # a second run in a folder has a number
        assert here.items() <= contents(work).items(), said
        outcomes.count("both whole" if whole == 2 else "one whole, one refused")
        shutil.rmtree(work)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_what_reads_data_that_are_replaced_has_the_old_or_the_new_ones_or_is_refused(name, inputs, tmp_path, outcomes):
    chance, expected = random.Random(f"{SEED} replaced data {name}"), {}
    for which in ("old", "new"):
        shutil.copytree(inputs, tmp_path / which)
        if which == "new":
            seconds_of_writer = run_alone(tmp_path / which, REPLACES_DATA)
        seconds_of_reader = run_alone(tmp_path / which, COMMANDS[name])
        expected[which] = result_of(name, tmp_path / which)
    assert expected["old"] != expected["new"]
    new = contents(tmp_path / "new")
    for place in range(TIMES):
        work = tmp_path / str(place)
        shutil.copytree(inputs, work)
        both = [(work, COMMANDS[name]), (work, REPLACES_DATA)]
        reads_first = chance.random() < 0.7
        after = chance.uniform(0, seconds_of_reader if reads_first else seconds_of_writer)
        ended, said = two_at_once(*both[::1 if reads_first else -1], after)
        reader, writer = ended[::1 if reads_first else -1]
        assert writer.exit_code == 0, said
        assert not unfinished(work), said
        for suffix in ("", ".db", ".json"):
            assert (work / f"data.mindrecord{suffix}").read_bytes() == new[f"data.mindrecord{suffix}"], said
        if reader.exit_code:
            assert is_refused(reader), said
            outcomes.count("refused")
        else:
            found = result_of(name, work)
            assert found in expected.values(), said
            outcomes.count("old data" if found == expected["old"] else "new data")
        shutil.rmtree(work)


@pytest.mark.parametrize("name", ["evaluate", "infer", "export"])
def test_what_reads_weights_of_a_run_that_trains_has_those_of_one_step_or_is_refused(name, inputs, tmp_path, outcomes):
    chance, command = random.Random(f"{SEED} replaced weights {name}"), COMMANDS[name]
    if name != "export":  # a step's own file, so that it can be read again; export reads what each step replaces
        command = command.replace("checkpoint_network", "checkpoint")
    shutil.copytree(inputs, tmp_path / "alone")
    seconds = run_alone(tmp_path / "alone" / "base", TRAINS_ANEW)
    expected = result_of("train", tmp_path / "alone" / "base")
    for place in range(TIMES):
        work = tmp_path / str(place)
        shutil.copytree(inputs, work)
        (writer, reader), said = two_at_once((work / "base", TRAINS_ANEW), (work, command),
                                             chance.uniform(seconds / 3, seconds))
        assert writer.exit_code == 0, said
        assert result_of("train", work / "base") == expected, said
        if reader.exit_code:
            assert is_refused(reader), said
            outcomes.count("refused")
        elif name == "export":
            exported = [tensor.read(0, tensor.nbytes)
                        for tensor in read_safetensors_folder(work / "exported" / "model").values()]
            steps = [b"".join(tensor.read(0, tensor.nbytes) for tensor in read_ckpt(file).values())
                     for file in list_checkpoints(work / "base" / "output" / "checkpoint", 0)]
            assert any(all(tensor in step for tensor in exported) for step in steps), said
            outcomes.count("weights of one step")
        else:
            found = result_of(name, work)
            file, = re.findall(r"loaded \d+ parameters from (\S+)", reader.log)
            run_alone(work, command.replace("base/output/checkpoint", file))
            assert result_of(name, work) == found, said
            outcomes.count("weights of one step")
        shutil.rmtree(work)
