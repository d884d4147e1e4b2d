"""What tests that start processes share: the environment, free ports, the launcher, and the tiny YAML with edits."""
import contextlib
import csv
import fcntl
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import EXAMPLE, ROOT, SAMPLE, TINY_YAML

__all__ = ["BIN", "COLLECTIVE", "ENVIRONMENT", "PATH", "assert_the_same_training", "column_of", "convert_file",
           "convert_sample", "events_of", "files_of_at_most", "free_port", "launch", "limit_files",
           "loss_and_gradients", "run", "run_of_one_process", "run_script", "shown_by_tensorboard", "started_by_msrun",
           "table_of", "wait_for", "write_anew", "write_tiny_yaml"]

BIN = Path(__file__).parent / "bin"  # msrun, without an import of seconds
PATH = f"{BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = {**os.environ, "GLOG_v": "3", "PATH": PATH}

# A job that works until it is ended. Signs of life count only once its processes have come together.
COLLECTIVE = """
import os, time
import numpy as np
import mindspore as ms
from mindspore.communication import get_rank, init
ms.set_context(device_target="CPU", mode=ms.PYNATIVE_MODE)
init()
add = ms.ops.AllReduce()
for _ in range(10000):
    add(ms.Tensor(np.ones(3, np.float32))).asnumpy()
    with open(f"{get_rank()}.started", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(0.2)
"""


def write_anew(path, content):
    """Write bytes to a file that may be there. One that is cut to nothing and written again goes to the disk at once
    (ext4's auto_da_alloc), which takes a millisecond; a new one does not.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def limit_files(size):
    """Let no file grow beyond so many bytes in this process, for good: to be called in a new one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def files_of_at_most(size):
    """Let no file grow beyond so many bytes, as a disk that is nearly full does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(folder, command):
    """Run a command in a folder; returns the finished process, its two outputs as text."""
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600,
                          check=False)


def run_script(folder, name, *args):
    """Run an entry script in a folder, as one process without the launcher."""
    return run(folder, [sys.executable, str(EXAMPLE / name), *map(str, args)])


def free_port():
    """A port of this machine that nothing listens on, as text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started_by_msrun(monkeypatch, processes):
    """Make this process look like one of several, a number as text, that msrun has started."""
    for name, value in {"MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "8118",
                        "MS_WORKER_NUM": processes}.items():
        monkeypatch.setenv(name, value)


def launch(folder, name, args, workers=1, logs="logs"):
    """Run an entry script through the launcher, to its end; returns the logs of its processes."""
    result = run(folder, ["bash", str(ROOT / "scripts" / "msrun_launcher.sh"), f"{EXAMPLE / name} \\\n {args} ",
                          str(workers), free_port(), logs, "True", "600"])
    texts = [(folder / logs / f"worker_{rank}.log").read_text(encoding="utf-8") for rank in range(workers)]
    assert result.returncode == 0, result.stderr + texts[0][-3000:]
    return texts


def write_tiny_yaml(path, processes=1, edits=()):
    """Write the tiny YAML with the tutorial's two edits for several processes, and others, {old: new}; each `old` must
    be there once.
    """
    text = TINY_YAML.read_text(encoding="utf-8")
    several = {"use_parallel: False": "use_parallel: True", "  batch_size: 8 ": f"  batch_size: {8 // processes} "}
    for old, new in {**(several if processes > 1 else {}), **dict(edits)}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def convert_file(given, output, tokenizer, seq_length, template, add_eos=False, too_long="cut", **options):
    """Convert a file, or several with the numbers of their rows, as `ConversionPlan` says."""
    from mindrlhf.data.conversion_plan import ConversionPlan
    from mindrlhf.data.convert import convert_preferences
    from mindrlhf.data.text_encoder import TextEncoder
    given = [(given, None)] if isinstance(given, Path) else given
    encoder = TextEncoder(tokenizer, template, add_eos, too_long)
    return convert_preferences(ConversionPlan(given, output, encoder, seq_length, **options))


