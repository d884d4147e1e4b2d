"""Kept graphs: names that differ wherever results do, and the same results with and without them.

| test | what must hold | judged by |
| --- | --- | --- |
| test_what_differs_*, test_what_is_alike_* | names of values, arrays, functions and cells | pairs by hand |
| test_whatever_makes_the_step_* | dimensions, objective, optimizer, schedule, scale are in its name | one by one |
| test_a_kept_graph_is_taken_* | for its own cell and shapes alone | results; two kept files exchanged |
| test_a_damaged_* | it is compiled and kept again | results |
| test_another_weight_*, test_other_settings_* | weights are no part of a graph, a run's settings are | results |
| test_where_nothing_can_* | the results are those without them | results |
| test_of_many_graphs_* | the latest used ones stay | by hand |
| test_a_second_run_* | every bit of the weights | a run that keeps nothing |
| test_mindspores_own_cache_* | why this is needed: fails when MindSpore's cache notices other settings | MindSpore |
"""
import enum
import functools
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from conftest import TINY_YAML
from helpers import ENVIRONMENT, convert_sample, run_script
from mindformers.core.lr import CosineWithWarmUpLR
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf import compiled_graphs
from mindrlhf.compiled_graphs import Fingerprint, KeepsGraphs, Unnameable, forget_cache_of_mindspore, keep_graphs
from mindrlhf.training.step import RewardTrainOneStepCell, SkippingAdamWeightDecay

pytestmark = pytest.mark.stack

TAKEN = "Use the compilation cache"  # so MindSpore's log


@pytest.fixture(autouse=True)
def graphs_of_this_file(monkeypatch):
    """Its cells can be named."""
    ms.set_context(mode=ms.GRAPH_MODE)
    monkeypatch.setattr(compiled_graphs, "_WATCHED", (*compiled_graphs._WATCHED, __name__))


class Kind(enum.Enum):
    """Two values that differ in their names alone."""

    ONE = 1
    TWO = 2


class Scaled(KeepsGraphs, nn.Cell):
    """(N, 3) times a number, plus a weight (3,); and the shape that it was compiled for."""

    def __init__(self, factor=1.0, weight=1.0):
        super().__init__()
        self.factor = factor
        self.weight = Parameter(Tensor(np.full(3, weight, np.float32)), name="weight")

    def construct(self, values):
        return values * self.factor + self.weight, values.shape


def values_of(cell, rows):
    """What a `Scaled` gives for rows of ones: (the number, the rows that it was compiled for)."""
    values, compiled = cell(Tensor(np.ones((rows, 3), np.float32)))
    return float(values.asnumpy().flat[0]), int(compiled[0])


def names(*values):
    """The name of each."""
    found = []
    for value in values:
        fingerprint = Fingerprint()
        fingerprint.add(value)
        found.append(fingerprint.hexdigest())
    return found


def enclosing(value):
    def enclosed(default=0):
        return value + default
    return enclosed


def array(*values, dtype=np.float32):
    return np.array(values, dtype)


def parameter(value, **options):
    return Parameter(Tensor(array(value, value)), name=options.pop("name", "w"), **options)


@pytest.mark.parametrize(("one", "other"), [
    (1, 1.0), (1, True), (1, "1"), (0.1, 0.1 + 1e-17 * 16), (None, "None"), ("", b""), ([1], (1,)), ([1, 2], [12]),
    ([[1], 2], [[1, 2]]), ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({1}, {2}), ({1}, frozenset({1})),
    (Kind.ONE, Kind.TWO), (int, float), (np.float32(1), np.float64(1)), (ms.float32, ms.float16),
    (array(1), array(2)), (array(1, 2), array(1, 2)[:, None]), (array(1), array(1, dtype=np.float64)),
    (Tensor(array(1)), Tensor(array(2))), (Tensor(array(1)), array(1)),
    (parameter(1), parameter(1, requires_grad=False)), (parameter(1), parameter(1, name="v")),
    (enclosing(1), enclosing(2)), (functools.partial(max, 1), functools.partial(max, 2)),
    (functools.partial(max, 1), functools.partial(min, 1)), (ops.Softmax(0), ops.Softmax(1)),
    (ops.MatMul(transpose_b=True), ops.MatMul()), (nn.Dense(2, 3), nn.Dense(2, 4)),
    (nn.LayerNorm([3]), nn.LayerNorm([3], epsilon=1e-3)), (Scaled(1.0), Scaled(1.0 + 2 ** -52)),
    (nn.SequentialCell(Scaled(), Scaled(2.0)), nn.SequentialCell(Scaled(2.0), Scaled())),
    (Scaled().set_train(False), Scaled().set_train(True))],
    ids=lambda value: type(value).__name__)
