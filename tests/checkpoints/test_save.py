"""Checkpoints of a training run.

| test                                  | proves                                           | judged against    |
| test_a_checkpoint_has_a_checksum      | what MindSpore itself reads and checks           | the weights       |
| test_files_are_named_by_the_step ...  | a resumed run writes the names of the whole run  | one run           |
| test_the_last_steps_are_kept ...      | by step, not by time                             | names             |
| test_weights_alone_are_there ...      | the order of the two files behind the last step  | names             |
| test_a_run_that_is_asked_to_end ...   | the order of the two files at SIGTERM            | names             |
| test_the_last_step_is_saved_whatever  | 0 steps, 0 kept                                  | names             |
| test_a_run_whose_last_checkpoint_is_  | it is looked at when the run ends                | messages          |
| test_a_run_beside_another ...         | nothing of another run is overwritten            | names and bytes   |
| test_a_callback_that_fails ...        | the step is saved, then the error goes on        | names             |
| test_a_step_that_fails ...            | weights half changed are not saved               | names             |
| test_where_there_is_no_room_for_...   | the smaller file is tried too                    | names             |
| test_a_file_beside_the_checkpoint_... | nothing but a warning                            | names             |
| test_each_file_says_how_it_was_ ...   | which run's data a checkpoint saw, also a copy   | what was noted    |
| test_the_best_weights_are_ ...        | a name, notes of their own, nothing else in it   | names, notes      |
| test_mindspore_reads_a_file_with ...  | notes are no weight, for MindSpore and for us    | the weights       |
| test_what_a_run_went_back_from_ ...   | order, keeping and replacing after rollbacks     | names by hand     |
| test_what_cannot_be_written ...       | the earlier file as it was; what to do           | bytes, messages   |
"""
import errno
import json
import os
import shutil
import signal

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train.callback import Callback

from mindrlhf import signals
from mindrlhf.checkpoints import save as saving
from mindrlhf.checkpoints.find import list_checkpoints
from mindrlhf.checkpoints.load import load_strictly, read_checkpoint
from mindrlhf.checkpoints.save import WholeCheckpointMonitor, save_whole, saving_first
from mindrlhf.checkpoints.training_notes import read_training_notes
from mindrlhf.errors import UserError
from mindrlhf.training.stopping import InterruptionGuard

pytestmark = pytest.mark.stack

RANK_0 = ("checkpoint/rank_0", "checkpoint_network/rank_0")


def run(number, branch=0, left=()):
    """What notes say of a run."""
    return {"run": {"number": number, "identity": "ab", "branch": branch, "left": list(left)}}


def names_in_order(folder):
    """Epoch and step in the names of a run's checkpoints, the newest last."""
    return [file.stem.split("-")[1] for file in list_checkpoints(folder / "checkpoint", 0)]


