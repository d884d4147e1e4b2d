"""The figures of metrics.csv and eval.csv as TensorBoard reads them.

Imports tensorboardX, and with it protobuf, which MindSpore has to set up: so nothing imports it before MindSpore, nor
where it is not asked for.

tensorboardX gives the format. Its `SummaryWriter` is not used: it hands each event to a thread, which a full disk ends,
and the training step that fills the queue of that thread waits for ever. Here a step is written at once, whole or not
at all, so that a run that is killed has lost none.
"""
import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Tuple

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from mindrlhf.atomic import append_whole
from mindrlhf.config.run_config import TensorBoard
from mindrlhf.training.held_out import NO_NAME
from mindrlhf.training.metrics_table import EVALUATION_COLUMNS, TABLE_COLUMNS

__all__ = ["EventFile"]

# Columns whose figures have another name in the logs of transformers and TRL.
_TAGS = {"global_norm": "grad_norm", "reward": "mean_reward", "min_score": "min_reward", "max_score": "max_reward"}
_TIME = "step_ms"
_VERSION = "brain.Event:2"  # with which TensorBoard looks for the beginnings of sessions
_NAME = "events.out.tfevents."


class EventFile:
    """The figures of a run from one start on, in a file of its own behind those of earlier starts.

    A run that goes on begins a session behind `first_step`: TensorBoard no longer shows what earlier sessions have from
    there on, steps that the run went back behind, and may have been killed in.

    Args:
        folder:     of the run
        settings:   what the YAML says
        first_step: steps of the run before this start
        again:      the evaluation of `first_step` is made anew, and takes the place of an earlier one
    """

    def __init__(self, folder: Path, settings: TensorBoard, first_step: int = 0, again: bool = False):
        self.folder, self._settings, self._first_step, self._again = folder, settings, first_step, again
        self._path: Optional[Path] = None
        self._begin = b""

    def add_step(self, row: Mapping[str, Any], loss_scale: Optional[float], rates: Mapping[str, float]) -> None:
        """Write the figures of a step; those that are not there are left out.

        Args:
            row:        of metrics.csv, without empty cells or with them
            loss_scale: of the step
            rates:      name -> what it does in a second

        Raises:
            OSError: see `_add`.
        """
        figures = {name: row.get(name) for name in TABLE_COLUMNS[1:] if name != _TIME}
        if self._settings.loss_scale:
            figures["loss_scale"] = loss_scale
        if self._settings.timers:
            figures.update({_TIME: row[_TIME], **rates})
        self._add(row["step"], {f"train/{_TAGS.get(name, name)}": value for name, value in figures.items()})

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """Write the figures of an evaluation, a row of eval.csv; raises `OSError`, see `_add`."""
        prefix = "" if row["set"] == NO_NAME else f"{row['set']}_"
        self._add(row["step"], {f"eval/{prefix}{name}": row[name] for name in EVALUATION_COLUMNS[2:]})

    def _add(self, step: int, values: Mapping[str, Optional[float]]) -> None:
        """Write an event.

        Raises:
            OSError: it cannot be written; nothing of it is in the file.
        """
        if self._path is None:
            self._path, self._begin = self._start()
        append_whole(self._path, _record(Event(wall_time=time.time(), step=step, summary=Summary(value=[
            Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value not in (None, "")]))),
            begin=self._begin)

    def _start(self) -> Tuple[Path, bytes]:
        """(the file, what it begins with). TensorBoard reads the files of a folder in the order of their names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(self.folder.glob(f"{_NAME}*"))
        last = max((int(number) for number in (path.name[len(_NAME):].partition(".")[0] for path in earlier)
                    if number.isdecimal()), default=0)
        now = time.time()
        events = [Event(wall_time=now, file_version=_VERSION)]
        if self._first_step:
            events.append(Event(wall_time=now, step=self._first_step + (not self._again),
                                session_log=SessionLog(status=SessionLog.START)))
            if self._again:  # the step itself was trained by an earlier start, and stays
                found = (_training_of(self._first_step, path) for path in reversed(earlier))
                events += filter(None, [next(filter(None, found), None)])
        name = f"{_NAME}{max(int(now), last + 1):010d}.{socket.gethostname()}.{os.getpid()}"
        return self.folder / name, b"".join(map(_record, events))


def _record(event: Event) -> bytes:
    """An event as it stands in a file: its length, the event, and a checksum of either."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), content,
                     struct.pack("<I", masked_crc32c(content))))


def _training_of(step: int, path: Path) -> Optional[Event]:
    """The last event of a step's training in a file; None: it has none, or cannot be read."""
    found = None
    with contextlib.suppress(OSError, DecodeError):
        for event in _events(path.read_bytes()):
            if event.step == step and any(value.tag.startswith("train/") for value in event.summary.value):
                found = event
    return found


def _events(content: bytes) -> Iterator[Event]:
    """Those of a file, up to one that was cut short; raises `DecodeError`."""
    place = 0
    while place + 16 <= len(content):
        size, = struct.unpack_from("<Q", content, place)
        event = content[place + 12:place + 12 + size]
        place += 16 + size
        if place <= len(content):
            yield Event.FromString(event)
