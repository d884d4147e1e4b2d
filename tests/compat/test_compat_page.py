"""The page on what this project needs of MindFormers says what the code imports. Needs neither of the stack.

| test                              | proves                                                 | judged against         |
| test_the_table_of_imports_is_...  | each name, and each file that uses it, and no other    | the package's syntax   |
| test_what_is_mended_has_its_row   | each function of compat/ is in the second table        | `__all__` of its files |
"""
import ast
import re

from conftest import ROOT

PACKAGE = ROOT / "mindrlhf"
PAGE = (PACKAGE / "compat" / "README.md").read_text(encoding="utf-8")


def imports_of_mindformers():
    """{name with its module: files}, wherever in a file the import is."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.split(".")[0] == "mindformers":
                    found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    return found


def test_the_table_of_imports_is_that_of_the_code():
    rows = re.findall(r"^\| `(mindformers[\w.]*)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    assert {name: set(re.findall("`(.+?)`", files)) for name, files in rows} == imports_of_mindformers()


def test_what_is_mended_has_its_row():
    only_asked = {"on_ascend", "on_whole_cpu", "rounded", "DETAIL", "STEP", "shows_bar"}
    for path in sorted((PACKAGE / "compat").glob("[a-z]*.py")):
        names = next(ast.literal_eval(node.value) for node in ast.parse(path.read_text(encoding="utf-8")).body
                     if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
        for name in set(names) - only_asked:
            assert re.search(rf"^\| `{path.name}` `{name}`", PAGE, re.MULTILINE), name
