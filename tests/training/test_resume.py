"""Training that is ended in the middle and goes on, each start a process of its own.

| test                                      | proves                                                   |
| test_a_run_that_is_killed ...             | no bit is lost, wherever SIGKILL comes: weights, best    |
|                                           | weights, figures of evaluations                          |
| test_sigterm ...                          | a checkpoint of the last step, a line, exit code 143;    |
|                                           | also where the curves cannot be drawn                    |
| test_losses_that_are_nan ...              | one line with step and rows, exit code 1                 |
| ..._and_a_full_disk ...                   | one line, exit code 1, the earlier file as it was        |
"""
import re
import signal
import subprocess
import sys

import pytest
import yaml
from conftest import EXAMPLE, ROOT, SAMPLE, TINY_YAML
from helpers import ENVIRONMENT, limit_files

from mindrlhf.checkpoints.find import list_checkpoints

pytestmark = [pytest.mark.stack, pytest.mark.process]

ENDED = re.compile(r"step (\d+) of \d+, loss")


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
def test_a_run_that_is_killed_ends_with_the_same_bits(kills, tmp_path):
    """After other steps each time; the seed in the output repeats them. `kill_and_resume.py` itself kills 50 times, and
    works from any folder.
    """
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / "kill_and_resume.py"), "--kills", str(kills),
                             "--batching", "packing", "--processes", "1"], cwd=tmp_path, capture_output=True,
                            env={name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"},
                            text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"packing, 1 process: the same bits in all of \d+ parameters .* killed behind steps "
                     rf"\[\d+(, \d+){{{kills - 1}}}\] of 14", result.stdout), result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the sample is converted and a run is described that saves every 20 steps."""
    folder = tmp_path_factory.mktemp("resume")
    subprocess.run([sys.executable, str(EXAMPLE / "cvalues_comparison.py"), "--tokenizer",
                    str(SAMPLE / "tokenizer.model"), "--src_file", str(SAMPLE / "train.jsonl"), "--dst_file",
                    "train.mindrecord", "--seq_length", "128"], cwd=folder, env=ENVIRONMENT, check=True)
    config = yaml.safe_load(TINY_YAML.read_text(encoding="utf-8"))
    config["train_dataset"]["batching"] = config["train_dataset_task"]["dataset_config"]["batching"] = "packing"
    config["runner_config"]["batch_size"] = 4
    next(callback for callback in config["callbacks"]
         if callback["type"] == "CheckpointMonitor")["save_checkpoint_steps"] = 20
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def start(folder, *flags, **keys):
    return subprocess.Popen([sys.executable, str(EXAMPLE / "reward_train.py"), "--config", "run.yaml",
                             "--train_dataset", "train.mindrecord", *flags], cwd=folder, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **keys)


def test_sigterm_ends_a_run_with_a_checkpoint_and_a_full_disk_leaves_it_whole(folder):
    (folder / "output" / "curves.png").mkdir(parents=True)  # so that it cannot be drawn
    run = start(folder)
    log = []
    for line in run.stdout:
        log.append(line)
        if ENDED.search(line) and not any(map(ENDED.search, log[:-1])):
            run.send_signal(signal.SIGTERM)
    log = "".join(log)
    assert run.wait(timeout=120) == 143, log[-3000:]
    assert "Traceback" not in log
    assert log.endswith("reward_train.py: stopped by SIGTERM\n")
    assert "SIGTERM: training ends here, with a checkpoint" in log
    assert re.search(r"WARNING - \S+curves\.png cannot be written: .*; training, ", log), log[-3000:]
    last = int(ENDED.findall(log)[-1])
    saved = list_checkpoints(folder / "output" / "checkpoint", 0)
    assert [file.name for file in saved] == [f"glm4_tiny_rank_0-1_{last}.ckpt"]

    before = saved[0].read_bytes()
    limit = len(before) - 1  # bytes of a file; the weights alone are smaller
    run = start(folder, "--load_checkpoint", "output/checkpoint", "--resume", "True",
                preexec_fn=lambda: limit_files(limit))
    log, _ = run.communicate(timeout=600)
    assert run.returncode == 1, log[-3000:]
    assert "Traceback" not in log
    assert re.search(rf"weights from +\S+-1_{last}\.ckpt \(resumed\)", log)
    assert re.search(r"reward_train\.py: error: \S+glm4_tiny_rank_0-1_20\.ckpt: this checkpoint could not be written: "
                     r"File too large; earlier ones are as they were", log), log[-3000:]
    assert list_checkpoints(folder / "output" / "checkpoint", 0) == saved
    assert saved[0].read_bytes() == before


def test_losses_that_are_nan_end_a_run_with_step_and_rows(folder):
    """The first steps' updates are so large that all later ones are spoiled."""
    config = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    config["lr_schedule"]["learning_rate"] = 3.0e38
    config["runner_wrapper"]["use_clip_grad"] = False
    next(callback for callback in config["callbacks"] if callback["type"] == "SkippedStepMonitor")["most_in_a_row"] = 2
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "output_dir": "nan"}), encoding="utf-8")
    run = start(folder)
    log, _ = run.communicate(timeout=600)
    assert run.returncode == 1, log[-3000:]
    assert "Traceback" not in log
    scales = [float(scale) for scale in re.findall(r"in a row, \d+ in all\): .*, loss scale ([\d.]+)", log)][-3:]
    assert scales == [scales[0], scales[0] / 2, scales[0] / 4]
    last = ENDED.findall(log)[-1]
    assert re.search(rf"reward_train\.py: error: step {last}: its loss or gradients are NaN or infinite, in 3 steps in "
                     r"a row, expected at most 2 .* its pairs are rows \d+, \d+", log), log[-3000:]
