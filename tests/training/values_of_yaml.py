"""A program of test_every_value_runs.py: puts boundary values into a YAML, one at a time, checks each and trains it.

    python values_of_yaml.py YAML TRAIN_DATASET FOLDER SEED [all]

Prints a line of JSON for each value: key, value, outcome (refused, trained or broken) and what was said. MindSpore is
imported once; each check and each run has a process of its own, forked from this one before it touches a device, and a
time limit. Almost all time goes into compiling, and almost all values that pass the check run: so they are trained
several at once, of different sections. Where that fails the half with the fault is looked for, down to one value; if
there is none, the values together are a line of their own.
"""
import collections
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
# No faults: a run without end, and one of several processes, which the check may plan before msrun starts them.
NOT_TRIED = [("runner_config.epochs", HUGE), ("use_parallel", True)]


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


def checked(folder, arguments):
    """(outcome, what was said) of the check; the working folder becomes `folder`."""
    from mindrlhf.errors import UserError
    from mindrlhf.training.dry_run import check_run, describe
    from mindrlhf.training.plan import plan_training
    os.chdir(folder)
    try:
        plan = plan_training(arguments)
        describe(plan)
        check_run(plan)
    except UserError as error:
        return "refused", str(error)
    return "passed", ""


def trained(folder, arguments):
    """The same of the run, which sees to it that a checkpoint is left."""
    from mindrlhf.errors import UserError
    from mindrlhf.training.plan import plan_training
    from mindrlhf.training.train import train
    os.chdir(folder)
    try:
        train(plan_training(arguments))
    except UserError as error:
        return "ended", str(error)
    return "trained", ""


def in_a_process(work, folder, arguments):
    process = os.fork()
    if not process:
        log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        try:
            found = work(folder, arguments)
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


class Trial:
    """Checks and trains a configuration with some of its values changed.

    Args:
        config: the configuration
        record: the data set
        root:   gets a folder for each trial
    """

    def __init__(self, config, record, root):
        self._config, self._record, self._root, self._numbers = config, record, Path(root), itertools.count()

    def __call__(self, work, changes):
        """What `checked` or `trained` says of the changes, a list of (key, value)."""
        folder = self._root / str(next(self._numbers))
        folder.mkdir()
        config = copy.deepcopy(self._config)
        for key, value in changes:
            put(config, key, value)
        (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        flags = dict.fromkeys(("seq_length", "use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt",
                               "resume", "tokenizer"))
        return in_a_process(work, folder, SimpleNamespace(
            config=str(folder / "run.yaml"), train_dataset=[self._record], task="text_generation", settings=[],
            **flags))

    def train(self, changes):
        """Train changes that have passed the check one at a time; prints each of them. Returns whether all ran."""
        outcome, said = self(trained, changes)
        if outcome == "trained" or len(changes) == 1:
            for key, value in changes:
                show(key, value, "trained" if outcome == "trained" else "broken", said)
            return outcome == "trained"
        half = len(changes) // 2
        ran = [self.train(part) for part in (changes[:half], changes[half:])]
        if all(ran) and outcome == "broken":  # others may contradict each other, if it is said in one line
            show(*zip(*changes), "broken", said)
        return all(ran)


def groups(changes):
    """The changes in lists in which no two are of one section, which might hide each other."""
    of_section = collections.defaultdict(list)
    for key, value in changes:
        of_section[key.partition(".")[0]].append((key, value))
    for group in itertools.zip_longest(*of_section.values()):
        yield [change for change in group if change]


def show(key, value, outcome, said):
    sys.stdout.write(json.dumps({"key": key, "value": value, "outcome": outcome, "said": said[:600]}) + "\n")
    sys.stdout.flush()


def main():
    source, record, root, seed, *everything = sys.argv[1:]
    import matplotlib.figure  # noqa: F401 (once for all runs, which draw)

    from mindrlhf.training import check_parts, dry_run, train, trainer  # noqa: F401 (imports MindSpore and MindFormers)
    config, draw = small(Path(source)), random.Random(int(seed))
    values = [[(key, other) for other in boundaries(key, value)
               if (other != value or type(other) is not type(value)) and (key, other) not in NOT_TRIED]
              for key, value in leaves(config)]
    cases = list(itertools.chain(*values) if everything else map(draw.choice, values))
    trial, passed = Trial(config, record, root), []
    for key, value in cases:
        outcome, said = trial(checked, [(key, value)])
        if outcome == "passed":
            passed.append((key, value))
        else:
            show(key, value, outcome, said)
    draw.shuffle(passed)
    for group in groups(passed):
        trial.train(group)


if __name__ == "__main__":
    main()
