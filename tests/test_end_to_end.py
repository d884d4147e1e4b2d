"""The pipeline as a user runs it: the converter and the three launcher commands of the tutorial, on the bundled sample.

Each command runs once, in its own process; the tests look at what it left behind.

| test                                              | proves                                                   |
| test_training_says_each_step_once ...             | our lines alone are shown, all are in the log file       |
| test_held_out_accuracy ...                        | the tiny model learns: 0.95 on questions it has not seen |
| test_inference_gives_the_scores_of_evaluation     | both ways to a score agree to 1e-5                      |
| test_training_has_evaluated_with_the_weights_ ... | the last row of eval.csv is that of inference, 1e-5      |
| test_tensorboard_shows_what_the_tables_have       | all figures of metrics.csv and eval.csv                  |
| test_text_is_evaluated_as_what_it_is_converted_to | the same figures from text as from MindRecord, 1e-6      |
| test_training_resumes ...                         | --resume goes on bit by bit, in TensorBoard too          |
| test_a_model_that_went_to_hugging_face ...        | out and in again, in shards, with the same figures       |
| test_training_starts_from_published_weights ...   | the original layout is a base that training loads        |
"""
import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, SAMPLE, TINY_YAML
from helpers import column_of, free_port, launch, run, run_script, shown_by_tensorboard, write_tiny_yaml
from safetensors.numpy import load_file, save_file

from mindrlhf.checkpoints.load import read_checkpoint
from mindrlhf.config.check import load_config
from mindrlhf.weights.ckpt_file import read_ckpt, write_ckpt
from mindrlhf.weights.tensors import OutputTensor, Part

