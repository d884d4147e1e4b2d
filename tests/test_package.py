"""What holds for the package as a whole.

| test                                   | proves                                                  | judged against |
| test_all_lists_what_is_public          | `__all__` has every public class and function, once     | the syntax     |
| test_rooms_import_from_below_only      | no room imports one that stands above it on the map     | the syntax     |
| test_what_is_imported_from_it_is_there | also by scripts and tests that seldom run               | the syntax     |
| test_plans_need_no_mindspore           | no import of MindSpore before a check; of tensorboardX  | sys.modules    |
| test_json_is_written_strictly          | no NaN and no infinity, which JSON does not have        | the syntax     |
"""
import ast
import functools
import itertools
import re
import subprocess
import symtable
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mindrlhf"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_all_lists_what_is_public(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    listed = next(ast.literal_eval(node.value) for node in body
                  if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
    public = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              if not node.name.startswith("_")}
    assert len(listed) == len(set(listed))
    assert public - set(listed) == set()


def test_rooms_import_from_below_only():
    """Rooms are the folders, and what lies beside them is one of its own."""
    rooms = re.findall(r"^\| \*\*`(\w+)/`\*\*", (PACKAGE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(rooms)
    wrong = []
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mindrlhf."):
                other = node.module.split(".")[1]
                if room in rooms and other in rooms and rooms.index(other) < rooms.index(room):
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {node.module}")
    assert wrong == []


@functools.cache
def names_of(module):
    """What can be imported from a module of the package; empty where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.exists():
        return set()
    symbols = symtable.symtable(source.read_text(encoding="utf-8"), str(source), "exec").get_symbols()
    modules = {inner.stem for inner in path.iterdir()} if path.is_dir() else set()
    return modules | {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def test_what_is_imported_from_it_is_there():
    wrong, found = [], 0
    folders = [ROOT / name for name in ("mindrlhf", "examples", "scripts", "tests")]
    for path in itertools.chain(*(folder.rglob("*.py") for folder in folders)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mindrlhf":
                found += len(node.names)
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}" for alias in node.names
                          if alias.name not in names_of(node.module)]
    assert wrong == []
    assert found > 500


@pytest.mark.parametrize("module", ["data.conversion_plan", "training.plan", "training.memory", "scoring.plan",
                                    "huggingface.convert"])
def test_plans_need_no_mindspore(module):
    code = (f"import sys, mindrlhf.{module}; "
            "sys.exit(any(name in sys.modules for name in ('mindspore', 'mindformers', 'tensorboardX')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_json_is_written_strictly():
    """Python's `json` writes NaN as NaN unless it is told not to; other readers refuse the file."""
    wrong = [f"{path.relative_to(ROOT)}:{node.lineno}"
             for path in (*MODULES, *(ROOT / "examples").rglob("*.py"), *(ROOT / "scripts").glob("*.py"))
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")
             and "allow_nan=False" not in map(ast.unparse, node.keywords)]
    assert wrong == []
