"""Errors that are the user's to mend: one line, no traceback, a non-zero exit code."""
import os
import sys
from typing import Callable, Iterable


class UserError(Exception):
    """Something the user gave is wrong.

    The message is one line that says where (file and line, or key), what was found and what was expected.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def raise_problems(where: str, problems: Iterable[str]) -> None:
    """Raise one `UserError` that lists all problems of a place, or return if there are none."""
    problems = list(problems)
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))


def some(names: Iterable[object], separator: str = ", ", limit: int = 4) -> str:
    """The first few of `names` and how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    names = [str(name) for name in names]
    text = separator.join(names[:limit]) or "nothing"
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def run(main: Callable[[], int]) -> None:
    """Run an entry script's `main` and end the process with its exit code.

    A `UserError` is printed as one line on standard error and ends with exit code 1; a failed system call on a file
    (no space left, no permission) does too, since it is the machine's state and not a fault of the program.
    Anything else is a fault of the program and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        code = _report(str(error))
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        name = f"{error.filename}: " if error.filename else ""
        code = _report(f"{name}{error.strerror or error}")
    sys.stdout.flush()
    sys.exit(code)


def _report(message: str, code: int = 1) -> int:
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    return code
