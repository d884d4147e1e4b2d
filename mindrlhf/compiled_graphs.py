"""Compiled graphs of earlier runs, taken again where nothing that they were made of has changed.

MindSpore can keep what it has compiled (MS_COMPILER_CACHE_ENABLE), and takes it again for whatever is compiled as the
same one in order: another learning rate, another norm's epsilon or inputs of other shapes give the results of the first
run, without a word. Here a graph has a name made of all that goes into it, and MindSpore is shown the file of that
name, and no other, while it compiles that graph alone. What cannot be named is compiled as ever.

Imports MindSpore when a graph is compiled.
"""
import contextlib
import enum
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import types
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from mindrlhf.atomic import partial_file
from mindrlhf.errors import UserError
from mindrlhf.job import VARIABLES_OF_JOB, role_in_job
from mindrlhf.signals import removed_at_end

__all__ = ["Fingerprint", "KeepsGraphs", "Unnameable", "forget_cache_of_mindspore", "keep_graphs"]

_MOST = 64  # files that are kept; the least lately used ones go
_SUFFIX = ".graph"
_SWITCH, _PLACE = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"
_UNASKED = "MS_DEV_FORCE_USE_COMPILE_CACHE"  # else it takes none in a process that has once found none
# Where MindSpore looks, below the folder that it is told: role where the process is one of msrun's, number. In later
# releases than 2.5 the rank is a process's own.
_GRAPH = "rank_0/graph_cache/{}compile_cache_{}.mindir"
_WATCHED = ("mindspore", "mindformers", "mindrlhf")  # whose code is in a name; a graph with other code has none
_COMPILED = "_compiled_for"  # a cell's attribute: phases and inputs that it was compiled for
# A cell's own notes of time, names and what it has compiled; the rest of it makes the graph.
_NOTES_OF_CELLS = {
    _COMPILED, "_attr_synced", "_compile_args", "_compile_cache", "_compile_phase", "_compiled", "_create_time",
    "_exist_names", "_exist_objs", "_has_mutable_args_list", "_id", "_jit_graph_name", "_phase", "_phase_cache",
    "_scope", "arguments_key", "compile_cache", "exist_names", "exist_objs", "instance_count",
    "parameter_broadcast_done", "phase_cache", "saved_dynamic_shape", "sequence_modified", "sig"}
_FILLED_LATER = ("_lazy_", "_parameter_layout_dict")  # begin names: None, or empty once the cell has been compiled
_NOTES_OF_OPERATORS = {"N", "num"}  # how many inputs they have had; also among their `attrs`


class Unnameable(Exception):
    """A graph has something in it of which nothing is known but that it is there."""


def forget_cache_of_mindspore() -> Tuple[Optional[str], str]:
    """Switch MindSpore's own cache off.

    Returns:
        what its variables said: of the switch, None where it was not set, and of the folder
    """
    os.environ.pop(_UNASKED, None)
    return os.environ.pop(_SWITCH, None), os.environ.pop(_PLACE, "")


def keep_graphs(folder: Optional[Path], settings: Mapping[str, Any]) -> None:
    """Keep the graphs that this process compiles from now on, and take those that are kept.

    Args:
        folder:   of their files, made when there is one; None: no graph is kept any more
        settings: of the run: a graph is taken again for the same ones alone
    """
    global _store
    _store = folder and _Store(folder.absolute(), settings)


class KeepsGraphs:
    """For a `Cell` that is compiled by itself: its graphs are kept, if `keep_graphs` was called."""

    def compile(self, *args, **kwargs) -> None:
        """Compile for these inputs, or take the graph that is kept."""
        compiled = self.__dict__.setdefault(_COMPILED, set())
        inputs = _kinds_of(args, kwargs) if _store else None
        signature = (str(self.phase), bool(self.training), inputs)
        if inputs is None or signature in compiled:
            super().compile(*args, **kwargs)
            return
        compiled.add(signature)
        with contextlib.ExitStack() as stack:
            graph = None
            with _logged():
                kept = _store.folder / (_name_of_graph(_store.settings, signature, self) + _SUFFIX)
                graph = stack.enter_context(_cache_of_mindspore.showing(kept))
            super().compile(*args, **kwargs)
            if graph:
                with _logged():
                    graph.keep()


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """What fails inside, also MindSpore that reads a tensor, means no more than that a graph is compiled again."""
    try:
        yield
    except (OSError, UserError, Unnameable, RuntimeError, TypeError, ValueError) as error:
        from mindformers.tools.logger import logger
        logger.info("a compiled graph is not kept: %s", error)