pytestmark = [pytest.mark.stack, pytest.mark.process]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a run: train and test data converted, a model trained, evaluated, and asked. name -> log."""
    folder = tmp_path_factory.mktemp("job")
    logs = {"folder": folder}
    for part in ("train", "test"):
        result = run_script(folder, "cvalues_comparison.py", "--tokenizer", SAMPLE / "tokenizer.model", "--src_file",
                        SAMPLE / f"{part}.jsonl", "--dst_file", f"{part}.mindrecord", "--seq_length", 128, "--keep",
                        "pos_type,neg_type")
        assert result.returncode == 0, result.stderr
        logs[part] = result.stdout
    logs["train_log"], = launch(folder, "reward_train.py", f"--config {TINY_YAML} --train_dataset train.mindrecord "
                                 f"--tokenizer {SAMPLE / 'tokenizer.model'} --eval_dataset test.mindrecord "
                                 "--set tensorboard.tensorboard_dir=board",
                                 logs="logs/train")
    logs["eval_log"], = launch(
        folder, "reward_eval.py", f"--config {TINY_YAML} --eval_dataset test.mindrecord --batch_size 16 "
        "--group_by pos_type,neg_type --distributed_ckpt_path output/checkpoint_network --load_all_ckpt False",
        logs="logs/eval")
    logs["infer_log"], = launch(
        folder, "reward_infer.py", f"--config {TINY_YAML} --data_file {SAMPLE / 'test.jsonl'} "
        f"--tokenizer {SAMPLE / 'tokenizer.model'} --distributed_ckpt_path output/checkpoint_network",
        logs="logs/infer")
    return logs


def test_conversion_ends_with_the_table_of_lengths(job):
    heading = "count prompt_max prompt_avg chosen_max chosen_avg reject_max reject_avg"
    assert job["train"].splitlines()[0] == "format: cvalues"
    assert job["train"].splitlines()[1].split() == heading.split()
    assert job["train"].splitlines()[3].split()[0] == "375"
    assert "wrote 375 pairs to train.mindrecord" in job["train"]


def test_training_says_first_which_model_trains(job):
    log = job["train_log"]
    for fact in ("Glm4RewardModel, 2 layers, hidden size 64", "random initialisation", "128 tokens",
                 "about 8 pairs in packed rows of a few lengths", "CPU, 1 process", "470,404"):
        assert fact in log, fact
    assert log.index("this run trains") < log.index("step 1 of 275")


def test_training_says_each_step_once_and_what_mindformers_says_is_in_its_file(job):
    lines = job["train_log"].splitlines()
    assert len([line for line in lines if re.search(r"step \d+ of 275, loss: ", line)]) == 275
    assert len(lines) < 275 + 40
    theirs = ("loss:[", "Network Parameters:", "will now be used for the text_generation task")
    assert not [text for text in theirs if text in job["train_log"]]
    file = (job["folder"] / "output" / "log" / "rank_0" / "info.log").read_text(encoding="utf-8")
    assert all(text in file for text in (*theirs, "this run trains:", "step 275 of 275, loss: "))
    assert [line.split(" - INFO - ")[1].split(" are in ")[0] for line in lines[-2:]] == [
        "the figures of all steps", "training is over"]


def test_the_scheduler_of_a_run_of_one_process_leaves_the_work_to_it(job):
    """It is given the same script by msrun, and would train into the same files."""
    log = (job["folder"] / "logs" / "train" / "scheduler.log").read_text(encoding="utf-8")
    assert "nothing to do here" in log
    assert "this run trains" not in log


def test_every_step_is_in_the_log_and_in_the_table_and_the_loss_falls(job):
    with open(job["folder"] / "output" / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 276))
    assert set(rows[0]) == {"step", "loss", "learning_rate", "global_norm", "accuracy", "margin", "reward", "step_ms",
                            "pairs", "text_tokens", "computed_tokens", "chosen_mean", "rejected_mean", "min_score",
                            "max_score"}
    losses = [float(row["loss"]) for row in rows]
    assert losses[0] == pytest.approx(0.7, abs=0.1)
    assert np.mean(losses[-20:]) < 0.2
    assert np.mean([float(row["accuracy"]) for row in rows[-20:]]) > 0.95
    assert re.search(r"step 275 of 275, loss: [\d.]+, accuracy: [\d.]+, margin: [-\d.]+, reward: [-\d.]+, lr: \S+, "
                     r"global_norm: [\d.]+, \d+ ms a step, [\d.]+ pairs/s, \d+ text tokens/s "
                     r"\(\d+% of those computed\), time left: 0:00:00", job["train_log"])


def test_checkpoints_and_curves_are_where_the_tutorial_says(job):
    output = job["folder"] / "output"
    assert [path.name for path in (output / "checkpoint_network" / "rank_0").glob("*.ckpt")] == \
        ["glm4_tiny_rank_0-network.ckpt"]
    assert (output / "checkpoint" / "rank_0" / "glm4_tiny_rank_0-5_55.ckpt").is_file()
    for picture in ("curves.png", "eval_scores.png", "eval_groups.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")


def test_held_out_accuracy_is_at_least_95_percent(job):
    found = re.search(r": 93 pairs, accuracy ([\d.]+), mean margin ([\d.]+)", job["eval_log"])
    assert float(found[1]) >= 0.95
    assert float(found[2]) > 1


def test_every_batch_is_logged_and_the_last_smaller_one_counts(job):
    lines = re.findall(r"INFO - acc: \[([\d.]+)\]; avg acc: \[([\d.]+)\]", job["eval_log"])
    sizes = [16, 16, 16, 16, 16, 13]
    assert len(lines) == len(sizes)
    right = 0
    for number, ((batch, average), size) in enumerate(zip(lines, sizes), start=1):
        right += round(float(batch) * size)
        assert float(average) == pytest.approx(right / sum(sizes[:number]))


def test_inference_logs_each_answer_and_writes_a_line_for_each_row(job):
    rows = [json.loads(line) for line in (SAMPLE / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    written = [json.loads(line) for line in
               (job["folder"] / "output" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in written] == rows
    scores = re.findall(r"reward score: \[\[(-?[\d.e-]+)\]\]", job["infer_log"])
    assert [float(score) for score in scores] == [row[key] for row in written for key in ("pos_score", "neg_score")]
    assert job["infer_log"].count("INFO - Sample:\n根据一下问题，写一个合适的回答。\n\n### 问题：\n") == 2 * len(rows)


def plan_of_evaluation(job, *flags):
    from reward_eval import parse_args

    from mindrlhf.scoring.plan import plan_evaluation
    return plan_evaluation(parse_args(["--config", str(TINY_YAML), "--distributed_ckpt_path",
                                       str(job["folder"] / "output" / "checkpoint_network"), *map(str, flags)]))


def test_inference_gives_the_scores_of_evaluation(job, in_tmp_path, monkeypatch):
    """Evaluate the same file in this process and compare the scores pair by pair."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from mindrlhf.scoring.evaluate import evaluate
    result, = evaluate(plan_of_evaluation(job, "--eval_dataset", job["folder"] / "test.mindrecord"))
    written = [json.loads(line) for line in
               (job["folder"] / "output" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    np.testing.assert_allclose(result.scores.chosen, [row["pos_score"] for row in written], atol=1e-5)
    np.testing.assert_allclose(result.scores.rejected, [row["neg_score"] for row in written], atol=1e-5)
    assert result.figures["accuracy"] == np.mean([row["pos_score"] > row["neg_score"] for row in written])


def test_training_has_evaluated_with_the_weights_of_its_steps(job):
    from mindrlhf.training.evaluation import figures_of_pairs
    with open(job["folder"] / "output" / "eval.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["set"]) for row in rows] == [
        (step, "eval") for step in ("50", "100", "150", "200", "250", "275")]
    written = map(json.loads, (job["folder"] / "output" / "scores.jsonl").read_text(encoding="utf-8").splitlines())
    expected = figures_of_pairs(np.array([[row["pos_score"], row["neg_score"]] for row in written]))
    assert {name: float(rows[-1][name]) for name in expected} == pytest.approx(expected, abs=1e-5)
    assert re.search(r"step 275: eval: 93 pairs, loss: [\d.]+, accuracy: [\d.]+, margin: [\d.]+, chosen: ",
                     job["train_log"])


def test_tensorboard_shows_what_the_tables_have(job):
    """In one file, to which MindFormers adds none."""
    path, = job["folder"].rglob("*tfevents*")
    assert re.fullmatch(r"board/output-[0-9a-f]{8}", str(path.parent.relative_to(job["folder"])))
    found, output = shown_by_tensorboard(path.parent), job["folder"] / "output"
    assert found["train/loss"] == column_of(output / "metrics.csv", "loss")
    assert found["train/grad_norm"] == column_of(output / "metrics.csv", "global_norm")
    assert found["eval/accuracy"] == column_of(output / "eval.csv", "accuracy")
    assert len(found) == 13 + 8
    assert f"TensorBoard           {path.parent.relative_to(job['folder'])} (tensorboard --logdir" in job["train_log"]


def test_text_is_evaluated_as_what_it_is_converted_to(job, in_tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    from mindrlhf.scoring.evaluate import evaluate
    results = [evaluate(plan_of_evaluation(job, *flags, "--group_by", "pos_type,neg_type"))[0].figures for flags in (
        ("--eval_dataset", job["folder"] / "test.mindrecord"),
        ("--data_file", SAMPLE / "test.jsonl", "--tokenizer", SAMPLE / "tokenizer.model"))]
    assert results[0]["pairs"] == results[1]["pairs"] == 93
    assert list(results[0]["groups"]) == list(results[1]["groups"]) != []
    both = [(results[0], results[1]), *zip(results[0]["groups"].values(), results[1]["groups"].values())]
    assert len(both) == 4
    for found, expected in both:
        assert found["chosen_longer"] == expected["chosen_longer"]
        for name in ("accuracy", "margin", "mean", "std", "loss", "calibration_error", "length_correlation"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_left_padded_data_gets_the_same_scores(job, in_tmp_path, monkeypatch):
    """Convert the same file with padding on the left; compare with what inference wrote."""
    monkeypatch.syspath_prepend(EXAMPLE)
    result = run_script(in_tmp_path, "cvalues_comparison.py", "--tokenizer", SAMPLE / "tokenizer.model", "--src_file",
                    SAMPLE / "test.jsonl", "--dst_file", "left.mindrecord", "--seq_length", 128,
                    "--padding_side", "left")
    assert result.returncode == 0, result.stderr
    from mindrlhf.scoring.evaluate import evaluate
    result, = evaluate(plan_of_evaluation(job, "--eval_dataset", "left.mindrecord"))
    written = [json.loads(line) for line in
               (job["folder"] / "output" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    np.testing.assert_allclose(result.scores.chosen, [row["pos_score"] for row in written], atol=1e-4)
    np.testing.assert_allclose(result.scores.rejected, [row["neg_score"] for row in written], atol=1e-4)


def test_all_checkpoints_are_evaluated_in_the_order_of_their_steps_with_a_table(job):
    result = run_script(job["folder"], "reward_eval.py", "--config", TINY_YAML, "--eval_dataset", "test.mindrecord",
                    "--distributed_ckpt_path", "output/checkpoint", "--load_all_ckpt", "True")
    assert result.returncode == 0, result.stderr
    log = result.stdout + result.stderr
    order = re.findall(r"glm4_tiny_rank_0-(\d+_\d+)\.ckpt: 93 pairs", log)
    assert order == ["2_45", "3_40", "4_35", "5_30", "5_55"]
    assert re.search(r"checkpoint +pairs +accuracy +margin +loss +mean +std", log)


def test_training_resumes_from_step_and_optimizer_state(job, tmp_path):
    """From step 250 on, with the same data order, the loss goes on where it was."""
    checkpoint = job["folder"] / "output" / "checkpoint" / "rank_0" / "glm4_tiny_rank_0-5_30.ckpt"
    shutil.copytree(job["folder"] / "board", tmp_path / "board")
    result = run_script(tmp_path, "reward_train.py", "--config", TINY_YAML, "--train_dataset",
                    job["folder"] / "train.mindrecord", "--load_checkpoint", checkpoint, "--resume", "True",
                    "--set", f"tensorboard.tensorboard_dir={tmp_path / 'board'}")
    log = result.stdout + result.stderr
    assert result.returncode == 0, log[-3000:]
    assert "step 251 of " in log
    assert "step 275 of 275" in log
    with open(tmp_path / "output" / "metrics.csv", encoding="utf-8") as file:
        resumed = list(csv.DictReader(file))
    with open(job["folder"] / "output" / "metrics.csv", encoding="utf-8") as file:
        whole = list(csv.DictReader(file))[250:]
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    np.testing.assert_allclose([float(row["loss"]) for row in resumed], [float(row["loss"]) for row in whole],
                               rtol=1e-4)
    found = shown_by_tensorboard(next((tmp_path / "board").iterdir()))
    assert list(found["train/loss"]) == list(range(1, 276))
    expected = column_of(tmp_path / "output" / "metrics.csv", "loss")
    assert list(found["train/loss"].items())[250:] == list(expected.items())
    assert list(found["eval/loss"]) == [50, 100, 150, 200, 250]


def test_training_does_not_resume_with_other_data(job):
    result = run_script(job["folder"], "reward_train.py", "--config", TINY_YAML, "--train_dataset", "test.mindrecord",
                    "--load_checkpoint", "output/checkpoint", "--resume", "True")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith("reward_train.py: error: --resume: --train_dataset: its number of pairs is 93, expected "
                               "375, with which the run to resume was trained (output/checkpoint/rank_0/"
                               "glm4_tiny_rank_0-5_55.ckpt)")
    assert "--train_dataset: the CRC-32 of its rows is [" in lines[1]
    assert lines[2:] == ["reward_train.py: 2 problems"]


def converted(folder, direction, *args):
    result = run(folder, [sys.executable, str(ROOT / "scripts" / "convert_weight.py"), direction, *map(str, args)])
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_model_that_went_to_hugging_face_and_back_in_shards_evaluates_the_same(job, tmp_path):
    converted(tmp_path, "ms_to_hf", "--input", job["folder"] / "output" / "checkpoint_network", "--config", TINY_YAML,
              "--output", "hf", "--tokenizer", SAMPLE / "tokenizer.model")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[:9], sorted(weights)[9:]), start=1):
        save_file({name: weights[name] for name in names}, tmp_path / "hf" / f"model-0000{number}-of-00002.safetensors")
    converted(tmp_path, "hf_to_ms", "--input", "hf", "--output", "whole.ckpt", "--config", TINY_YAML)
    whole = read_ckpt(tmp_path / "whole.ckpt")
    (tmp_path / "shards").mkdir()
    for number, names in enumerate((sorted(whole)[:5], sorted(whole)[5:]), start=1):
        write_ckpt(tmp_path / "shards" / f"model-0000{number}-of-00002.ckpt",
                   [OutputTensor(name, "float32", whole[name].shape, (Part(whole[name], 0, whole[name].values),))
                    for name in names], lambda: None)
    result = run_script(tmp_path, "reward_eval.py", "--config", TINY_YAML, "--eval_dataset",
                    job["folder"] / "test.mindrecord", "--batch_size", 16, "--distributed_ckpt_path", "shards")
    log = result.stdout + result.stderr
    assert result.returncode == 0, log[-3000:]
    outcome = re.compile(r"93 pairs, accuracy [\d.]+, mean margin [\d.]+")
    assert outcome.search(log)[0] == outcome.search(job["eval_log"])[0]


def test_training_starts_from_published_weights_with_a_new_value_head(job, tmp_path):
    checkpoint = read_checkpoint(next((job["folder"] / "output" / "checkpoint_network" / "rank_0").glob("*.ckpt")))
    base = {name.replace(".embedding_weight", ".word_embeddings.weight"): parameter.asnumpy()
            for name, parameter in checkpoint.items() if name.startswith("transformer.")}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    model = load_config(TINY_YAML).mapping["model"]["model_config"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(model))  # the YAML's keys are those of the original
    text = converted(tmp_path, "hf_to_ms", "--input", "base", "--output", "ckpt", "--config", TINY_YAML)
    assert "no value head in it" in text
    assert "has the same dimensions" in text
    config = write_tiny_yaml(tmp_path / "run.yaml", edits={"epochs: 5": "epochs: 1"})
    result = run_script(tmp_path, "reward_train.py", "--config", config, "--train_dataset",
                    job["folder"] / "test.mindrecord", "--load_checkpoint", "ckpt", "--verbose")
    log = result.stdout + result.stderr
    assert "loss:[" in log, "MindFormers' own line, which --verbose brings back"
    assert result.returncode == 0, log[-3000:]
    assert re.search(r"loaded 16 parameters from \S*ckpt/model.ckpt; freshly initialised: v_head0.weight", log)
    first_loss = float(re.search(r"step 1 of \d+, loss: ([\d.]+)", log)[1])
    assert first_loss < 0.5, "0.69 is that of a backbone that knows nothing"


@pytest.mark.parametrize(("name", "args", "message"), [
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--seq_length", "64"],
     "the data's seq_length is 128, model.model_config.seq_length (or --seq_length) is 64"),
    pytest.param("reward_train.py", ["--train_dataset", "damaged/test.mindrecord", "--config", "padded.yaml"],
                 "damaged/test.mindrecord: damaged, or not the file that was written: its rows' CRC-32 is",
                 marks=pytest.mark.long),
    ("reward_train.py", ["--train_dataset", "absent.mindrecord"], "absent.mindrecord: no such file or folder"),
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--resume", "True"], "but no checkpoint is named"),
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--load_checkpoint", "output/checkpoint_network",
                         "--auto_trans_ckpt", "True"], "there is nothing to reshard, expected False"),
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--load_checkpoint", "output/checkpoint_network",
                         "--src_strategy", "absent"], "has an effect with --auto_trans_ckpt True only"),
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--load_checkpoint", "output/checkpoint_network",
                         "--src_strategy", "absent", "--auto_trans_ckpt", "True"],
     "--src_strategy: absent: no such file or folder"),
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--load_checkpoint", "wrong.ckpt"],
     "embedding_weight: checkpoint (7, 3), network (1024, 64)"),
    ("reward_train.py", ["--train_dataset", "test.mindrecord", "--use_parallel", "True"],
     "use_parallel is True, but this process was not started as one of several"),
    pytest.param("reward_train.py", ["--train_dataset", "test.mindrecord", "--config", "ascend.yaml"],
                 "MindSpore cannot be set up for context.device_target Ascend on this machine", marks=pytest.mark.long),
    ("reward_infer.py", ["--data_file", "ok.jsonl", "--tokenizer", str(SAMPLE / "tokenizer.model"), "--output_file",
                         "/proc/none/s.jsonl", "--distributed_ckpt_path", "output/checkpoint_network"],
     "--output_file: /proc/none/s.jsonl: the folder /proc/none cannot be written"),
    pytest.param("reward_eval.py", ["--eval_dataset", "test.mindrecord", "--distributed_ckpt_path", "headless.ckpt"],
                 "1 of the network's 17 parameters are not in this checkpoint", marks=pytest.mark.long),
    ("reward_eval.py", ["--eval_dataset", "test.mindrecord", "--distributed_ckpt_path", "cut.ckpt"],
     "cut.ckpt: not readable as a checkpoint"),
    ("reward_infer.py", ["--data_file", "bad.jsonl", "--tokenizer", str(SAMPLE / "tokenizer.model"),
                         "--distributed_ckpt_path", "output/checkpoint_network"],
     "bad.jsonl:2: key 'neg_resp' missing; found prompt, pos_resp; expected prompt, pos_resp, neg_resp"),
    ("reward_infer.py", ["--data_file", "ok.jsonl", "--tokenizer", "other.model",
                         "--distributed_ckpt_path", "output/checkpoint_network"],
     "the model was trained with tokenizer.model"),
    ("reward_infer.py", ["--data_file", "empty.jsonl", "--tokenizer", str(SAMPLE / "tokenizer.model"),
                         "--distributed_ckpt_path", "output/checkpoint_network"], "no rows in it"),
], ids=lambda value: "" if isinstance(value, str) else "_".join(Path(word).name.lstrip("-") for word in value))
def test_a_users_mistake_is_one_line_and_an_exit_code(job, name, args, message):
    folder = job["folder"]
    _write_mistakes(folder)
    result = run_script(folder, name, "--config", TINY_YAML, *args)
    assert result.returncode == 1, result.stdout[-2000:]
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{name}: error: ")
    assert message in last
    assert "Traceback" not in result.stdout + result.stderr


