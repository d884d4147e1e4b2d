"""What of MindFormers' log a terminal shows. Tests: tests/compat/test_logs.py.

All lines go to the log files, `OUTPUT/log/rank_N/info.log`. Our own lines go through MindFormers' logger too, so that
they stand among its own there.
"""
import contextlib
import io
import logging
import os
import sys
import warnings

from tqdm import tqdm

from mindrlhf.compat.imports import import_mindformers
from mindrlhf.job import was_started_in_job

__all__ = ["DETAIL", "STEP", "quiet_terminal", "shows_bar"]

# `extra` of a log line. DETAIL: one of very many, shown by --verbose and by a launcher's worker; STEP: what a progress
# bar says where there is one.
DETAIL, STEP = {"shown_as": "detail"}, {"shown_as": "step"}

_FORMAT = "%(asctime)s - %(levelname)s - %(message)s"


def shows_bar() -> bool:
    """Whether standard output is a terminal that `quiet_terminal` has made room on for a progress bar."""
    return _Terminal.in_use and sys.stdout.isatty()


def quiet_terminal(verbose: bool = False) -> None:
    """Import MindFormers, and let it write to its log files alone; its errors, and our lines, go to the terminal too.

    MindFormers writes some 700 lines to standard output for a run of 275 steps, among them that the model is GPT-2,
    that it has 0 million parameters, and that parameters are not loaded: all of them untrue here, since another class
    takes these steps. Warnings about models that are not used here come with its import.

    Args:
        verbose: leave the terminal as MindFormers has it
    """
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()), _no_tracebacks():
        import_mindformers()
    from mindformers.tools.logger import get_logger
    logger = get_logger()
    for handler in logger.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _warn_once(handler)
        elif not verbose and isinstance(handler, logging.StreamHandler) and not isinstance(handler, _Terminal):
            logger.removeHandler(handler)  # processes whose lines nobody is to see have none
            logger.addHandler(_Terminal())
            _Terminal.in_use = True
    if not verbose:  # since 1.9 MindFormers does the same, and does not say where they come from
        warnings.showwarning = lambda message, category, filename, *_, **__: logger.warning(
            "%s: %s", category.__name__, message, extra={"origin": filename})


class _Terminal(logging.StreamHandler):
    """Standard output without the lines that are for the log files, beside a progress bar if there is one."""

    in_use = False

    def __init__(self):
        super().__init__(sys.stdout)
        packages = (sys.modules[name].__file__ for name in ("mindformers", "mindspore"))
        self._not_shown = tuple(f"{os.path.dirname(file)}{os.sep}" for file in packages)
        self.setLevel(logging.INFO)
        self.setFormatter(logging.Formatter(_FORMAT))
        self.addFilter(self._is_shown)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        kind = getattr(record, "shown_as", None)
        if kind == "detail":
            return was_started_in_job()
        if kind == "step":
            return not shows_bar()
        return not getattr(record, "origin", record.pathname).startswith(self._not_shown)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(sys.stdout):
            super().emit(record)


@contextlib.contextmanager
def _no_tracebacks():
    """None from handlers that cannot write, which have no `_warn_once` yet."""
    as_it_was, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = as_it_was


def _warn_once(handler: logging.FileHandler):
    """What a handler does where its file cannot be written, instead of a traceback a line."""
    warned = []

    def handle_error(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.FileHandler.handleError(handler, record)
        elif not warned:
            warned.append(error)
            sys.stderr.write(f"warning: {handler.baseFilename}: this log cannot be written: "
                             f"{error.strerror or error}\n")
            sys.stderr.flush()

    return handle_error