def test_what_differs_has_another_name(one, other):
    first, second = names(one, other)
    assert first != second


@pytest.mark.parametrize("make", [
    lambda: [1, "a", {"b": (None, 2.5)}, {3}], lambda: array(1, 2), lambda: enclosing(3), Scaled,
    lambda: nn.SequentialCell(Scaled(), nn.Dense(3, 3, weight_init="zeros")), lambda: ops.Softmax(1)])
def test_what_is_alike_has_the_same_name(make):
    first, second = names(make(), make())
    assert first == second


def test_a_weights_value_is_an_input_and_not_in_the_name():
    first, second = names(Scaled(weight=1.0), Scaled(weight=2.0))
    assert first == second


def test_a_cell_that_was_compiled_within_another_one_has_the_name_that_it_had():
    """As the network that an evaluation compiles, before the first step of a resumed run or behind it."""
    class Stacked(nn.Cell):
        """Children, and an operator that notes how many inputs it has had."""

        def __init__(self):
            super().__init__()
            self.scaled, self.stack = Scaled(), ops.Stack()

        def construct(self, values):
            return self.stack((self.scaled(values)[0], values))

    class Around(nn.Cell):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell

        def construct(self, values):
            return self.cell(values)

    inner = Stacked()
    outer = Around(inner)
    before = names(inner)
    outer.compile(Tensor(np.zeros((2, 3), np.float32)))
    assert inner.scaled._scope is not None
    assert names(inner) == before


@pytest.mark.parametrize("hidden", [iter([1]), {(1, 2)}, object(), memoryview(b"a")],
                         ids=lambda value: type(value).__name__)
def test_what_hides_its_content_has_no_name(hidden):
    with pytest.raises(Unnameable):
        names([1, {"a": hidden}])


def test_code_that_nobody_watches_has_no_name(monkeypatch):
    """A user's own cell may have been edited since."""
    monkeypatch.undo()
    for foreign in (Scaled(), enclosing(1), nn.SequentialCell(Scaled())):
        with pytest.raises(Unnameable):
            names(foreign)


STEP = {"model": {}, "rate": {"learning_rate": 1e-3, "warmup_steps": 2, "total_steps": 9, "lr_end": 0.0},
        "optimizer": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
        "step": {"use_clip_grad": True, "max_grad_norm": 1.0}, "scale": 2.0 ** 12}
CHANGES = {
    "model": {"num_layers": 1, "layernorm_epsilon": 1e-3, "rope_ratio": 7, "seq_length": 24, "pad_token_id": 3,
              "hidden_size": 48, "ffn_hidden_size": 40, "padded_vocab_size": 80, "compute_dtype": "float16",
              "objective": {"loss": "end_token"}, "track_step_metrics": True, "add_qkv_bias": False},
    "rate": {"learning_rate": 2e-3, "warmup_steps": 3, "total_steps": 10, "lr_end": 1e-5},
    "optimizer": {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.0},
    "step": {"use_clip_grad": False, "max_grad_norm": 0.5}, "scale": 2.0 ** 13}


def step_of(build_model, model, rate, optimizer, step, scale):
    """The training step of these settings, as a name."""
    network = build_model(**model)
    optimizer = SkippingAdamWeightDecay(network.trainable_params(), CosineWithWarmUpLR(**rate), **optimizer)
    return names(RewardTrainOneStepCell(network, optimizer, scale_sense=nn.DynamicLossScaleUpdateCell(scale, 2, 1000),
                                        **step))[0]


