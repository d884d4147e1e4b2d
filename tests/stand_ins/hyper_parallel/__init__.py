"""Stands in for hyper_parallel, which MindFormers imports since 2.0 and no package registry has.

Static graphs never call it. Each of its modules can be imported, and each name from them: a class that raises when it
is called, but for the few that MindFormers calls while it is imported.
"""
import importlib.abc
import importlib.machinery
import sys
import types

CALLED_ON_IMPORT = ("get_platform", "Replicate", "Shard")


class _Absent(type):
    """The type of each name: a class, for some are inherited from, named in annotations or asked about."""

    def __call__(cls, *args, **kwargs):
        if cls.__name__ in CALLED_ON_IMPORT:
            return _Module(f"{cls.__module__}.{cls.__name__}")
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__}: the tests' stand-in cannot run it")


def _absent(module, name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name, (), {"__module__": module})


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        setattr(self, name, _absent(self.__name__, name))
        return vars(self)[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below this one."""

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(__name__ + "."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        """Nothing to run."""


def __getattr__(name):
    return _absent(__name__, name)


sys.meta_path.append(_Finder())
