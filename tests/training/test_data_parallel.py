"""Several processes do what one does: the same steps, losses, figures and scores.

| test                                         | proves                             | judged against            |
| test_a_step_has_the_pairs_of_one_process ... | each pair once an epoch; shuffle   | one process, global batch |
| test_figures_of_parts ...                    | every pair weighs the same         | by hand                   |
| test_one_process_saves ...                   | what each process does with a step | names                     |
| test_two_processes_have_the_loss_curve ...   | training, by the tutorial's edits  | one process, 1e-4         |
| test_a_second_run_takes_the_graphs ...       | every bit, with kept graphs        | the run that compiled     |
| test_two_processes_train_all_answers ...     | a listwise objective, with margins | one process, 1e-4         |
| test_what_all_processes_say_and_save ...     | one log, one checkpoint            | counts                    |
| test_two_processes_give_the_scores ...       | inference; evaluation in training  | one process, 1e-5 and -4  |
| test_a_process_that_has_left_after ...       | nobody misses it                   | errors                    |
| test_processes_end_their_training_...        | also where they were asked to end  | calls                     |
| test_...are_refused, ...is_refused           | errors name found and expected     | messages                  |
"""
import contextlib
import csv
import json
import re
import signal

import mindspore as ms
import numpy as np
import pytest
from conftest import SAMPLE, TINY_YAML, write_numbered_pairs
from helpers import (
    ENVIRONMENT,
    assert_the_same_training,
    convert_file,
    launch,
    run_of_one_process,
    started_by_msrun,
    table_of,
    write_tiny_yaml,
)
from mindformers.tools.register import MindFormerConfig

from mindrlhf import signals
from mindrlhf.config.check import load_config
from mindrlhf.data.dataset import RewardModelDataset
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.mindrecord_writer import RecordWriter
from mindrlhf.data.template import PROMPT_TEMPLATE
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.models.heads import NO_SCORE
from mindrlhf.processes import meet
from mindrlhf.scoring.infer import infer
from mindrlhf.scoring.plan import InferencePlan
from mindrlhf.set_up import set_up_mindspore
from mindrlhf.training import train
from mindrlhf.training.evaluation import figures_of_pairs
from mindrlhf.training.monitor import callbacks_of_process, of_whole_batch

pytestmark = [pytest.mark.stack, pytest.mark.process]

PAD, SEQ, PAIRS = 9, 24, 45


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return write_numbered_pairs(tmp_path_factory.mktemp("record") / "a.mindrecord", PAIRS, SEQ, PAD)


def steps_of(record, monkeypatch, rank, ranks, **keys):
    """The numbers of the pairs of each step that a process gets, over two epochs."""
    monkeypatch.setattr(RewardModelDataset, "_generate_shard_info", classmethod(lambda cls: (rank, ranks)))
    dataset = RewardModelDataset(MindFormerConfig(**{
        "data_loader": {"type": "MindDataset", "dataset_dir": record, "shuffle": True}, "input_columns": list(FIELDS),
        "pad_token_id": PAD, "seq_length": SEQ, "row_length": 2 * SEQ, "num_parallel_workers": 1, "seed": 3, **keys}))
    iterator = dataset.create_dict_iterator(num_epochs=2, output_numpy=True)
    ids = [batch["input_ids"] for _ in range(2) for batch in iterator]
    return [set((found[found >= 1000] - 1000).tolist()) for found in ids]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("batching", ["padded", "buckets", "packing"])