@pytest.mark.further
def test_whatever_makes_the_step_is_in_its_name(build_model):
    """By the step itself: the settings that a run gives beside it are not asked here."""
    same = step_of(build_model, **STEP)
    assert same == step_of(build_model, **STEP)
    found = {}
    for part, change in CHANGES.items():
        for key, value in change.items() if isinstance(change, dict) else [(None, change)]:
            changed = {**STEP, part: {**STEP[part], key: value} if key else value}
            found[part, key] = step_of(build_model, **changed)
    assert not [key for key, name in found.items() if name == same]
    assert len(set(found.values())) == len(found)


def kept_in(folder):
    """The files of a folder, the latest used one last."""
    return sorted(folder.glob("*.graph"), key=lambda path: path.stat().st_mtime_ns)


def values_of_each(*asked):
    """What new cells give, each asked by its factor and rows."""
    return [values_of(Scaled(factor), rows) for factor, rows in asked]


def test_a_kept_graph_is_taken_for_its_own_cell_and_shape_alone(tmp_path):
    keep_graphs(tmp_path, {})
    assert values_of_each((2, 2), (2, 4), (3, 2)) == [(3, 2), (3, 4), (4, 2)]
    two, _, three = kept_in(tmp_path)
    exchanged = two.read_bytes()
    two.write_bytes(three.read_bytes())
    three.write_bytes(exchanged)  # so one sees whether it is taken
    assert values_of_each((2, 5), (3, 2), (2, 4), (2, 2)) == [(3, 5), (3, 2), (3, 4), (4, 2)]
    assert len(kept_in(tmp_path)) == 4


def test_a_damaged_graph_is_compiled_and_kept_anew(tmp_path):
    keep_graphs(tmp_path, {})
    asked = (2, 2), (2, 4), (3, 2), (2, 5)
    values_of_each(*asked)
    whole = [path.read_bytes() for path in kept_in(tmp_path)]
    damaged = [whole[0][:-1], whole[1][:40], b"", whole[3][:-9] + bytes([whole[3][-9] ^ 1]) + whole[3][-8:]]
    for path, content in zip(kept_in(tmp_path), damaged):
        path.write_bytes(content)
    for _ in range(2):  # compiled, and taken
        assert values_of_each(*asked) == [(3, 2), (3, 4), (4, 2), (3, 5)]
        assert not {path.read_bytes() for path in kept_in(tmp_path)} & set(damaged)


def test_another_weight_is_not_the_kept_graphs(tmp_path):
    keep_graphs(tmp_path, {})
    assert values_of(Scaled(2.0, weight=1.0), 2) == (3, 2)
    assert values_of(Scaled(2.0, weight=5.0), 2) == (7, 2)
    assert len(kept_in(tmp_path)) == 1


@pytest.mark.parametrize(("name", "same"), [
    ("MS_TOPO_TIMEOUT", True), ("MS_SCHED_PORT", True), ("MS_DEV_ANYTHING", False)])
def test_variables_of_mindspore_are_in_the_name_but_for_the_jobs_and_waiting_times(monkeypatch, name, same):
    def name_of_code():
        compiled_graphs._sources.cache_clear()
        return compiled_graphs._sources(("mindrlhf",))

    before = name_of_code()
    monkeypatch.setenv(name, "7")
    assert (name_of_code() == before) == same
    monkeypatch.undo()
    assert name_of_code() == before


def test_other_settings_of_a_run_are_other_graphs(tmp_path):
    for settings in ({}, {"seed": 1}, {"seed": 2}, {}):
        keep_graphs(tmp_path, settings)
        assert values_of(Scaled(2.0), 2) == (3, 2)
    assert len(kept_in(tmp_path)) == 3
    keep_graphs(None, {})
    assert values_of(Scaled(5.0), 2) == (6, 2)
    assert len(kept_in(tmp_path)) == 3


@pytest.mark.parametrize("place", ["under a file", *(pytest.param(place, marks=pytest.mark.further) for place in (
    "a folder in the graph's place", "no temporary folder"))])
