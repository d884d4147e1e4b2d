"""MindSpore's cache of compiled graphs, for a program that is no file. Tests: tests/test_compiled_graphs.py."""
import contextlib
import sys
from typing import Iterator

from mindspore.nn import cell

import mindrlhf

__all__ = ["without_program"]


@contextlib.contextmanager
def without_program() -> Iterator[None]:
    """MindSpore reads the sources of the program when it compiles with its cache on, to see whether they have changed.
    `python -c`, a notebook or another program's worker has none, and compiling ends with FileNotFoundError. Inside, it
    reads a file that imports nothing.
    """
    compiler = sys.modules[type(cell._cell_graph_executor).__module__]
    program, compiler.entry_script_path = compiler.entry_script_path, mindrlhf.__file__
    try:
        yield
    finally:
        compiler.entry_script_path = program
