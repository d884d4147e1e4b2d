"""MindFormers is imported without packages that no reward model uses, and has them where they are asked for.

| test                                     | proves                                                 | judged against  |
| test_mindformers_is_imported_without_... | none is loaded; each name is the package's when called | nltk, datasets  |
| test_mindformers_itself_imports_...      | why it is done                                         | a plain import  |
"""
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT

from mindrlhf.compat import imports

pytestmark = [pytest.mark.stack, pytest.mark.process]


def run(code, folder):
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False,
                            env={**ENVIRONMENT, "LOG_MF_PATH": str(folder)})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_mindformers_is_imported_without_them_and_has_them_where_they_are_asked_for(tmp_path):
    assert run("""
import importlib.util
import sys
from mindrlhf.compat.imports import PUT_OFF, import_mindformers
import_mindformers()
import_mindformers()
assert not [name for name in sys.modules if name.split(".")[0] in PUT_OFF]

from mindformers.core.metric import metric
words = [str(number) for number in range(9)]
if importlib.util.find_spec("nltk"):  # until MindFormers 1.9
    smooth = metric.SmoothingFunction().method3
    assert metric.sentence_bleu([words], words[:-1], smoothing_function=smooth) < 1
    assert metric.sentence_bleu([words], words, smoothing_function=smooth) == 1
    import nltk
    assert nltk.__file__ and nltk.translate.bleu_score.sentence_bleu([words], words) == 1
assert metric.jieba.lcut("北京") == ["北京"]

import datasets
assert issubclass(datasets.Dataset, object) and datasets.__version__
loader = sys.modules.get("mindformers.dataset.dataloader.hf_dataloader")  # since MindFormers 1.7
if loader:
    assert loader.datasets.Dataset is datasets.Dataset
    assert loader.split_dataset_by_node(datasets.Dataset.from_dict({"a": [1, 2]}), 1, 2)[0] == {"a": 2}
print("done")
""", tmp_path) == "done"


def test_mindformers_itself_imports_them(tmp_path):
    loaded = run("import sys, mindformers; print(*sys.modules)", tmp_path).split()
    assert set(imports.PUT_OFF) & set(loaded)
