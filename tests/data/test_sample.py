"""The bundled sample: its scripts write its very bytes, and it suits the tiny YAML that goes with it.

| test                                     | proves                                      | judged against         |
| test_scripts_write_the_committed_bytes   | nothing in the sample was edited by hand    | the committed files    |
| test_train_and_test_share_no_question    | what is held out was never trained on       | sets of questions      |
| test_every_kind_of_pair_is_in_both_files | the three pairs of types, in equal numbers  | literal names          |
| test_no_sample_is_cut_in_the_tiny_run    | a sample fits into the YAML's seq_length    | seq_length of the YAML |
| test_tiny_yaml_fits_the_tokenizer        | pad id and vocabulary of YAML and tokenizer | number of lines, 996   |
"""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mindrlhf.data.preference import InvalidRow, read_preferences
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "glm4_reward_model_train" / "sample_data"
FILES = ("train.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def rows():
    """File name -> its rows."""
    return {name: [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]
            for name in FILES}


@pytest.fixture(scope="module")
def tiny_config():
    path = ROOT / "model_configs" / "glm_config" / "run_glm4_tiny_rm_cpu.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.process
def test_scripts_write_the_committed_bytes(tmp_path):
    """make_tokenizer.py reads the train.jsonl that make_sample.py has written beside it."""
    for script, names in (("make_sample.py", FILES), ("make_tokenizer.py", ["tokenizer.model"])):
        subprocess.run([sys.executable, str(SAMPLE / script), str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
        for name in names:
            assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), name


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 375), ("test.jsonl", 93)])
def test_file_has_a_few_hundred_usable_pairs(name, count):
    pairs = list(read_preferences(SAMPLE / name))
    assert len(pairs) == count
    assert not [pair for pair in pairs if isinstance(pair, InvalidRow)]


def test_train_and_test_share_no_question(rows):
    train, test = ({row["prompt"] for row in rows[name]} for name in FILES)
    assert train & test == set()
    assert (len(train), len(test)) == (125, 31)


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_pair_is_in_both_files(rows, name):
    kinds = Counter((row["pos_type"], row["neg_type"]) for row in rows[name])
    third = len(rows[name]) // 3
    assert kinds == {("拒绝&正向建议", "拒绝为主"): third, ("拒绝&正向建议", "风险回复"): third,
                     ("拒绝为主", "风险回复"): third}


@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_layout_of_cvalues_comparison(rows, name):
    for row in rows[name]:
        assert list(row) == ["prompt", "pos_resp", "neg_resp", "pos_type", "neg_type"]
        assert row["pos_resp"] != row["neg_resp"]


@pytest.mark.parametrize("name", FILES)
def test_no_sample_is_cut_in_the_tiny_run(rows, tiny_config, name):
    texts = [render(PROMPT_TEMPLATE, row["prompt"], row[side])
             for row in rows[name] for side in ("pos_resp", "neg_resp")]
    longest = max(map(len, open_tokenizer(SAMPLE / "tokenizer.model").encode_batch(texts)))
    assert tiny_config["model"]["model_config"]["seq_length"] == 128
    assert 1 < longest <= 128


def test_tiny_yaml_fits_the_tokenizer(tiny_config):
    model = tiny_config["model"]["model_config"]
    ranks = len((SAMPLE / "tokenizer.model").read_bytes().splitlines())
    assert ranks == 996
    assert model["pad_token_id"] == model["eos_token_id"] == ranks  # <|endoftext|> is the first id after the ranks
    assert tiny_config["train_dataset"]["pad_token_id"] == tiny_config["eval_dataset"]["pad_token_id"] == ranks
    assert model["padded_vocab_size"] >= ranks + 14
