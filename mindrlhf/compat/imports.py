"""MindFormers without what its package imports and no reward model uses. Tests: tests/compat/test_imports.py."""
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

__all__ = ["import_mindformers"]

# Metrics of texts (jieba, and until MindFormers 1.9 nltk, which imports parts of scipy), data from a hub (datasets,
# which imports pandas and aiohttp), and scipy, which a metric and a data set of MindSpore use: on MindFormers 1.9 these
# take 1.9 of an import's 3.8 seconds of processor time, and 125 MB a process.
PUT_OFF = ("nltk", "datasets", "jieba", "scipy")


def import_mindformers() -> None:
    """Import MindFormers; packages in `PUT_OFF` are imported when one of their functions is called, or by others.

    What is imported stays, so that no collection of garbage looks at it again: each would pass through 300,000 objects,
    and MindSpore collects at every compilation. An import and a first compilation take a sixth less processor time.
    """
    if "mindformers" in sys.modules:
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    collects = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module("mindformers")
    finally:
        gc.freeze()
        if collects:
            gc.enable()
        sys.meta_path.remove(finder)
        for module in finder.made:
            module.is_put_off = False
            sys.modules.pop(module.__name__, None)  # whoever else imports it gets the package itself


class _PutOff(types.ModuleType):
    """Stands for a package in the modules that import it meanwhile, and afterwards has the package's attributes."""

    is_put_off = True

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if not self.is_put_off:
            return getattr(importlib.import_module(self.__name__), name)

        def later(*arguments, **keywords):  # of `from package import name`, also where it is a class
            return getattr(importlib.import_module(self.__name__), name)(*arguments, **keywords)

        return later


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages in `PUT_OFF`, where they are not imported yet."""

    def __init__(self):
        self._names = tuple(name for name in PUT_OFF if name not in sys.modules)
        self.made = []

    def find_spec(self, fullname, path=None, target=None):
        """A spec for a package in `PUT_OFF` or a module in one; None for all others."""
        if fullname.split(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        """A module that stands for the package."""
        self.made.append(_PutOff(spec.name))
        return self.made[-1]

    def exec_module(self, module):
        """Nothing: it is imported later."""
