"""Where scored rows go: OUT.partial grows row by row and becomes OUT when all rows are there, so that a run that was
cut short goes on from it. What decides the scores is noted in OUT.partial.json. Knows nothing of MindSpore.
"""
import contextlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, Mapping, Optional, Tuple, Union

from mindrlhf.atomic import naming_a_full_disk, partial_file, partial_folder
from mindrlhf.data.preference import InvalidRow
from mindrlhf.errors import UserError
from mindrlhf.job import role_in_job
from mindrlhf.json_file import read_json_object
from mindrlhf.locks import lock, open_locked
from mindrlhf.output_paths import follow_link, is_stream
from mindrlhf.scoring.questions import CUT, Question

__all__ = ["InvalidRows", "ScoreFile", "ScoreStream", "check_score_file", "how_to_go_on",
           "invalid_rows_path", "is_written_through", "keep_standard_output", "open_output", "row_as_line"]


def row_as_line(question: Question, scores: Mapping[str, Any]) -> bytes:
    """A row's own keys and its scores as a line of JSON."""
    return _line({**question.values, **scores})


def _line(values: Mapping[str, Any]) -> bytes:
    # Half of a surrogate pair in a key of the user's becomes the JSON escape that it came from.
    return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def is_written_through(path: Path) -> bool:
    """Whether rows go to a path as they come: a FIFO, a device, or what this process has open, /dev/stdout."""
    return _is_open_file(path) or is_stream(path)


def _is_open_file(path: Path) -> bool:
    """Whether a path is the name of what this process has open: /dev/stdout, /dev/fd/3."""
    return str(path) in ("/dev/stdout", "/dev/stderr") or str(path).startswith(("/dev/fd/", "/proc/self/fd/"))


def _partial_of(path: Path) -> Tuple[Path, Path]:
    """(the file that gets the rows, its OUT.partial): a link stays one, and its target is written."""
    target = follow_link(path)
    return target, target.with_name(f"{target.name}.partial")


def invalid_rows_path(output_file: Path, folder: Path) -> Path:
    """OUT.invalid.jsonl, which for a device or FIFO is in the run's folder."""
    where = folder / "scores.jsonl" if is_written_through(output_file) else output_file
    return where.with_name(f"{where.name}.invalid.jsonl")


def how_to_go_on(path: Path) -> str:
    """Where the rows of a run are that an invalid row has ended: each process says the same."""
    if is_written_through(path):
        return "the rows before it are written"
    return f"the rows before it are in {_partial_of(path)[1]}: --resume goes on from there"