def convert_sample(folder, pairs):
    """The first pairs of the sample as `train.mindrecord` in a folder, beside their `train.jsonl`."""
    from mindrlhf.data.template import PROMPT_TEMPLATE
    from mindrlhf.data.tokenizer import open_tokenizer
    rows = (SAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[:pairs]
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    convert_file(folder / "train.jsonl", folder / "train.mindrecord", open_tokenizer(SAMPLE / "tokenizer.model"), 128,
                 PROMPT_TEMPLATE)


def run_of_one_process(tmp_path_factory):
    """The folder of a run on 100 pairs for five epochs, with its data `train.mindrecord`. Runs of several processes are
    compared with it; whichever worker of pytest-xdist asks first trains it for all.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "run_of_one_process"
    with open(folder.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            folder.mkdir()
            convert_sample(folder, 100)
            write_tiny_yaml(folder / "run.yaml")
            launch(folder, "reward_train.py", "--config run.yaml --train_dataset train.mindrecord")
            (folder / "whole").touch()
    return folder


def assert_the_same_training(rows, expected):
    """Whether two tables of metrics are those of the same training, as far as the order of sums allows."""
    assert len(rows) == len(expected) > 20
    for name, tolerance in (("loss", 1e-4), ("accuracy", 1e-4), ("margin", 1e-3), ("reward", 1e-3),
                            ("learning_rate", 0), ("pairs", 0), ("text_tokens", 0)):
        np.testing.assert_allclose([float(row[name]) for row in rows], [float(row[name]) for row in expected], rtol=0,
                                   atol=tolerance, err_msg=name)


def table_of(folder):
    """The rows of a run's metrics.csv; [] before it is there."""
    path = folder / "output" / "metrics.csv"
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def events_of(path):
    """The events of a file, whose every checksum is right."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c
    content, place = path.read_bytes(), 0
    while place < len(content):
        length = content[place:place + 8]
        size, = struct.unpack("<Q", length)
        event = content[place + 12:place + 12 + size]
        for part, at in ((length, place + 8), (event, place + 12 + size)):
            assert struct.unpack_from("<I", content, at)[0] == masked_crc32c(part)
        place += 16 + size
        yield Event.FromString(event)


def shown_by_tensorboard(folder):
    """{tag: {step: value}}: the files in the order of their names, and the beginning of a session ends what earlier
    ones have from its step on. No point is there twice.
    """
    from tensorboardX.proto.event_pb2 import SessionLog
    curves = {}
    for path in sorted(folder.iterdir()):
        first, *events = events_of(path)
        assert first.file_version == "brain.Event:2"
        for event in events:
            if event.HasField("session_log"):
                assert event.session_log.status == SessionLog.START
                curves = {tag: {step: value for step, value in points.items() if step < event.step}
                          for tag, points in curves.items()}
            for value in event.summary.value:
                points = curves.setdefault(value.tag, {})
                assert event.step not in points, (value.tag, event.step)
                points[event.step] = value.simple_value
    return {tag: points for tag, points in curves.items() if points}


def column_of(path, name, **where):
    """{step: figure} of a table, as TensorBoard's float32."""
    with open(path, newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(np.float32(row[name])) for row in csv.DictReader(file)
                if row[name] and all(row[key] == value for key, value in where.items())}


def wait_for(condition, seconds=120):
    """Wait until a condition holds; fails after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def loss_and_gradients(model):
    """A cell from a model's inputs to (loss, gradients of its `weights`), compiled once for inputs of the same shapes;
    outside of a cell `ms.value_and_grad` compiles at each call.
    """
    import mindspore as ms
    from mindspore import nn, ops

    class LossAndGradients(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.weights = ms.ParameterTuple(model.trainable_params())
            self.both = ops.value_and_grad(model, None, self.weights)

        def construct(self, *inputs):
            return self.both(*inputs)

    return LossAndGradients()
