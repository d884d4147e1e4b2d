"""What an entry script does first, before imports that take time: its signals, and its output whatever surrounds it."""
import io
import os
import sys
from typing import Optional

from mindrlhf import signals
from mindrlhf.job import forget_what_is_no_job

__all__ = ["begin", "lost_output"]


class _Output(io.TextIOWrapper):
    """Standard output or error in UTF-8, which goes on when it cannot be written: the work is worth more."""

    lost: Optional[OSError] = None
    in_line = False  # whether something stands in the last line already, as a progress bar does

    def write(self, text):
        self.in_line = text[-1] not in "\r\n" if text else self.in_line
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self):
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def begin() -> None:
    """Speak UTF-8, open what was closed of standard input, output and error, answer signals, and be one process unless
    a job has started several.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"  # takes effect at Python's start only; processes that are started have it too
        os.execv(sys.executable, [sys.executable, *getattr(sys, "orig_argv", ["", *sys.argv])[1:]])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it was closed; the next file that is opened would get its number
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, True)
            setattr(sys, name, open(nowhere, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115 (stays open)
    sys.stdout = sys.__stdout__ = _utf8(sys.stdout)
    sys.stderr = sys.__stderr__ = _utf8(sys.stderr)
    signals.take_over()
    remark = forget_what_is_no_job()
    if remark:
        print(f"{os.path.basename(sys.argv[0])}: {remark}", file=sys.stderr, flush=True)


def lost_output() -> Optional[OSError]:
    """Why some of standard output is lost; None where it is not, and where its reader has gone, as `head` does."""
    error = getattr(sys.stdout, "lost", None)
    return None if isinstance(error, BrokenPipeError) else error


def _utf8(stream: io.TextIOWrapper) -> _Output:
    lines, through = stream.line_buffering, stream.write_through
    return _Output(stream.detach(), encoding="utf-8", errors="backslashreplace", line_buffering=lines,
                   write_through=through)
