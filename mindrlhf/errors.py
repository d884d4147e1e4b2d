"""Errors that the user can mend: one line each, no traceback, a non-zero exit code."""
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Callable, Iterable, List

from mindrlhf import entry, signals

__all__ = ["Problems", "UserError", "raise_each", "raise_problems", "run_main", "some"]

_LONGEST = 2000  # characters of a message


class UserError(Exception):
    """Something the user gave is wrong, or several things.

    A message is one line that says where (file and line, or key), what was found and what was expected.

    Attributes:
        code: the exit code that it ends an entry script with
    """

    code = 1

    def __init__(self, *messages: str):
        self.messages = [_one_line(str(message)) for message in messages]
        super().__init__("\n".join(self.messages))


def _one_line(text: str) -> str:
    r"""`text` as one line that a terminal shows and does not obey, whatever a file gave to it; cut if it is long.

    >>> print(_one_line("found 'a\x1b[2J\n b'"))
    found 'a\x1b[2J b'
    """
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST * 3 // 4]} ... {text[-_LONGEST // 4:]}"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def raise_problems(where: str, problems: Iterable[str]) -> None:
    """Raise one `UserError` that lists all problems of a place in a line, or return if there are none."""
    problems = list(problems)
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))


def raise_each(where: str, problems: Iterable[str]) -> None:
    """Raise one `UserError` with a line for each problem of a place, or return if there are none."""
    messages = [f"{where}: {problem}" for problem in problems]
    if messages:
        raise UserError(*messages)


class Problems:
    """Collects the errors of several checks, so that the user is told of all of them at once.

    >>> problems = Problems()
    >>> with problems:
    ...     raise UserError("a flag is wrong")
    >>> with problems:
    ...     raise UserError("a key is wrong", "so is another")
    >>> problems.found
    ['a flag is wrong', 'a key is wrong', 'so is another']
    """

    def __init__(self):
        self.found: List[str] = []

    def __enter__(self) -> "Problems":
        return self

    def __exit__(self, kind, error, _traceback) -> bool:
        if isinstance(error, UserError):
            self.found += [message for message in error.messages if message not in self.found]
        return isinstance(error, UserError)

    def raise_all(self) -> None:
        """Raise one `UserError` with everything that was found, or return if there is nothing."""
        if self.found:
            raise UserError(*self.found)


def some(names: Iterable[object], separator: str = ", ", limit: int = 4) -> str:
    """The first few of `names` and how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    names = [str(name) for name in names]
    text = separator.join(names[:limit]) or "nothing"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def run_main(main: Callable[[], int]) -> None:
    """Run an entry script's `main` and end the process with its exit code.

    A `UserError` is printed on standard error, a line for each problem and their number if there are several, and ends
    with its exit code, mostly 1; a failed system call on a file (no space left, no permission) ends with 1 too, since
    it is the machine's state and not a fault of the program, and so does a package that is missing: the environment is
    not active. Work that a signal has ended early ends with 128 + its number. Anything else is a fault of the program
    and keeps its traceback.
    """
    code: object = 1  # with a traceback
    try:
        code = _code_of(main)
    finally:
        signals.let_go(code)
    sys.exit(code)


def _code_of(main: Callable[[], int]) -> object:
    """The exit code of `main`, or of what it raises, which is said; a fault of the program is raised again."""
    try:
        code = _run(main)
    except UserError as error:
        code = _report(*error.messages, code=error.code)
    except SystemExit as end:  # argparse's
        code = end.code
    except (signals.Interrupted, KeyboardInterrupt) as ended:
        interrupted = ended if isinstance(ended, signals.Interrupted) else signals.Interrupted(signal.SIGINT)
        code = interrupted.code
        print(f"{os.path.basename(sys.argv[0])}: {interrupted}", file=sys.stderr)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name in ("", "mindrlhf"):
            raise
        code = _report(_how_to_have(name))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        name = f"{error.filename}: " if error.filename else ""
        code = _report(f"{name}{error.strerror or error}")
    sys.stdout.flush()
    lost = entry.lost_output()
    if lost and not code:
        code = _report(f"standard output: {lost.strerror}")
    return code


def _run(main: Callable[[], int]) -> int:
    """`main`'s exit code; whatever it raises while a signal ends the process is that signal's doing."""
    try:
        _check_names()
        _check_temporary_folder()
        code = main()
    except BaseException:
        signals.wait_for_end()
        raise
    signals.settle()
    return code


def _check_names() -> None:
    """MindSpore and JSON take no names but those in UTF-8, and no folder that was removed."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed, expected one that is there: cd to another") from None
    arguments = {f"argument {place}": text for place, text in enumerate(sys.argv[1:], start=1)}
    for what, text in {"the current folder": folder, **arguments}.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{what}: found {text!r}, whose bytes are not UTF-8; expected a name in UTF-8: rename the "
                            "file or folder") from None


def _check_temporary_folder() -> None:
    """An import of MindSpore needs one, and says it in several tracebacks."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}: no file can be written there; free some space, or set TMPDIR to a folder "
                        "with some") from None


def _how_to_have(package: str) -> str:
    """Which command activates or makes the environment in which a package is."""
    root = Path(__file__).resolve().parent.parent
    missing = f"{package} is not installed in {sys.prefix}: "
    active = root / ".venv" / "bin" / "activate"
    if active.exists() and Path(sys.prefix).resolve() != active.parent.parent.resolve():
        return missing + f"activate the project's environment first: source {active}"
    if package in ("mindspore", "mindformers"):
        return missing + ("pip install -e '.[cpu]' in the project's folder installs the pair of releases for a CPU; "
                          "README, \"Versions\", has the others")
    return missing + f"bash {root}/scripts/quickstart.sh makes an environment with it, source {active} activates it"


def _report(*messages: object, code: int = 1) -> int:
    name = os.path.basename(sys.argv[0])
    for message in messages:
        print(f"{name}: error: {message}", file=sys.stderr)
    if len(messages) > 1:
        print(f"{name}: {len(messages)} problems", file=sys.stderr)
    sys.stderr.flush()
    return code