def test_where_nothing_can_be_kept_the_result_is_the_same(place, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    keep_graphs(folder, {})
    if place == "under a file":
        folder.write_text("a user's")
    elif place == "no temporary folder":
        monkeypatch.setattr(compiled_graphs, "_cache_of_mindspore", compiled_graphs._CacheOfMindSpore())
        monkeypatch.setattr(compiled_graphs.tempfile, "mkdtemp", no_room)
    else:
        assert values_of(Scaled(2.0), 2) == (3, 2)
        file, = kept_in(folder)
        file.unlink()
        file.mkdir()
    assert values_of(Scaled(2.0), 2) == (3, 2)
    assert values_of(Scaled(3.0), 2) == (4, 2)
    if place == "under a file":
        assert folder.read_text() == "a user's"


def no_room(**_):
    raise OSError(28, "No space left on device")


def test_of_many_graphs_the_latest_used_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_graphs, "_MOST", 2)
    (tmp_path / "mine.graph").write_text("a user's")
    keep_graphs(tmp_path, {})
    for factor in (1.0, 2.0, 1.0, 3.0):  # 1 is used again before 3 comes
        assert values_of(Scaled(factor), 2) == (factor + 1, 2)
    kept = set(kept_in(tmp_path))
    assert len(kept) == 3
    assert tmp_path / "mine.graph" in kept
    assert values_of(Scaled(1.0), 2) == (2, 2)
    assert set(kept_in(tmp_path)) == kept


def test_mindspores_variables_are_forgotten(monkeypatch):
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "0")
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", "there")
    assert forget_cache_of_mindspore() == ("0", "there")
    assert forget_cache_of_mindspore() == (None, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    convert_sample(folder, 40)
    return folder


def train(folder, monkeypatch, output, **variables):
    """Train in a process with these variables; (weights by name, what it printed)."""
    for name in ("MS_COMPILER_CACHE_PATH", "MS_COMPILER_CACHE_ENABLE"):
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)
    for name, value in {"GLOG_v": "2", **variables}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    result = run_script(folder, "reward_train.py", "--config", TINY_YAML, "--train_dataset", "train.mindrecord",
                        "--set", f"output_dir={output}", "--set", "runner_config.epochs=2")
    assert result.returncode == 0, result.stdout + result.stderr
    path, = (folder / output / "checkpoint_network").rglob("*.ckpt")
    weights = {name: value.asnumpy() for name, value in ms.load_checkpoint(str(path)).items()}
    return {name: value for name, value in weights.items() if name != "training_notes"}, result.stdout + result.stderr


@pytest.mark.process
def test_a_second_run_takes_the_graph_and_has_the_same_bits(folder, monkeypatch):
    expected, said = train(folder, monkeypatch, "without", MS_COMPILER_CACHE_ENABLE="0")
    assert not (folder / "without" / "compiled_graphs").exists()
    assert TAKEN not in said
    for output, taken in (("first", False), ("second", True)):
        weights, said = train(folder, monkeypatch, output, MS_COMPILER_CACHE_ENABLE="1", MS_COMPILER_CACHE_PATH="kept")
        assert (TAKEN in said) == taken, said
        assert weights.keys() == expected.keys()
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert len(kept_in(folder / "kept")) == 1


MINDSPORE = """
import sys
import numpy as np, mindspore as ms
class Scaled(ms.nn.Cell):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
    def construct(self, values):
        return values * self.factor
ms.set_context(mode=ms.GRAPH_MODE)
print(Scaled(float(sys.argv[1]))(ms.Tensor(np.ones(1, np.float32))).asnumpy()[0])
"""


@pytest.mark.process
def test_mindspores_own_cache_takes_a_graph_of_other_settings(tmp_path):
    (tmp_path / "scaled.py").write_text(MINDSPORE)
    environment = {**ENVIRONMENT, "MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(tmp_path / "cache")}
    first, second, no_file = [subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        timeout=300) for program in (("scaled.py", "2"), ("scaled.py", "3"), ("-c", MINDSPORE, "3"))]
    assert first.stdout.split()[-1] == second.stdout.split()[-1] == "2.0"
    assert "FileNotFoundError" in no_file.stderr