def _write_mistakes(folder):
    import mindspore as ms
    (folder / "bad.jsonl").write_text('{"prompt": "a", "pos_resp": "b", "neg_resp": "c"}\n'
                                      '{"prompt": "a", "pos_resp": "b"}\n', encoding="utf-8")
    (folder / "ok.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    (folder / "empty.jsonl").touch()
    (folder / "ascend.yaml").write_text(TINY_YAML.read_text(encoding="utf-8").replace("'CPU'", "'Ascend'"),
                                        encoding="utf-8")
    (folder / "padded.yaml").write_text(TINY_YAML.read_text(encoding="utf-8").replace("'buckets'", "'padded'"),
                                        encoding="utf-8")
    (folder / "damaged").mkdir(exist_ok=True)
    for file in folder.glob("test.mindrecord*"):
        content = bytearray(file.read_bytes())
        if file.suffix == ".mindrecord":
            content[-100000] ^= 1
        (folder / "damaged" / file.name).write_bytes(content)
    (folder / "other.model").write_bytes((SAMPLE / "tokenizer.model").read_bytes() + b"\n")
    whole = next((folder / "output" / "checkpoint_network" / "rank_0").glob("*.ckpt"))
    (folder / "cut.ckpt").write_bytes(whole.read_bytes()[:5000])
    weights = ms.load_checkpoint(str(whole))
    del weights["v_head0.weight"]
    ms.save_checkpoint([{"name": name, "data": value} for name, value in weights.items()],
                       str(folder / "headless.ckpt"))
    weights["transformer.embedding.embedding_weight"] = ms.Parameter(ms.Tensor(np.ones((7, 3), np.float32)))
    ms.save_checkpoint([{"name": name, "data": value} for name, value in weights.items()], str(folder / "wrong.ckpt"))


def test_a_failed_job_ends_the_launcher_with_the_workers_error(job):
    result = run(job["folder"], ["bash", str(ROOT / "scripts" / "msrun_launcher.sh"),
                                 f"{EXAMPLE / 'reward_train.py'} --config {TINY_YAML} "
                                 "--train_dataset absent", "1", free_port(), "logs/failed", "True", "60"])
    assert result.returncode != 0
    first, *log = result.stderr.splitlines()
    assert first == ("msrun_launcher.sh: error: worker 0 ended with exit code 1, and the job with it; the last lines "
                     "of logs/failed/worker_0.log:")
    assert log[-1] == ("  reward_train.py: error: absent: no such file or folder, expected a MindRecord file or a "
                       "folder of them")


def test_unknown_flags_and_bad_values_stop_every_script(tmp_path):
    for name in ("cvalues_comparison.py", "reward_train.py", "reward_eval.py", "reward_infer.py"):
        result = run_script(tmp_path, name, "--no_such_flag", "1")
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
    result = run_script(tmp_path, "reward_train.py", "--config", "x", "--run_mode", "predict")
    assert result.returncode == 2
    assert "invalid choice: 'predict'" in result.stderr
    result = run_script(tmp_path, "reward_eval.py", "--config", "x", "--distributed_ckpt_path", "y",
                    "--load_all_ckpt", "no!")
    assert result.returncode == 2
    assert "found 'no!', expected True or False" in result.stderr
