"""What tests of layouts share: a smaller model, its YAML, and runs without their devices (fixtures)."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PRODUCTION_YAML, ROOT, SAMPLE
from cuda_stubs import NotPossible, cuda_stubs

__all__ = ["SMALLER", "devices", "records", "train", "write_yaml"]

SMALLER = {"num_layers": 2, "hidden_size": 512, "ffn_hidden_size": 1712, "kv_channels": 16, "seq_length": 128,
           "padded_vocab_size": 1184, "pad_token_id": 996, "eos_token_id": 996, "compute_dtype": "float16"}


def write_yaml(path, data, model, stages, flash, batching, **settings):
    config = yaml.safe_load(PRODUCTION_YAML.read_text(encoding="utf-8"))
    config.update(output_dir=str(path.parent / "output"), **settings)
    config["model"]["model_config"].update(SMALLER, use_flash_attention=flash)
    config["parallel_config"].update(data_parallel=data, model_parallel=model, pipeline_stage=stages,
                                     micro_batch_num=stages)
    for name in ("train_dataset", "eval_dataset"):
        config[name].update(pad_token_id=SMALLER["pad_token_id"])
    config["train_dataset"].update(batching=batching, row_length=SMALLER["seq_length"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """Environment variables with which MindSpore takes this machine for one with devices."""
    try:
        return cuda_stubs(tmp_path_factory.mktemp("cuda"))
    except NotPossible as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    subprocess.run([sys.executable, str(SAMPLE.parent / "cvalues_comparison.py"), "--tokenizer",
                    str(SAMPLE / "tokenizer.model"), "--src_file", str(SAMPLE / "train.jsonl"), "--dst_file",
                    str(folder / "train.mindrecord"), "--seq_length", str(SMALLER["seq_length"])],
                   check=True, capture_output=True)
    return folder / "train.mindrecord"


@pytest.fixture(scope="module")
def train(devices, records):
    """A function that runs one process of a run without its devices; returns (exit code, all it printed)."""
    def run(config, rank, ranks, *flags):
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("simulated_run.py")), str(rank), str(ranks), str(config),
             str(records), *flags], cwd=config.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **devices, "PYTHONPATH": str(ROOT)}, check=False)
        return result.returncode, result.stdout

    return run