class _CacheOfMindSpore:
    """The folder that MindSpore looks into, for ever the one that it was told first, and the number that it gives to
    the next graph that it compiles with its cache on.
    """

    def __init__(self):
        self._folder: Optional[Path] = None
        self._number = 0

    @contextlib.contextmanager
    def showing(self, kept: Path) -> Iterator["_Graph"]:
        """The cache is on inside, and has the graph of a file, if it is there and whole, and no other.

        Raises:
            OSError: there is no room for the folder.
        """
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mindrlhf-"))
        else:
            self._folder.mkdir(mode=0o700)
        from mindrlhf.compat.graph_cache import without_program
        with removed_at_end(self._folder), without_program():
            try:
                role = os.environ.get("MS_ROLE", "") if role_in_job() else ""
                graph = _Graph(kept, self._folder / _GRAPH.format(role, self._number))
                graph.lay_out()
                if _rank():
                    (self._folder / f"rank_{_rank()}").symlink_to("rank_0")
                os.environ.update({_SWITCH: "1", _PLACE: str(self._folder), _UNASKED: "1"})
                self._number += 1
                yield graph
            finally:
                forget_cache_of_mindspore()
                shutil.rmtree(self._folder, ignore_errors=True)


class _Graph(NamedTuple):
    """A graph's file where it is kept, and the one that MindSpore reads and writes."""

    kept: Path
    shown: Path

    def lay_out(self) -> None:
        """Show MindSpore what is kept, if it is there and whole."""
        self.shown.parent.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):
            content = self.kept.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                self.shown.write_bytes(content[32:])
                os.utime(self.kept)

    def keep(self) -> None:
        """Keep what MindSpore has written, in the place of what it did not take; the least lately used graphs go.

        Raises:
            OSError, UserError: it cannot be written.
        """
        if not self.shown.exists() or self._is_kept():
            return
        content = self.shown.read_bytes()
        with partial_file(self.kept) as path:
            path.write_bytes(hashlib.sha256(content).digest() + content)
        files = [path for path in self.kept.parent.glob("*" + _SUFFIX) if len(path.stem) == len(self.kept.stem)]
        for path in sorted(files, key=_last_used)[:-_MOST]:
            path.unlink(missing_ok=True)

    def _is_kept(self) -> bool:
        with contextlib.suppress(OSError):
            return self.kept.read_bytes()[32:] == self.shown.read_bytes()
        return False


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class _Store(NamedTuple):
    """Where graphs are kept, and for which settings of a run."""

    folder: Path
    settings: Mapping[str, Any]


_cache_of_mindspore = _CacheOfMindSpore()
_store: Optional[_Store] = None


def _kinds_of(args, kwargs) -> Optional[Tuple]:
    """Shapes and dtypes of a cell's inputs; None where some are not tensors."""
    if kwargs or not all(hasattr(value, "shape") and hasattr(value, "dtype") for value in args):
        return None
    return tuple((tuple(value.shape), str(value.dtype)) for value in args)


def _name_of_graph(settings: Mapping[str, Any], signature: Tuple, cell) -> str:
    """The same for graphs that compute the same.

    Raises:
        Unnameable: there is none.
    """
    import mindspore as ms
    parallel = [ms.get_auto_parallel_context(key) for key in ("parallel_mode", "device_num", "gradients_mean")]
    if parallel[0] not in ("stand_alone", "data_parallel"):
        raise Unnameable("a layout over several processes")
    name = Fingerprint()
    context = [ms.get_context(key) for key in ("mode", "device_target", "enable_graph_kernel")]
    for part in (settings, _releases(), _sources(_WATCHED), context, parallel, _rank(), signature, cell):
        name.add(part)
    return name.hexdigest()


def _rank() -> int:
    """The number of this process in its job."""
    from mindformers.tools.utils import get_real_rank
    return get_real_rank()


@functools.cache
def _releases() -> Tuple[str, ...]:
    import mindspore
    return platform.python_version(), np.__version__, mindspore.__version__, metadata.version("mindformers")


