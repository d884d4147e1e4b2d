#!/usr/bin/env python3
"""Make run_of_1_3/: a run's checkpoint in its middle, and the figures of its second half, by the pair that runs this.

    PAIR=production bash -c '. scripts/environment.sh && python tests/reference/make_run_of_1_3.py'

The committed files are by MindFormers 1.3.0 with MindSpore 2.5.0.dev20250119;
tests/training/test_run_of_another_release.py continues with the run.
"""
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, TARGET = ROOT / "examples" / "glm4_reward_model_train", Path(__file__).parent / "run_of_1_3"
SAMPLE = EXAMPLE / "sample_data"
COMPARED = ("loss", "learning_rate", "global_norm", "accuracy", "margin", "reward", "pairs", "text_tokens")


def run(folder: Path, script: str, *flags: str) -> str:
    result = subprocess.run([sys.executable, str(EXAMPLE / script), *flags], cwd=folder, text=True, check=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.stdout


def convert(folder: Path) -> None:
    """train.mindrecord and test.mindrecord of the sample."""
    for part in ("train", "test"):
        run(folder, "cvalues_comparison.py", "--tokenizer", str(SAMPLE / "tokenizer.model"), "--src_file",
            str(SAMPLE / f"{part}.jsonl"), "--dst_file", f"{part}.mindrecord", "--seq_length", "128")


def figures(table: Path):
    """{step: {column: value}} of a metrics.csv."""
    with open(table, encoding="utf-8") as file:
        return {row["step"]: {key: float(row[key]) for key in COMPARED} for row in csv.DictReader(file)}


def evaluate(folder: Path, config: str, checkpoint: str) -> str:
    """The line of figures of the held-out pairs."""
    log = run(folder, "reward_eval.py", "--config", config, "--eval_dataset", "test.mindrecord", "--batch_size", "16",
              "--distributed_ckpt_path", checkpoint)
    return next(line.rpartition("pairs, ")[2].strip() for line in log.splitlines() if " pairs, accuracy" in line)


def main() -> None:
    config = yaml.safe_load((ROOT / "model_configs" / "glm_config" / "run_glm4_tiny_rm_cpu.yaml").read_text("utf-8"))
    config["runner_config"]["epochs"] = 2
    config["model"]["model_config"].update(hidden_size=32, ffn_hidden_size=84, kv_channels=8)  # a file of 0.7 MB
    monitor = next(callback for callback in config["callbacks"] if callback["type"] == "CheckpointMonitor")
    monitor.update(save_checkpoint_steps=5, keep_checkpoint_max=0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        convert(folder)
        run(folder, "reward_train.py", "--config", "run.yaml", "--train_dataset", "train.mindrecord")
        rows = figures(folder / "output" / "metrics.csv")
        steps_of_epoch, first = len(rows) // 2, len(rows) // 2 + 5  # early in the second epoch
        (checkpoint,) = (folder / "output" / "checkpoint" / "rank_0").glob(f"*-2_{first - steps_of_epoch}.ckpt")
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.mkdir()
        for file in (folder / "run.yaml", checkpoint, folder / "output" / "checkpoint" / "data_settings.json"):
            shutil.copy(file, TARGET)
        result = {"steps": {step: row for step, row in rows.items() if int(step) > first},
                  "evaluation": evaluate(folder, "run.yaml", str(checkpoint))}
        (TARGET / "figures.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
