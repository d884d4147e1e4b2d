"""transformers' tokenizer.json: the ids of the rank file that it was made of; what a release cannot honour is refused.

| test                                      | proves                                           | judged against        |
| test_ids_equal_those_of_the_rank_file     | our own export is read, on any release           | tiktoken              |
| test_control_tokens_in_a_text_are_text    | none of their ids comes out of a text            | the rank file's ids   |
| test_it_is_the_rank_file_of_training      | checksum, pad id, vocabulary, control tokens     | the rank file's       |
| test_ignore_merges_that_...               | tried, not looked up: ids are right, or a refusal| ids by hand           |
| test_merges_that_cannot_be_read_...       | likewise                                         | ids by hand, message  |
| test_a_file_that_is_none_is_refused       | FILE: found, expected                            | messages              |
"""
import hashlib
import json
from pathlib import Path

import pytest

from mindrlhf.data.template import GLM4_CHAT, TextTemplate, read_template
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, open_tokenizer, write_rank_file
from mindrlhf.errors import UserError
from mindrlhf.huggingface.tokenizer_files import tokenizer_config, tokenizer_json

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "glm4_reward_model_train" / "sample_data"
SHARED = ROOT.parent / "shared" / "data"
FILES = {"sample": (SAMPLE / "tokenizer.model", False), "sample, marked": (SAMPLE / "tokenizer.model", True),
         "full": (SHARED / "tokenizer.model", True)}
TEXTS = ["我不会提供任何帮助。",
         "What's the answer? I'll tell you: it's 42.", "émigré naïve Ünïcödé", "0 12 345 6789", "",
         " ", "a\n\n\r\n\tb  \n ", "中文 mixed 英文，100%！", "\ufdd0a\ufdd0", "\N{GRINNING FACE}\ufeff\uffff\x00"]


def export(folder, path, marked=False, **changed):
    """tokenizer.json of a rank file, with keys of its model changed; returns its path."""
    ours = open_tokenizer(path)
    content = tokenizer_json(ours, marked)
    content["model"].update(changed)
    template = read_template(GLM4_CHAT) if marked else TextTemplate("{prompt}{response}")
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(ours, ours.pad_token_id, 64, template)))
    return folder / "tokenizer.json"


def ids_or_refusal(path, text):
    try:
        return open_tokenizer(path).encode_batch([text])[0]
    except UserError as error:
        return str(error)


def texts_of_sample():
    rows = [json.loads(line) for line in (SAMPLE / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in rows for key in ("prompt", "pos_resp", "neg_resp")]


@pytest.mark.parametrize("name", ["sample", "sample, marked", pytest.param("full", marks=[
    pytest.mark.further, pytest.mark.skipif(not FILES["full"][0].is_file(),
                                            reason="needs ../shared/data/tokenizer.model")])])
def test_ids_equal_those_of_the_rank_file(tmp_path, name):
    path, marked = FILES[name]
    ours, theirs = open_tokenizer(path), open_tokenizer(export(tmp_path, path, marked).parent)
    texts = [*TEXTS, *texts_of_sample()]
    assert theirs.path == tmp_path / "tokenizer.json"
    found = theirs.encode_batch(texts)
    assert found == ours.encode_batch(texts)
    control = list(ours.control_ids.values())[:2]
    assert [theirs.decode([*control, *ids]) for ids in found] == [f"<|endoftext|>[MASK]{text}" for text in texts]


@pytest.mark.parametrize("token", GLM4_SPECIAL_TOKENS)
def test_control_tokens_in_a_text_are_text(tmp_path, token):
    path = SAMPLE / "tokenizer.model"
    texts = [token, f"a {token} b", token * 3]
    assert open_tokenizer(export(tmp_path, path)).encode_batch(texts) == open_tokenizer(path).encode_batch(texts)


def test_it_is_the_rank_file_of_training(tmp_path):
    path = SAMPLE / "tokenizer.model"
    theirs = open_tokenizer(export(tmp_path, path))
    assert theirs.identity == {"file": "tokenizer.json", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (theirs.pad_token_id, theirs.vocab_size) == (996, 1010)
    assert theirs.control_ids == dict(zip(GLM4_SPECIAL_TOKENS, range(996, 1010)))
    content = (tmp_path / "tokenizer.json").read_text().replace("{1,3}", "{1,2}")
    (tmp_path / "tokenizer.json").write_text(content)
    assert open_tokenizer(tmp_path).sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_rank_file_of_a_folder_comes_first(tmp_path):
    export(tmp_path, SAMPLE / "tokenizer.model")
    write_rank_file(tmp_path / "tokenizer.model", [bytes([value]) for value in range(256)])
    assert open_tokenizer(tmp_path).vocab_size == 256 + 14


def test_ignore_merges_that_is_not_obeyed_is_refused(tmp_path):
    """"abc" is a token that no merge leads to; taken whole, it is its rank."""
    write_rank_file(tmp_path / "ranks", [*(bytes([value]) for value in range(256)), b"abc"])
    path = export(tmp_path, tmp_path / "ranks", ignore_merges=True)
    found = ids_or_refusal(path, "abc")
    assert found == [256] or (
        found.startswith(f"{path}: the installed tokenizers ")
        and " knows nothing of ignore_merges and gives 'abc' the ids [97, 98, 99], expected [256]; " in found)


def test_merges_that_cannot_be_read_are_refused(tmp_path):
    write_rank_file(tmp_path / "ranks", [*(bytes([value]) for value in range(256)), b"ab"])
    path = export(tmp_path, tmp_path / "ranks", merges=[["a", "b"]], ignore_merges=False)
    found = ids_or_refusal(path, "ab")
    assert found == [256] or " cannot read it: its merges are lists of two tokens, expected strings; " in found


@pytest.mark.parametrize(("content", "message"), [
    ('{"version": "1.0", "truncation": null}', "no model.vocab in it, expected a tokenizer.json of transformers"),
    ('{"version"', "not JSON: Expecting ':' delimiter: line 1 column 11 (char 10); expected a tokenizer.json of "
                   "transformers"),
    ('{"model": {"vocab": {}}, "added_tokens": [1]}', "added_tokens is not a list of objects with id and content, "
                                                      "expected a tokenizer.json of transformers"),
    ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}',
     "no pad token: found neither <|endoftext|> among its special tokens nor one as pad_token in "
     "tokenizer_config.json, expected one of them"),
], ids=["no model", "cut", "no tokens", "no pad token"])
def test_a_file_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        open_tokenizer(path)
    assert str(caught.value) == f"{path}: {message}"


def test_pad_token_of_another_model_is_that_of_its_configuration(tmp_path):
    content = {"version": "1.0", "added_tokens": [{"id": 1, "content": "<pad>", "special": True, "single_word": False,
                                                   "lstrip": False, "rstrip": False, "normalized": False}],
               "model": {"type": "BPE", "vocab": {"a": 0, "<pad>": 1}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    assert open_tokenizer(tmp_path).pad_token_id == 1