class Stop(Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num >= self.step:
            run_context.request_stop()


def train(folder, first_step=0, steps=10, of_epoch=4, others=(), stop=1000, made=lambda monitor: None,
          **keys):
    """Train a matrix in `folder`, beginning after a step; an epoch has 4 steps. `others` are further callbacks, and
    behind the step `stop` of the whole run training ends.
    """
    network = nn.Dense(2, 1)
    append_info = [{"epoch_num": 0, "step_num": first_step, "global_step": 0, "loss_scale": 1}] if first_step else None
    monitor = WholeCheckpointMonitor(prefix="a", directory=str(folder), append_info=append_info, **keys)
    made(monitor)
    data = ms.dataset.NumpySlicesDataset({"x": np.eye(of_epoch, 2, dtype=np.float32),
                                          "y": np.ones((of_epoch, 1), np.float32)}, shuffle=False).batch(1)
    data.set_init_step(first_step)
    with saving_first([monitor]):
        ms.Model(network, nn.MSELoss(), nn.Momentum(network.trainable_params(), 0.1, 0.9)).train(
            -(-steps // of_epoch), data, callbacks=[monitor, *others, Stop(stop - first_step)],
            dataset_sink_mode=False, initial_epoch=first_step // of_epoch)
    return network


def files(folder):
    """Names of all checkpoints, and of what should not be there; of the last steps last."""
    return [file.name for part in RANK_0 for file in sorted((folder / part).iterdir(), key=lambda file: file.name)
            if file.suffix == ".ckpt" or file.name.startswith(".")]


def test_a_checkpoint_has_a_checksum_that_mindspore_checks(tmp_path):
    network = train(tmp_path, save_checkpoint_steps=3)
    for file in [list_checkpoints(tmp_path / part.split("/")[0], 0)[-1] for part in RANK_0]:
        assert file.read_bytes()[-17:-10] == b"crc_num"
        assert (ms.load_checkpoint(str(file), crc_check=True)["weight"].asnumpy() == network.weight.asnumpy()).all()


@pytest.mark.parametrize("first_step", [3, *(pytest.param(step, marks=pytest.mark.further) for step in (1, 4, 5))])
def test_files_are_named_by_the_step_of_the_whole_run(tmp_path, first_step):
    train(tmp_path / "whole", save_checkpoint_steps=3)
    train(tmp_path / "resumed", first_step, save_checkpoint_steps=3, notes=run(0))
    whole, resumed = files(tmp_path / "whole"), files(tmp_path / "resumed")
    assert whole == ["a_rank_0-1_3.ckpt", "a_rank_0-2_2.ckpt", "a_rank_0-3_1.ckpt", "a_rank_0-3_4.ckpt",
                     "a_rank_0-network.ckpt"]
    assert resumed == [name for name in whole if first_step < 3 or name != "a_rank_0-1_3.ckpt"]
    last = [ms.load_checkpoint(str(tmp_path / run / RANK_0[0] / "a_rank_0-3_4.ckpt")) for run in ("whole", "resumed")]
    assert [int(checkpoint["step_num"]) for checkpoint in last] == [12, 12]


def test_the_last_steps_are_kept_whatever_the_times(tmp_path):
    train(tmp_path, steps=4, save_checkpoint_steps=1, keep_checkpoint_max=2)
    assert files(tmp_path)[:2] == ["a_rank_0-1_3.ckpt", "a_rank_0-1_4.ckpt"]
    os.utime(tmp_path / RANK_0[0] / "a_rank_0-1_4.ckpt", (10_000, 10_000))
    train(tmp_path, 4, steps=5, save_checkpoint_steps=4, keep_checkpoint_max=2, notes=run(0))
    assert files(tmp_path) == ["a_rank_0-1_4.ckpt", "a_rank_0-2_4.ckpt", "a_rank_0-network.ckpt"]


def test_a_run_beside_another_has_names_of_its_own_and_so_has_its_resumption(tmp_path):
    train(tmp_path, steps=4, save_checkpoint_steps=2)
    first = {name: (tmp_path / RANK_0[0] / name).read_bytes() for name in files(tmp_path)[:2]}
    train(tmp_path, steps=4, save_checkpoint_steps=2)
    train(tmp_path, 4, steps=8, save_checkpoint_steps=2, notes=run(1))
    assert files(tmp_path) == ["a_rank_0-1_2.ckpt", "a_rank_0-1_4.ckpt", "a_rank_0_1-1_2.ckpt", "a_rank_0_1-1_4.ckpt",
                               "a_rank_0_1-2_2.ckpt", "a_rank_0_1-2_4.ckpt", "a_rank_0-network.ckpt",
                               "a_rank_0_1-network.ckpt"]
    assert all((tmp_path / RANK_0[0] / name).read_bytes() == content for name, content in first.items())
    assert list_checkpoints(tmp_path / "checkpoint", 0)[-1].name == "a_rank_0_1-2_4.ckpt"


@pytest.mark.parametrize(("keys", "left"), [
    ({"save_checkpoint_steps": 0}, ["a_rank_0-3_4.ckpt"]),
    ({"save_checkpoint_steps": 0, "save_checkpoint_seconds": 1000}, ["a_rank_0-3_4.ckpt"]),
    ({"save_checkpoint_steps": 5, "keep_checkpoint_max": 0}, ["a_rank_0-2_1.ckpt", "a_rank_0-3_2.ckpt",
                                                              "a_rank_0-3_4.ckpt"]),
])
def test_the_last_step_is_saved_whatever_the_keys_say_and_0_keeps_all(tmp_path, keys, left):
    train(tmp_path, steps=12, **keys)
    assert files(tmp_path) == [*left, "a_rank_0-network.ckpt"]


@pytest.mark.parametrize(("damage", "message"), [
    (None, None),
    (lambda file: file.unlink(), "cannot be read: No such file or directory; it is the checkpoint of this run's last"),
    (lambda file: file.write_bytes(file.read_bytes()[:-30]), "damaged or cut short: .*; it is the checkpoint of this"),
])
def test_a_run_whose_last_checkpoint_is_lost_does_not_end_well(tmp_path, damage, message):
    monitors = []
    train(tmp_path, save_checkpoint_steps=0, made=monitors.append)
    if damage:
        damage(tmp_path / RANK_0[0] / "a_rank_0-3_4.ckpt")
        with pytest.raises(UserError, match=message):
            monitors[0].check_newest()
    else:
        monitors[0].check_newest()


def test_a_run_that_has_written_no_checkpoint_does_not_end_well(tmp_path):
    with pytest.raises(UserError, match="this run has ended and has written no checkpoint"):
        WholeCheckpointMonitor(prefix="a", directory=str(tmp_path)).check_newest()


@pytest.fixture
def saved(monkeypatch):
    """Names of the files that are written, in their order."""
    names = []
    monkeypatch.setattr(saving, "save_whole", lambda network, path, *args, **keys: (
        names.append(os.path.basename(path)), save_whole(network, path, *args, **keys)))
    return names


@pytest.mark.parametrize("first_step", [0, 4, 6])
def test_weights_alone_are_there_when_the_last_checkpoint_is(tmp_path, saved, first_step):
    """A run that is killed behind it would not come back to them."""
    train(tmp_path, first_step, steps=8, save_checkpoint_steps=4, notes=run(0))
    assert saved == [*["a_rank_0-1_4.ckpt", "a_rank_0-network.ckpt"] * (first_step == 0),
                     "a_rank_0-network.ckpt", "a_rank_0-2_4.ckpt"]


def test_a_run_that_is_asked_to_end_saves_first_what_it_can_be_resumed_from(tmp_path, saved, monkeypatch):
    """Whoever asks may not wait for more than that."""
    monkeypatch.setattr(signals, "_asked", None)
    monkeypatch.setattr(signals, "_postponed", False)

    class Asked(Callback):
        def on_train_step_begin(self, run_context):
            if run_context.original_args().cur_step_num == 2:
                signals.note(signal.SIGTERM)

    train(tmp_path, steps=4, save_checkpoint_steps=100, others=[Asked(), InterruptionGuard()])
    assert saved == ["a_rank_0-1_2.ckpt", "a_rank_0-network.ckpt"]


class Fails(Callback):
    """One of the user's own."""

    def __init__(self, hook, step, error):
        super().__init__()
        setattr(self, hook, lambda run: self.fail(run.original_args(), step, error))

    def fail(self, run, step, error):
        if run.cur_step_num == step:
            raise error


@pytest.mark.parametrize(("hook", "step", "name"), [
    ("on_train_step_end", 2, "a_rank_0-1_2.ckpt"), ("on_train_epoch_end", 4, "a_rank_0-1_4.ckpt"),
    ("on_train_epoch_begin", 4, "a_rank_0-1_4.ckpt"), ("on_train_end", 8, "a_rank_0-2_4.ckpt")])
def test_a_callback_that_fails_costs_no_weights(tmp_path, hook, step, name):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, steps=8, save_checkpoint_steps=100, others=[Fails(hook, step, ZeroDivisionError())])
    assert files(tmp_path) == [name, "a_rank_0-network.ckpt"]


@pytest.mark.parametrize(("hook", "error"), [("on_train_step_begin", ZeroDivisionError()),
                                             ("on_train_step_end", UserError("its weights are worth nothing"))])
def test_a_step_that_fails_is_not_saved(tmp_path, hook, error):
    with pytest.raises(type(error)):
        train(tmp_path, steps=8, save_checkpoint_steps=100, others=[Fails(hook, 2, error)])
    assert not (tmp_path / "checkpoint").exists()


def test_where_there_is_no_room_for_the_checkpoint_the_weights_alone_are_tried(tmp_path, monkeypatch):
    def full(network, path, *args, **keys):
        if path.endswith("1_2.ckpt"):
            raise UserError(f"{path}: this checkpoint could not be written: No space left on device")
        save_whole(network, path, *args, **keys)

    monkeypatch.setattr(saving, "save_whole", full)
    with pytest.raises(UserError, match=r"1_2\.ckpt: this checkpoint could not be written"):
        train(tmp_path, steps=8, save_checkpoint_steps=2)
    assert files(tmp_path) == ["a_rank_0-network.ckpt"]


@pytest.mark.parametrize("name", [f"{RANK_0[0]}/meta.json", "checkpoint/data_settings.json"])
def test_a_file_beside_the_checkpoint_that_cannot_be_written_ends_no_run(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    train(tmp_path, steps=4, save_checkpoint_steps=2, data_settings={"pad_token_id": 3})
    assert files(tmp_path) == ["a_rank_0-1_2.ckpt", "a_rank_0-1_4.ckpt", "a_rank_0-network.ckpt"]


def test_each_file_says_how_it_was_trained_and_another_run_does_not_change_that(tmp_path):
    train(tmp_path, steps=4, save_checkpoint_steps=2, notes={"pad_token_id": 3, **run(0)})
    train(tmp_path, steps=4, save_checkpoint_steps=2, notes={"pad_token_id": 4, **run(1)})
    WholeCheckpointMonitor(prefix="a", directory=str(tmp_path), notes={"pad_token_id": 5, **run(1)})
    shutil.copy(tmp_path / RANK_0[0] / "a_rank_0-1_2.ckpt", tmp_path / "copy.ckpt")
    last = list(zip(RANK_0, ("1_4", "network")))
    for name, token, number in (*((f"{part}/a_rank_0-{end}.ckpt", 3, 0) for part, end in last),
                                *((f"{part}/a_rank_0_1-{end}.ckpt", 4, 1) for part, end in last),
                                ("copy.ckpt", 3, 0)):
        notes = read_training_notes(tmp_path / name)
        assert (notes.place, notes.number, notes.doubt) == (tmp_path / name, number, None)
        assert notes.values["pad_token_id"] == token
        assert notes.values["run"]["step"] == (2 if name == "copy.ckpt" else 4)
    for part in ("checkpoint", "checkpoint_network"):
        for name, token in (("data_settings.json", 3), ("data_settings_1.json", 4)):
            assert json.loads((tmp_path / part / name).read_text(encoding="utf-8"))["pad_token_id"] == token


def test_the_best_weights_are_one_file_and_what_else_is_noted_is_in_each(tmp_path):
    seen = iter(range(100, 200))

    class Best(Callback):
        def on_train_step_end(self, run_context):
            args = run_context.original_args()
            if args.cur_step_num in (3, 6):
                monitors[0].save_best(args.train_network.network, args.cur_step_num)

    monitors = []

    def made(monitor):
        monitors.append(monitor)
        monitor.also_note("evaluation", lambda: {"step": next(seen)})

    train(tmp_path, steps=8, others=[Best()], made=made, save_checkpoint_steps=4, notes=run(2))
    (best,) = (tmp_path / "checkpoint_best" / "rank_0").iterdir()
    assert best.name == "a_rank_0_2-best.ckpt"
    assert best == monitors[0].best
    assert read_training_notes(best).values["run"]["step"] == 6
    assert set(read_checkpoint(best)) <= {"network.weight", "network.bias", "weight", "bias"}
    noted = [read_training_notes(file).values["evaluation"]["step"] for file in list_checkpoints(
        tmp_path / "checkpoint", 0)]
    assert noted == [101, 105]  # after the best of step 3, and beside the weights alone


def test_mindspore_reads_a_file_with_notes_and_so_does_strict_loading(tmp_path):
    noted = {"prompt_template": "问{prompt}{response}", **run(0)}
    network = train(tmp_path, steps=4, save_checkpoint_steps=4, notes=noted)
    other = nn.Dense(2, 1)
    for file in (tmp_path / RANK_0[0] / "a_rank_0-1_4.ckpt", tmp_path / RANK_0[1] / "a_rank_0-network.ckpt"):
        found = ms.load_checkpoint(str(file), other, crc_check=True)
        assert (other.weight.asnumpy() == network.weight.asnumpy()).all()
        assert json.loads(found["training_notes"].asnumpy().tobytes())["prompt_template"] == "问{prompt}{response}"
        report = load_strictly(other, read_checkpoint(file), "a", need_head=True)
        assert set(report.left_over) <= {"momentum", "moments.weight", "moments.bias"}  # another optimizer's


def test_what_a_run_went_back_from_is_neither_newer_nor_counted_nor_removed(tmp_path):
    """Epochs of 4 steps: 4, 8 and 12; back to 4, on to 7; back to 6, on to 8, whose name is there already."""
    train(tmp_path, steps=12, save_checkpoint_steps=4, keep_checkpoint_max=3, notes=run(0))
    assert files(tmp_path)[:3] == ["a_rank_0-1_4.ckpt", "a_rank_0-2_4.ckpt", "a_rank_0-3_4.ckpt"]
    train(tmp_path, 4, steps=7, of_epoch=4, save_checkpoint_steps=2, keep_checkpoint_max=3, stop=7,
          notes=run(0, branch=1, left=[[0, 4]]))
    assert names_in_order(tmp_path) == ["2_4", "3_4", "1_4", "2_2", "2_3"]
    train(tmp_path, 6, steps=8, save_checkpoint_steps=2, keep_checkpoint_max=2,
          notes=run(0, branch=2, left=[[0, 4], [1, 6]]))
    assert names_in_order(tmp_path) == ["3_4", "2_3", "2_2", "2_4"]


@pytest.mark.parametrize(("number", "reason", "cure"), [
    (errno.ENOSPC, "No space left on device", "free some space"),
    (errno.EACCES, "Permission denied", "see to it that the folder can be written")])
def test_what_cannot_be_written_leaves_the_earlier_file_as_it_was(tmp_path, monkeypatch, number, reason, cure):
    network = nn.Dense(2, 1)
    path = tmp_path / "a-1_1.ckpt"
    save_whole(network, str(path))
    before = path.read_bytes()

    def full(network, name, *args, **keys):
        with open(name, "wb") as file:
            file.write(before[:50])
        raise OSError(number, reason)

    monkeypatch.setattr(ms, "save_checkpoint", full)
    with pytest.raises(UserError, match=rf"a-1_1\.ckpt: this checkpoint could not be written: {reason}; "
                                        rf"earlier ones are as they were: {cure}, then continue"):
        save_whole(network, str(path))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_what_a_killed_run_left_goes_with_the_next_file(tmp_path):
    left = tmp_path / ".checkpoint.partial"
    left.mkdir()
    (left / "mindrlhf.lock").touch()
    (left / "a-1_1.tmp").write_bytes(b"half")
    save_whole(nn.Dense(2, 1), str(tmp_path / "a-1_7.ckpt"))
    assert [file.name for file in tmp_path.iterdir()] == ["a-1_7.ckpt"]


def test_saving_beside_the_training_is_refused(tmp_path):
    with pytest.raises(UserError, match="async_save is True, expected False"):
        WholeCheckpointMonitor(directory=str(tmp_path), async_save=True)


@pytest.mark.parametrize(("argument", "value"), [("keep_checkpoint_per_n_minutes", 5), ("saved_network", "a"),
                                                ("save_trainable_params", True), ("enc_key", b"k")])
def test_what_mindformers_would_do_otherwise_is_refused(tmp_path, argument, value):
    with pytest.raises(UserError, match=rf"callbacks\.CheckpointMonitor: {argument} is {value!r}, expected "):
        WholeCheckpointMonitor(directory=str(tmp_path), **{argument: value})


def test_seconds_between_checkpoints_count_where_there_are_no_steps(tmp_path, saved):
    train(tmp_path / "often", steps=4, save_checkpoint_steps=0, save_checkpoint_seconds=1e-9)
    assert saved[::2][:-1] == [f"a_rank_0-1_{step}.ckpt" for step in (1, 2, 3)]
    saved.clear()
    train(tmp_path / "end", steps=4, save_checkpoint_steps=0, save_checkpoint_seconds=1000)
    assert saved == ["a_rank_0-network.ckpt", "a_rank_0-1_4.ckpt"]


def test_a_yaml_that_names_mindformers_class_gets_it(tmp_path):
    train(tmp_path, steps=1, of_epoch=1, save_checkpoint_steps=1)
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    assert MindFormerRegister.get_cls(MindFormerModuleType.CALLBACK, "CheckpointMonitor") is WholeCheckpointMonitor
    assert Tensor(ms.load_checkpoint(str(tmp_path / RANK_0[0] / "a_rank_0-1_1.ckpt"))["step_num"]).asnumpy() == 1
