"""A program of test_every_value_runs.py: puts boundary values into a YAML, one at a time, checks each and trains it.

    python values_of_yaml.py YAML TRAIN_DATASET FOLDER SEED [all]

Prints a line of JSON for each value: key, value, outcome (refused, trained or broken) and what was said. MindSpore is
imported once; each value has a process of its own, forked from this one before it touches a device, and a time limit.
"""
import copy
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import yaml

SECONDS = 300
HUGE = 2 ** 31 - 1
ABSENT = "<absent>"
# A model that compiles fast, on a CPU, with steps of some of the 20 pairs.
SMALL = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2,
         "multi_query_group_num": 1, "kv_channels": 16, "seq_length": 128, "padded_vocab_size": 1024,
         "pad_token_id": 996, "eos_token_id": 996, "compute_dtype": "float32", "use_flash_attention": False}
SMALL_RUN = {"runner_config.epochs": 1, "context.device_target": "CPU", "use_parallel": False,
             "train_dataset.pad_token_id": 996, "eval_dataset.pad_token_id": 996}
ENDLESS = [("runner_config.epochs", HUGE)]  # no fault


def leaves(value, name=""):
    """(dotted name, value) of each key, blocks included; the number of a list's entry is a key."""
    if isinstance(value, dict):
        if name:
            yield name, value
        for key, inner in value.items():
            if key != "dataset_config":  # the same block again
                yield from leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{number}")
    else:
        yield name, value


def boundaries(key, value):
    """Other values of a key: absent, empty, the ends of its range, and what it is not."""
    yield ABSENT
    yield None
    if isinstance(value, bool):
        yield from (not value, "x")
    elif isinstance(value, int):
        yield from (0, 1, 3, -1, HUGE, 0.5)
        yield from (15, 64) if "model_config" in key else ()
    elif isinstance(value, float):
        yield from (0, 0.0, 1, 1.0, 1e-30, 1e30, -1.0)
    elif isinstance(value, str):
        yield from ("", "x", "a[b]", "a/b", "float16", "bfloat16", "float32")
    elif isinstance(value, list):
        yield from ([], value[::-1], value[:-1])
    else:
        yield from ("x", {}, {"unknown": 1})


def put(config, key, value):
    *sections, last = key.split(".")
    for part in sections:
        config = config[int(part) if isinstance(config, list) else part]
    last = int(last) if isinstance(config, list) else last
    if value is ABSENT:
        del config[last]
    else:
        config[last] = value


def small(path):
    """The YAML's keys, with a small model in place of its own."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in {**SMALL_RUN, **{f"model.model_config.{key}": value for key, value in SMALL.items()}}.items():
        put(config, key, value)
    packing = config["train_dataset"]["batching"] == "packing"
    config["train_dataset"]["row_length"] = 256
    config["runner_config"].update(batch_size=2 if packing else 8, sink_mode=False)
    return config


def outcome_of(folder, arguments):
    """(outcome, what was said); the working folder becomes `folder`."""
    from mindrlhf.errors import UserError
    from mindrlhf.training.dry_run import check_run, describe
    from mindrlhf.training.plan import plan_training
    from mindrlhf.training.train import train
    os.chdir(folder)
    try:
        plan = plan_training(arguments)
        describe(plan)
        check_run(plan)
    except UserError as error:
        return "refused", str(error)
    train(plan)  # which sees to it that a checkpoint is left
    return "trained", ""


def in_a_process(folder, arguments):
    process = os.fork()
    if not process:
        log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        try:
            found = outcome_of(folder, arguments)
        except BaseException as error:  # whatever it is, the check has passed
            found = "broken", f"{type(error).__name__}: {error}"
        (folder / "outcome.json").write_text(json.dumps(found))
        os._exit(0)
    end = time.monotonic() + SECONDS
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "broken", f"no end after {SECONDS} seconds"
        time.sleep(0.05)
    file = folder / "outcome.json"
    return json.loads(file.read_text()) if file.exists() else ("broken", "the process died")


def main():
    source, record, root, seed, *everything = sys.argv[1:]
    from mindrlhf.training import parts  # noqa: F401 (imports MindSpore and MindFormers)
    config, draw = small(Path(source)), random.Random(int(seed))
    values = [[(key, other) for other in boundaries(key, value)
               if (other != value or type(other) is not type(value)) and (key, other) not in ENDLESS]
              for key, value in leaves(config)]
    cases = itertools.chain(*values) if everything else map(draw.choice, values)
    for number, (key, value) in enumerate(cases):
        folder = Path(root) / str(number)
        folder.mkdir()
        changed = copy.deepcopy(config)
        put(changed, key, value)
        (folder / "run.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
        flags = dict.fromkeys(("seq_length", "use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt",
                               "resume", "tokenizer"))
        outcome, said = in_a_process(folder, SimpleNamespace(
            config=str(folder / "run.yaml"), train_dataset=[record], task="text_generation", settings=[], **flags))
        sys.stdout.write(json.dumps({"key": key, "value": value, "outcome": outcome, "said": said[-600:]}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
