"""What tests share: where things are, the tiny model of the committed reference values, and the shared data."""
import functools
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("GLOG_v", "3")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of 200 processes would compile our modules again
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and so in what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "glm4_reward_model_train"
SAMPLE = EXAMPLE / "sample_data"
CONFIGS = ROOT / "model_configs" / "glm_config"
TINY_YAML, PRODUCTION_YAML = CONFIGS / "run_glm4_tiny_rm_cpu.yaml", CONFIGS / "run_glm4_9b_rm.yaml"
REFERENCE = Path(__file__).parent / "reference"
REFERENCE_CASES = tuple(sorted(path.stem for path in REFERENCE.glob("*.npz") if path.stem != "objectives"))
# The same for where each case compiles a graph of its own; what is left to --long is in the other ones too.
REFERENCE_GRAPHS = tuple(case if case == "grouped" else pytest.param(case, marks=(
    pytest.mark.long if case == "rope500" else pytest.mark.further)) for case in REFERENCE_CASES)
# What a clone without git-lfs has in the place of a large file, and what is said of it.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
LFS_TEXT = "a Git LFS pointer in the file's place: git lfs pull fetches the file"


def reference_python():
    """An interpreter with torch, transformers and TRL: $REFERENCE_PYTHON, or this one; None where there is neither."""
    if os.environ.get("REFERENCE_PYTHON"):
        return os.environ["REFERENCE_PYTHON"]
    return sys.executable if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "trl")) else None


def pytest_addoption(parser):
    group = parser.getgroup("mindrlhf")
    group.addoption("--quick", action="store_true", help="leave out tests that start processes, and further cases")
    group.addoption("--long", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config, items):
    quick, long = config.getoption("--quick"), config.getoption("--long")
    left_out = ["process", "further"] * quick + ["long"] * (not long)
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]
    # The files that wait for processes begin first, so that no worker is left with one of them at the end.
    waiting = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in waiting)


def pytest_configure(config):
    """What several processes compile alike, the first of them compiles for all."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="mindrlhf-graphs-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["MS_COMPILER_CACHE_PATH"] = folder.name


def pytest_collection():
    """Of the files that are divided among processes each one reads all, MindFormers' users among them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from mindrlhf.compat.imports import import_mindformers
        import_mindformers()


def pytest_collection_finish():
    """What thousands of tests are made of is no garbage; each of MindSpore's compilations would look through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


def pytest_report_header():
    python = reference_python()
    return "reference values: " + (f"made now with PyTorch, transformers and TRL by {python}" if python else
                                   "the committed ones (no torch, transformers and TRL here, no $REFERENCE_PYTHON)")


def reference_values(tmp_path_factory, script):
    """Where a script's values are: the committed files, or new ones made now where PyTorch can be had."""
    python = reference_python()
    if python is None:
        return REFERENCE
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run([python, str(REFERENCE / script), "--output", str(folder)], check=True,
                   env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    return folder


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory):
    """Where the values of the model and of the loss of the original are."""
    return reference_values(tmp_path_factory, "make_glm_reference.py")


@pytest.fixture(scope="session")
def objective_folder(tmp_path_factory):
    """Where the values of the objectives of end scores are."""
    return reference_values(tmp_path_factory, "make_objective_reference.py")


@pytest.fixture(scope="session")
def objective_reference(objective_folder):
    """Name -> array of objectives.npz, see reference/make_objective_reference.py."""
    with np.load(objective_folder / "objectives.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def load_reference(reference_folder):
    """A function from a case's name to its arrays, name -> array, which nobody changes."""
    @functools.cache
    def arrays_of(case):
        with np.load(reference_folder / f"{case}.npz") as arrays:
            arrays = dict(arrays)
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    return lambda case: dict(arrays_of(case))


@pytest.fixture(scope="session")
def reference(load_reference):
    """The arrays of the case that most tests use."""
    return load_reference("grouped")


@pytest.fixture(scope="session")
def build_model(reference):
    """A function that builds a reward model of the reference's dimensions; keyword arguments override these."""
    import mindspore as ms
    from mindformers.models.glm2.glm2_config import ChatGLM2Config

    from mindrlhf.models.glm4.glm_reward import Glm4RewardModel

    ms.set_context(mode=ms.GRAPH_MODE)

    def build(**overrides):
        return Glm4RewardModel(ChatGLM2Config(**{**dimensions_of(reference), **overrides}))

    return build


def weights_of_mindformers(network):
    """Name -> Parameter of a model of MindFormers, without the caches of keys and values that it has since 1.6."""
    return {parameter.name: parameter for parameter in network.get_parameters()
            if "infer_attention." not in parameter.name}


def dimensions_of(arrays):
    """Keyword arguments of ChatGLM2Config for a reference case."""
    return {**json.loads(str(arrays["dimensions"])), "param_init_type": "float32", "compute_dtype": "float32"}


@pytest.fixture(scope="session")
def load_reference_weights(reference):
    """A function that gives a network the weights of a reference case, by name."""
    from mindspore import Tensor

    def load(network, arrays=reference):
        for parameter in network.get_parameters():
            if f"weight/{parameter.name}" in arrays:
                parameter.set_data(Tensor(arrays[f"weight/{parameter.name}"]))
        return network

    return load


@pytest.fixture(scope="session")
def scoring_model(build_model, load_reference_weights):
    """The reference's model in evaluation mode."""
    return load_reference_weights(build_model()).set_train(False)


@pytest.fixture(autouse=True)
def nothing_of_another_test():
    """MindSpore's parallel context belongs to the process, and so do graphs that are kept: what a test sets there, no
    other one meets.
    """
    yield
    if "mindspore" in sys.modules:
        sys.modules["mindspore"].reset_auto_parallel_context()
    if "mindrlhf.compiled_graphs" in sys.modules:
        sys.modules["mindrlhf.compiled_graphs"].keep_graphs(None, {})


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Run a test inside its own folder: the frameworks write to the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_numbered_pairs(path, count, seq_length, pad_token_id, first=0):
    """A MindRecord file of pairs whose texts begin with 1000 plus the pair's number, counted from `first`; returns its
    path as text.
    """
    from mindrlhf.data.encode import encode_pair
    from mindrlhf.data.mindrecord_writer import RecordWriter
    random = np.random.default_rng(2)
    with RecordWriter(path) as writer:
        for number in range(first, first + count):
            sides = ([1000 + number, *random.integers(10, 900, length)] for length in random.integers(1, seq_length, 2))
            writer.write(encode_pair(*sides, seq_length, pad_token_id))
        writer.finish({})
    return str(path)


@pytest.fixture
def warnings(monkeypatch):
    """What the log is warned of."""
    from mindformers.tools.logger import logger
    said = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: said.append(text % values))
    return said