@functools.cache
def _sources(packages: Tuple[str, ...]) -> str:
    """Checksum of the names, sizes and times of all files of code of packages, and of MindSpore's variables, but for
    those of the job, and for how long its processes wait for each other.
    """
    found = [sorted((name, value) for name, value in os.environ.items()
                    if name.startswith("MS_") and not name.endswith("_TIMEOUT") and name not in VARIABLES_OF_JOB)]
    for package in packages:
        for folder, _, _ in os.walk(os.path.dirname(sys.modules[package].__file__)):
            with os.scandir(folder) as entries:
                found.append(sorted((entry.path, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries
                                    if entry.name.endswith((".py", ".so"))))
    return hashlib.sha256(repr(sorted(found)).encode("utf-8", "surrogatepass")).hexdigest()


class Fingerprint:
    """Checksum of whatever a graph is made of: values, arrays, functions with what they enclose, and cells and other
    objects with all of their attributes. Of a parameter all but its value counts: it is an input of the graph.
    """

    def __init__(self):
        self._sum = hashlib.sha256()
        self._known: Dict[int, Tuple[int, Any]] = {}  # id -> (place in the order, the object, which keeps its id)

    def hexdigest(self) -> str:
        """Of what was added so far, 64 characters."""
        return self._sum.hexdigest()

    def add(self, value: Any) -> None:
        """Add a value.

        Raises:
            Unnameable: it has something in it whose content is hidden.
        """
        kind = type(value)
        if value is None or kind in (bool, int, float, complex, str, bytes):
            self._note(kind.__name__, repr(value))
        elif isinstance(value, (enum.Enum, np.generic, np.dtype, Path)):
            self._note(_name_of(kind), repr(value))
        elif isinstance(value, type):
            self._note("class", _name_of(value))
        elif id(value) in self._known:
            self._note("again", str(self._known[id(value)][0]))
        else:
            self._known[id(value)] = len(self._known), value
            self._add_object(kind, value)

    def _note(self, *texts: str) -> None:
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            self._sum.update(len(content).to_bytes(8, "little") + content)

    def _add_object(self, kind: type, value: Any) -> None:
        from mindspore import Parameter, Tensor
        self._note(_name_of(kind))
        if isinstance(value, (list, tuple)):
            self._add_all(value)
        elif isinstance(value, Mapping):
            self._add_all([part for item in value.items() for part in item])
        elif isinstance(value, (set, frozenset)):
            if not all(isinstance(part, (str, int, float, bytes)) for part in value):
                raise Unnameable(f"a set of {kind.__name__}")
            self._add_all(sorted(value, key=repr))
        elif isinstance(value, np.ndarray):
            self._note(str(value.dtype), str(value.shape), hashlib.sha256(np.ascontiguousarray(value)).hexdigest())
        elif isinstance(value, Parameter):
            self._note(value.name, str(value.dtype), str(value.shape), str(value.requires_grad))
        elif isinstance(value, Tensor):
            self._note(str(value.dtype), str(value.shape))
            if value.has_init:
                raise Unnameable("a tensor that has no value yet")
            array = value.asnumpy() if "BFloat16" not in str(value.dtype) else value.float().asnumpy()
            self._note(hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
        elif isinstance(value, functools.partial):
            self._add_all([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            self._add_all([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            if not _is_watched(value.__module__):
                raise Unnameable(f"the function {value.__module__}.{value.__qualname__}")
            self._note(value.__module__, value.__qualname__)
            self._add_all([value.__defaults__, value.__kwdefaults__,
                           [cell.cell_contents for cell in value.__closure__ or ()]])
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            self._note(value.__name__)
        else:
            self._add_attributes(kind, value)

    def _add_all(self, values) -> None:
        self._note(str(len(values)))
        for value in values:
            self.add(value)

    def _add_attributes(self, kind: type, value: Any) -> None:
        from mindspore import nn
        from mindspore.ops import Primitive
        if kind.__module__.endswith(".typing"):  # MindSpore's dtypes
            self._note(str(value))
            return
        if not hasattr(value, "__dict__") or not _is_watched(kind.__module__):
            raise Unnameable(f"an object of {_name_of(kind)}")
        left_out = (_NOTES_OF_CELLS if isinstance(value, nn.Cell) else
                    _NOTES_OF_OPERATORS if isinstance(value, Primitive) else ())
        attributes = dict(vars(value))
        if isinstance(value, Primitive):
            attributes["attrs"] = {name: part for name, part in sorted(value.attrs.items()) if name not in left_out}
        for name in left_out:
            attributes.pop(name, None)
        for name in attributes:
            if name.startswith(_FILLED_LATER):
                attributes[name] = attributes[name] or None
        self._add_all([part for item in attributes.items() for part in item])


def _is_watched(module: Optional[str]) -> bool:
    return str(module).partition(".")[0] in _WATCHED


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
