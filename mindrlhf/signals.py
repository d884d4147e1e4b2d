"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: whoever is asked to end does so, at any moment, with exit code 128 + the signal.

Python runs handlers in its main thread, which may be inside MindSpore for minutes; an exception that a handler raises
there may be lost, and MindSpore puts a handler of its own in the place of Ctrl-C's in every graph that it runs. So
threads listen here, and end the process without the main one.
"""
import atexit
import contextlib
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Iterator, List, Optional

from mindrlhf.job import tell_launcher, uses_mpi

__all__ = ["SIGNALS", "Interrupted", "asked", "let_go", "note", "postpone", "removed_at_end", "settle", "take_over",
           "undisturbed", "wait_for_end"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 10  # seconds until a process ends though its unfinished files could not be removed

_taken_over = _received = _postponed = False
_asked: Optional[int] = None
_code: Optional[int] = None  # that the process ends with, once its work is over
_unfinished: List[Path] = []
_moving = threading.RLock()  # held while files get their final names
_ending = threading.Event()


class Interrupted(Exception):
    """The work has ended early and in good order, because a signal asked for it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


def take_over() -> None:
    """Answer the signals from now on. Those that are ignored (nohup, a shell's background) stay so."""
    global _taken_over
    _taken_over = True
    answered = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if signal.SIGINT in answered:
        # Blocked, it reaches no handler, whoever puts one in. The others are not blocked: processes that are started
        # from here inherit that, and could not be terminated.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        threading.Thread(target=_listen_for_interrupts, daemon=True).start()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to at once, unlike a handler's call
    for number in answered:  # Ctrl-C too: `multiprocessing` lets it through again
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_listen_for_others, args=(reader,), daemon=True).start()
    atexit.register(_leave)  # the first to be registered is the last to be called
    os.register_at_fork(after_in_child=_let_go_of_all)  # else the pipe would tell the parent of a child's signals


def let_go(code: object) -> None:
    """The work is over with this exit code, and no signal is postponed: SIGTERM and SIGHUP are the kernel's again, and
    end the process even if MindSpore hangs in its atexit function.

    Ctrl-C is answered until atexit functions have been called: MindSpore puts its handler, which makes SIGTERM of it,
    in there too. Nothing comes after them, see `_leave`.
    """
    global _postponed, _received, _code
    _postponed = _received = False
    code = 0 if code is None else code
    _code = code if isinstance(code, int) else None  # what else `sys.exit` takes, it has to print
    if _taken_over:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a library may have let it through again
        signal.set_wakeup_fd(-1)
        _give_back(signal.SIGTERM, signal.SIGHUP)
    if _code is not None:
        tell_launcher(_code)


def postpone() -> None:
    """From now on a signal only leaves its number in `asked`, for the work to end in good order; a second Ctrl-C ends
    it at once. `settle` ends that.
    """
    global _postponed
    _postponed = True


def asked() -> int:
    """The signal that asks this work to end; 0 if none does."""
    return _asked or 0


def note(number: int) -> None:
    """Another process of the job was asked to end."""
    global _asked
    _asked = _asked or number


def settle() -> None:
    """The work is in good order again: signals end the process at once, as does one that was postponed.

    Raises:
        Interrupted: one was.
    """
    global _postponed
    _postponed = False
    wait_for_end()
    if _asked:
        raise Interrupted(_asked)


def wait_for_end() -> None:
    """Return at once, unless a thread ends the process in this moment."""
    if _ending.is_set():
        threading.Event().wait()


@contextlib.contextmanager
def removed_at_end(folder: Path) -> Iterator[None]:
    """Inside, a signal that ends the process removes an unfinished folder first."""
    _unfinished.append(folder)
    try:
        yield
    finally:
        _unfinished.remove(folder)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A moment in which no signal ends the process: files that belong together get their names."""
    with _moving:
        yield


def _leave() -> None:
    """The last that Python calls: end the process here.

    MindSpore has taken itself down by now, in an atexit function of its own. What would follow frees memory, for a
    second, as the kernel does at once; and at its end a thread of MindSpore puts Python's handler of Ctrl-C back when
    there is no Python any more, so that Ctrl-C ended in a segmentation fault.
    """
    import ctypes
    _ending.wait(0.02)  # MindSpore has kept all threads from running, also one that a signal has woken
    wait_for_end()
    if _code is None:  # no work was begun
        _let_go_of_all()
        return
    if uses_mpi():  # MindSpore takes leave of mpirun behind Python's end, else the job has failed; Ctrl-C stays blocked
        return
    _moving.acquire()  # from now on no thread says that a signal ends the process
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what C libraries have not written yet
    os._exit(_code)


def _let_go_of_all() -> None:
    signal.set_wakeup_fd(-1)
    _give_back(*SIGNALS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _give_back(*numbers: int) -> None:
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _listen_for_interrupts() -> None:
    while True:
        _answer(signal.sigwait({signal.SIGINT}))


def _listen_for_others(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in SIGNALS:
                _answer(number)


def _answer(number: int) -> None:
    """End the process, or leave it to the work. Managers of clusters send SIGTERM more than once, to several processes:
    only Ctrl-C is the second time meant differently.
    """
    global _asked, _received
    again, _received, _asked = _received, True, _asked or number
    if again and number == signal.SIGINT:
        os._exit(128 + number)
    if not again and not _postponed:
        _ending.set()
        threading.Thread(target=_end, args=(number,), daemon=True).start()
    elif not again:
        _say(f"{signal.Signals(number).name}: ends after this step, with a checkpoint; Ctrl-C ends it at once")


def _end(number: int) -> None:
    tidying = threading.Thread(target=_tidy_up, args=(number,), daemon=True)
    tidying.start()
    tidying.join(_PATIENCE)
    _say(f"stopped by {signal.Signals(number).name}; unfinished files may be left")
    os._exit(128 + number)


def _tidy_up(number: int) -> None:
    with _moving:
        multiprocessing = sys.modules.get("multiprocessing")
        for child in multiprocessing.active_children() if multiprocessing else ():
            child.kill()
            child.join(1)
        logging = sys.modules.get("logging")
        if logging:
            logging.disable()  # what cannot go on without its files is this signal's doing, and would be said in vain
        for folder in reversed(_unfinished):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)  # what a thread has written meanwhile
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        _say(f"stopped by {signal.Signals(number).name}")
        os._exit(128 + number)  # with the lock: nothing more is moved


def _say(text: str) -> None:
    # The terminal's ^C, or a progress bar, may be on the line.
    begin = "\n" if getattr(sys.stderr, "in_line", False) or os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{begin}{os.path.basename(sys.argv[0])}: {text}\n".encode(errors="backslashreplace"))