def test_a_step_has_the_pairs_of_one_process_with_the_same_global_batch(record, monkeypatch, batching, ranks):
    one = steps_of(record, monkeypatch, 0, 1, batching=batching, batch_size=8)
    parts = [steps_of(record, monkeypatch, rank, ranks, batching=batching, batch_size=8 // ranks)
             for rank in range(ranks)]
    assert one == [set().union(*together) for together in zip(*parts)]
    assert {len(part) for part in parts} == {len(one)}
    for epoch in (slice(len(one) // 2), slice(len(one) // 2, None)):
        seen = sorted(number for part in parts for step in part[epoch] for number in step)
        assert len(seen) == len(set(seen)) == (40 if batching == "padded" else PAIRS)  # padded drops the last 5


def test_a_smaller_last_batch_cannot_be_divided_and_is_refused(record, monkeypatch):
    with pytest.raises(UserError, match="drop_remainder is False, expected True with several processes"):
        steps_of(record, monkeypatch, 0, 2, drop_remainder=False)


def test_fewer_pairs_than_a_step_of_all_processes_are_refused(record, monkeypatch):
    with pytest.raises(UserError, match="45 pairs, expected at least one step of 48"):
        steps_of(record, monkeypatch, 1, 2, batch_size=24)


def test_sums_of_parts_become_those_of_the_whole_batch():
    """Three pairs, one and none: each pair weighs the same, and a part without pairs nothing."""
    margins = [[1.0, -2.0, 4.0], [3.0], []]
    parts = [(part, np.array([np.sum(np.array(part) > 0), np.sum(part), np.sum(part) / 2, len(part), 10 * len(part),
                              64], np.float32)) for part in margins]
    losses = [3 * sum(part) / 4 for part, _ in parts]  # the mean over all pairs, times the processes
    extremes = np.array([[4, 2], [3, -3], [NO_SCORE, NO_SCORE]], np.float32)  # largest, and smallest with another sign
    given = []
    for loss, (_, figures), both in zip(losses, parts, extremes):
        of_whole_batch(loss, figures, both, lambda values: given.append(values) or values[None])
    loss, sums, both = of_whole_batch(losses[0], parts[0][1], extremes[0], lambda values: np.stack(given))
    assert loss == pytest.approx(1.5)
    assert sums.tolist() == pytest.approx([3, 6, 3, 4, 40, 192])
    assert both.tolist() == [4, 2]


def test_a_loss_that_is_not_finite_stays_a_float32_which_mindformers_lets_pass():
    """Its log line in 1.3.0 raises for a NaN that is a Python float, np.float64 among them."""
    loss, *_ = of_whole_batch(np.nan, np.zeros(6, np.float32), np.zeros(2, np.float32), lambda values: values[None])
    assert np.isnan(loss)
    assert not isinstance(loss, float)


def test_one_process_saves_before_all_else_and_the_loss_is_averaged_before_it_is_printed():
    callbacks = load_config(TINY_YAML).mapping["callbacks"]
    assert [callback["type"] for callback in callbacks_of_process(callbacks)] == [
        "CheckpointMonitor", "RewardMonitor", "MFLossMonitor", "SkippedStepMonitor"]
    assert [callback["type"] for callback in callbacks_of_process(callbacks, saves=False)] == [
        "RewardMonitor", "MFLossMonitor", "SkippedStepMonitor"]


def test_several_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, in_tmp_path):
    started_by_msrun(monkeypatch, "4")
    with pytest.raises(UserError, match="use_parallel is False, but 4 processes were started: set use_parallel: True"):
        set_up_mindspore(load_config(TINY_YAML))
    assert not list(in_tmp_path.iterdir())


# --- as a user runs it ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of a run of one process and of one of two with the tutorial's two edits; the logs of the latter."""
    one, two = run_of_one_process(tmp_path_factory), tmp_path_factory.mktemp("two")
    write_tiny_yaml(two / "run.yaml", 2)
    convert_file(SAMPLE / "test.jsonl", two / "test.mindrecord", open_tokenizer(SAMPLE / "tokenizer.model"), 128,
                 PROMPT_TEMPLATE)
    return one, two, train_two(one, two)


def train_two(one, two, flags=""):
    return launch(two, "reward_train.py", f"--config run.yaml --train_dataset {one}/train.mindrecord --eval_dataset "
                                          f"test.mindrecord --set best_metric=loss {flags}", 2)


def weights_of(output):
    """All that a run has saved of its weights, but for its notes, by the file's folder."""
    return {(path.parts[-3], name): value.asnumpy() for path in output.glob("checkpoint*/rank_0/*.ckpt")
            for name, value in ms.load_checkpoint(str(path)).items() if name != "training_notes"}


def test_a_second_run_takes_the_graphs_of_two_processes_and_has_the_same_bits(trained, monkeypatch):
    one, two, _ = trained
    monkeypatch.setitem(ENVIRONMENT, "GLOG_v", "2")
    for log in train_two(one, two, "--set output_dir=again"):
        assert log.count("Use the compilation cache") == 2  # so MindSpore's log, of a step and of an evaluation
    expected, found = weights_of(two / "output"), weights_of(two / "again")
    assert {folder for folder, _ in found} == {"checkpoint", "checkpoint_network", "checkpoint_best"}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_two_processes_have_the_loss_curve_of_one(trained):
    one, two = map(table_of, trained[:2])
    assert_the_same_training(two, one)
    assert sum(int(row["pairs"]) for row in two) == 500  # 100 pairs, five epochs
    assert np.mean([float(row["loss"]) for row in two[-5:]]) < 0.9 * float(two[0]["loss"])


@pytest.mark.long
def test_two_processes_train_all_answers_of_a_prompt_as_one_does(tmp_path):
    random, path = np.random.default_rng(5), tmp_path / "three.mindrecord"
    with RecordWriter(path) as writer:
        for prompt in range(40):
            texts = [[*range(20), prompt, *random.integers(0, 900, random.integers(5, 40))] for _ in range(3)]
            for better, worse in ((0, 1), (0, 2), (1, 2)):
                writer.write(encode_pair(texts[better], texts[worse], 128, 996), {
                    "margin": 0.5, "prompt_id": prompt, "chosen_answer": better, "rejected_answer": worse})
        writer.finish({"seq_length": 128, "pad_token_id": 996})
    keys = {"loss": "end_token", "answers": "listwise", "margin": "subtract", "centering": 0.01}
    flags = " ".join(f"--set model.model_config.objective.{key}={value}" for key, value in keys.items())
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        write_tiny_yaml(folder / "run.yaml", processes)
        launch(folder, "reward_train.py", f"--config run.yaml --train_dataset {path} {flags}", processes)
        tables.append(table_of(folder))
    assert_the_same_training(*tables)
    assert sum(int(row["pairs"]) for row in tables[0]) == 5 * 120


def test_what_all_processes_say_and_save_is_there_once(trained):
    first, second = trained[2]
    assert first.count(": eval: 93 pairs, loss: ") == 2
    assert first.count(" - step 2 of ") == first.count("this run trains") == 1
    assert "CPU, 2 processes" in first
    assert "INFO - " not in second
    # MindFormers' own line, in its log file, has the loss of the whole batch too
    assert "loss:[" not in first
    log = (trained[1] / "output" / "log" / "rank_0" / "info.log").read_text(encoding="utf-8")
    printed = [float(loss) for loss in re.findall(r"loss:\[ *([\d.]+)/", log)]
    assert printed == pytest.approx([float(row["loss"]) for row in table_of(trained[1])], abs=6e-4)
    output = trained[1] / "output"
    for folder in ("checkpoint", "checkpoint_network", "checkpoint_best"):
        assert [path.name for path in (output / folder).glob("rank_*")] == ["rank_0"]


def test_two_processes_give_the_scores_of_one_in_the_order_of_the_rows(trained, in_tmp_path):
    two, checkpoint = trained[1], str(trained[1] / "output" / "checkpoint_network")
    infer(InferencePlan(load_config(TINY_YAML), checkpoint, {},
                        TextEncoder(open_tokenizer(SAMPLE / "tokenizer.model"), PROMPT_TEMPLATE),
                        SAMPLE / "test.jsonl", in_tmp_path / "scores.jsonl"))
    logs = launch(two, "reward_infer.py", f"--config run.yaml --data_file {SAMPLE / 'test.jsonl'} --tokenizer "
                    f"{SAMPLE / 'tokenizer.model'} --distributed_ckpt_path {checkpoint}", 2)
    expected, found = ([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
                       for file in (in_tmp_path / "scores.jsonl", two / "output" / "scores.jsonl"))
    assert [row["prompt"] for row in found] == [row["prompt"] for row in expected]
    for name in ("pos_score", "neg_score"):
        np.testing.assert_allclose([row[name] for row in found], [row[name] for row in expected], atol=1e-5)
    with open(two / "output" / "eval.csv", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    figures = figures_of_pairs(np.array([[row["pos_score"], row["neg_score"]] for row in expected]))
    assert {name: float(last[name]) for name in figures} == pytest.approx(figures, abs=1e-4)
    assert logs[0].count("INFO - Sample:\n") == 2 * len(found)
    assert "Sample:" not in logs[1]


@pytest.mark.parametrize(("failing", "raised"), [(0, True), (1, False), (2, False)])
def test_a_process_that_has_left_after_the_meeting_is_not_missed(failing, raised, monkeypatch):
    """It may end, with its connections, before others have received what it has sent last."""
    sums = []

    def sum_of(values):
        sums.append(values)
        if len(sums) == failing + 1:
            raise RuntimeError("Launch kernel failed, name:Default/AllReduce-op1")

    monkeypatch.setattr("mindrlhf.processes.sum_over_processes", sum_of)
    with pytest.raises(RuntimeError, match="Launch kernel failed") if raised else contextlib.nullcontext():
        meet()
    assert len(sums) == (1 if raised else 2)


@pytest.mark.parametrize(("ended", "meets"), [
    (None, True), (signals.Interrupted(signal.SIGTERM), True), (UserError("of this process alone"), False)], ids=str)
def test_processes_end_their_training_together_unless_one_has_failed(ended, meets, monkeypatch):
    """Others may be in the midst of a step then, and would take its sum for theirs."""
    met = []
    monkeypatch.setattr(train, "meet", lambda: met.append(True))
    with pytest.raises(type(ended)) if ended else contextlib.nullcontext(), train._ending_together():
        if ended:
            raise ended
    assert met == [True] * meets


@pytest.mark.parametrize(("ranks", "expected"), [(1, ["set up"]), (2, ["set up", "meet"])])
def test_processes_connect_before_any_of_them_works(ranks, expected, monkeypatch, in_tmp_path):
    """The first one may then read or cut for longer than a connection waits."""
    done = []
    monkeypatch.setattr("mindformers.core.context.build_context", lambda config: done.append("set up"))
    monkeypatch.setattr("mindformers.tools.utils.get_real_group_size", lambda: ranks)
    monkeypatch.setattr("mindrlhf.processes.meet", lambda: done.append("meet"))
    set_up_mindspore(load_config(TINY_YAML))
    assert done == expected