def check_score_file(path: Path, resume: bool) -> None:
    """Raise `UserError`, before anything is scored, if no rows can be written to `path`, or if rows of an earlier run
    are in the way.
    """
    if path.is_dir():
        raise UserError(f"--output_file: {path} is a folder, expected a file name")
    if is_written_through(path):
        if resume:
            raise UserError(f"--resume: --output_file is {path}, which keeps nothing of earlier runs, expected a file")
        return
    target, partial = _partial_of(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(target.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"--output_file: {path}: the folder {target.parent} cannot be written")
    if not partial.exists() or role_in_job() == "MS_SCHED":  # beside a process that may write it already
        return
    try:
        with open(partial, "rb") as file:
            lock(file.fileno(), shared=True)  # with the other processes of this run
            if not resume and file.readline().endswith(b"\n"):
                raise _left_over(partial)
    except BlockingIOError:
        raise _in_use(partial) from None
    except OSError as error:
        raise UserError(f"{partial}: cannot be read: {error.strerror}") from None


def _in_use(partial: Path) -> UserError:
    return UserError(f"{partial}: another inference is writing it; expected one at a time, give another --output_file")


def _left_over(partial: Path) -> UserError:
    return UserError(f"{partial}: it has rows that an earlier run has scored, expected none: --resume goes on from "
                     "there; to begin again, delete it")


class ScoreFile:
    """OUT.partial, which becomes OUT; a context manager.

    Args:
        path:   OUT
        asked:  what decides the scores, as JSON has it; a run that goes on must ask for the same
        resume: go on from OUT.partial, if there is one
        window: rows that are scored together; a run goes on from a multiple of it, so that they are again

    Attributes:
        kept: rows that an earlier run has left

    Raises:
        UserError: another run is writing it, it has rows and `resume` is False, or it was asked for something else.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], resume: bool, window: int):
        self.path, self.partial = _partial_of(path)
        self._record = Path(f"{self.partial}.json")
        self._file = self._open()
        try:
            self.kept = self._begin(json.loads(json.dumps(asked, allow_nan=False, default=str)), resume, window)
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> BinaryIO:
        try:
            descriptor, _ = open_locked(self.partial, os.O_APPEND)
        except BlockingIOError:
            raise _in_use(self.partial) from None
        return open(descriptor, "a+b")

    def _begin(self, asked: Dict[str, Any], resume: bool, window: int) -> int:
        self._file.seek(0)
        lines = sum(line.endswith(b"\n") for line in self._file)
        if lines and not resume:
            raise _left_over(self.partial)
        if self._file.tell() or self._record.exists():
            before = self._read_record()
        if lines:
            self._check_asked(before, asked)
        else:
            with partial_file(self._record) as file:
                file.write_text(json.dumps(asked, ensure_ascii=False, allow_nan=False, indent=2) + "\n",
                                encoding="utf-8")
        kept = lines - lines % window
        self._file.seek(0)
        self._file.truncate(sum(len(next(self._file)) for _ in range(kept)))
        return kept

    def _read_record(self) -> Dict[str, Any]:
        """What was asked when OUT.partial was begun: nothing is taken for ours, and replaced, without it."""
        if not self._record.exists():
            raise UserError(f"{self._record} is missing, which says what {self.partial} was made with; to begin again, "
                            f"delete {self.partial}")
        before = read_json_object(self._record)
        if "score_key" not in before:
            raise UserError(f"{self._record}: not made by this program, in the place where a run notes what it was "
                            "asked: move it away, or give another --output_file")
        return before

    def _check_asked(self, before: Dict[str, Any], asked: Dict[str, Any]) -> None:
        different = [f"{name} is {asked.get(name)!r}, expected {before.get(name)!r}"
                     for name in {**before, **asked} if asked.get(name) != before.get(name)]
        if different:
            raise UserError(f"--resume: {'; '.join(different)}, with which {self.partial} was begun; to begin again, "
                            "delete it")

    def __enter__(self) -> "ScoreFile":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind and not os.fstat(self._file.fileno()).st_size:
            self.discard()
        with contextlib.suppress(OSError):  # a full disk, which has ended the run: what is left over is no whole line
            self._file.close()  # and with it goes the lock

    def scores_of_kept(self, questions: Iterator[Question]) -> Iterator[Dict[str, Any]]:
        """The scores of the rows that are kept; takes as many of the questions.

        Raises:
            UserError: a row is not that of its question.
        """
        with open(self.partial, "rb") as file:
            for number in range(1, self.kept + 1):
                line, question = file.readline(), next(questions, None)
                try:
                    row = json.loads(line)
                    scores = {name: row[name] for name in (*question.names, *[CUT] * (CUT in row))}
                    same = row_as_line(question, scores) == line
                except (ValueError, TypeError, KeyError, AttributeError):
                    same = False
                if not same:
                    found = f"not the row {question.place}" if question else "the data file has ended before"
                    raise UserError(f"--resume: {self.partial}:{number}: {found}, expected the data file that it was "
                                    "made from; to begin again, delete it")
                yield scores

    def write(self, line: bytes) -> None:
        """Add a row; it is kept whatever happens to this process."""
        with naming_a_full_disk(self.partial):
            self._file.write(line)
            self._file.flush()

    def finish(self) -> None:
        """All rows are there."""
        os.replace(self.partial, self.path)
        self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        """There was no row."""
        self.partial.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


class ScoreStream:
    """A FIFO or a device, or standard output: rows go there as they are scored, and nothing is kept.

    Args:
        path: or the descriptor of what `keep_standard_output` has kept
    """

    kept = 0

    def __init__(self, path: Union[Path, str, int]):
        self.path = path
        self._descriptor = path if isinstance(path, int) else os.open(path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> "ScoreStream":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def scores_of_kept(self, questions: Iterator[Question]) -> Iterator[Dict[str, Any]]:
        return iter(())

    def write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._descriptor, line):]

    def finish(self) -> None:
        pass

    def discard(self) -> None:
        pass


def keep_standard_output(path: Path) -> Optional[int]:
    """A descriptor for rows where `path` is standard output, which from now on is standard error for everything else;
    None where it is not.
    """
    if str(path) not in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        return None
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def open_output(path: Path, descriptor: Optional[int], asked: Mapping[str, Any], resume: bool,
                window: int) -> Union[ScoreFile, ScoreStream]:
    """Where the first process writes."""
    if descriptor is not None:
        return ScoreStream(descriptor)
    if is_written_through(path):
        return ScoreStream(path)
    return ScoreFile(path, asked, resume, window)


class InvalidRows:
    """Takes invalid rows, for OUT.invalid.jsonl: line, reason and text of each. A run that goes on meets them again.

    Args:
        path: None: they are counted only
    """

    def __init__(self, path: Optional[Path]):
        self.path, self.count = path, 0
        self._stack = contextlib.ExitStack()
        self._file: Optional[BinaryIO] = None

    def __enter__(self) -> "InvalidRows":
        if self.path:
            self._hidden = self._stack.enter_context(partial_folder(self.path)) / self.path.name
            self._file = self._stack.enter_context(open(self._hidden, "wb"))
        return self

    def __exit__(self, *_) -> None:
        with naming_a_full_disk(self.path):
            self._stack.close()

    def add(self, row: InvalidRow) -> None:
        self.count += 1
        if self._file:
            with naming_a_full_disk(self.path):
                self._file.write(_line(row.as_record()))

    def finish(self) -> None:
        """Give the file its name."""
        if self._file:
            self._file.close()
            os.replace(self._hidden, follow_link(self.path))
