"""Tokenizer files of either kind: told apart by content, text never becomes a control token, no byte is lost.

| test                                         | proves                             | judged against            |
| test_ids_by_hand                             | merges in the order of their ranks | ids worked out by eye     |
| test_no_byte_is_lost                         | ids stand for a text's very bytes  | UTF-8                     |
| test_ids_equal_those_of_mindformers          | the split pattern is GLM-4's       | ChatGLM4Tokenizer         |
| test_full_size_file_has_glm4s_special_tokens | pad id 151329, vocabulary 151343   | GLM-4's published numbers |
| test_broken_rank_line_is_named               | FILE:LINE, found, expected         | messages                  |
"""
import base64
import hashlib
import io
import os
from pathlib import Path

import pytest
from conftest import LFS_POINTER, LFS_TEXT

from mindrlhf.data.preference import read_preferences
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, open_tokenizer, write_rank_file
from mindrlhf.errors import UserError

pytestmark = pytest.mark.stack

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "glm4_reward_model_train" / "sample_data"
SHARED = ROOT.parent / "shared" / "data"
BYTES = [bytes([value]) for value in range(256)]
TEXTS = ("我不会提供任何帮助。", "What's the answer? I'll tell you: it's 42.", "émigré naïve Ünïcödé",
         "\N{GRINNING FACE}\N{FAMILY}\N{ZERO WIDTH JOINER}\N{HEAVY BLACK HEART}", "0 12 345 6789 ３４", "", " ",
         "a\n\n\r\n\tb  \n ",
         "中文 mixed 英文，100%！", "\r\n\r\n第一行\r\n\n  第二行\n\n\n", "1234567890 12345, 3.14159; 二〇二四年",
         "好的\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}\N{REGIONAL INDICATOR SYMBOL LETTER C}",
         "\u0000\u007f\ufeff\uffff", "<|endoftext|>[gMASK]<sop>")
needs_shared = pytest.mark.skipif(not (SHARED / "tokenizer.model").is_file(),
                                  reason="needs ../shared/data/tokenizer.model, a rank file of GLM-4's size")


@pytest.fixture(scope="module")
def sample_tokenizer():
    return open_tokenizer(SAMPLE / "tokenizer.model")


@pytest.fixture(scope="module")
def full_tokenizer():
    return open_tokenizer(SHARED / "tokenizer.model")


def train_sentencepiece(**options):
    """The bytes of a SentencePiece model of a few words."""
    import sentencepiece
    model = io.BytesIO()
    lines = ["hello world", "how are you", "the quick brown fox"] * 5
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=40,
                                             model_type="bpe", minloglevel=2, **options)
    return model.getvalue()


def rank_lines(tokens):
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def tokens_by_rank(path):
    """Rank -> bytes, read off the file without the code under test."""
    return {int(rank): base64.b64decode(token) for token, rank in map(str.split, path.read_text().splitlines())}


def write(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    return path


def message_of(path):
    with pytest.raises(UserError) as caught:
        open_tokenizer(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ids_by_hand(tmp_path):
    """Ranks 256 "ab", 257 "abc", 258 "bc": in "abcbc" the lowest rank is merged first, so "ab" wins over "bc"."""
    write_rank_file(tmp_path / "ranks", [*BYTES, b"ab", b"abc", b"bc"])
    tokenizer = open_tokenizer(tmp_path / "ranks")
    assert tokenizer.encode_batch(["abcbc", "ab", "", "bca", "z"]) == [[257, 258], [256], [], [258, 97], [122]]


def test_numbers_are_cut_after_three_digits(tmp_path):
    """GLM-4's pattern cuts "1234" into "123" and "4", so that the rank of the whole is never used."""
    write_rank_file(tmp_path / "ranks", [*BYTES, b"12", b"123", b"1234"])
    assert open_tokenizer(tmp_path / "ranks").encode_batch(["1234"]) == [[257, 52]]


def test_special_tokens_follow_the_ranks(tmp_path):
    write_rank_file(tmp_path / "ranks", [*BYTES, b"ab"])
    tokenizer = open_tokenizer(tmp_path / "ranks")
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (257, 257 + 14)
    assert (len(GLM4_SPECIAL_TOKENS), GLM4_SPECIAL_TOKENS[0]) == (14, "<|endoftext|>")


def test_bundled_tokenizer_has_996_ranks(sample_tokenizer):
    assert (sample_tokenizer.pad_token_id, sample_tokenizer.vocab_size) == (996, 1010)


def test_path_and_checksum_are_those_of_the_file(sample_tokenizer):
    path = SAMPLE / "tokenizer.model"
    assert sample_tokenizer.path == path
    assert sample_tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_folder_stands_for_the_tokenizer_in_it(sample_tokenizer):
    assert open_tokenizer(str(SAMPLE)).sha256 == sample_tokenizer.sha256


@pytest.mark.parametrize("text", GLM4_SPECIAL_TOKENS)
def test_text_that_looks_like_a_control_token_is_text(sample_tokenizer, text):
    ids = sample_tokenizer.encode_batch([f"a {text} b"])[0]
    tokens = tokens_by_rank(SAMPLE / "tokenizer.model")
    assert max(ids) < 996
    assert b"".join(tokens[index] for index in ids).decode() == f"a {text} b"


@pytest.mark.parametrize("text", TEXTS)
def test_no_byte_is_lost(sample_tokenizer, text):
    tokens = tokens_by_rank(SAMPLE / "tokenizer.model")
    ids, = sample_tokenizer.encode_batch([text])
    assert b"".join(tokens[index] for index in ids) == text.encode("utf-8")
    assert sample_tokenizer.decode([996, *ids, 997, 998]) == f"<|endoftext|>{text}[MASK][gMASK]"


def test_written_rank_file_is_read_back(tmp_path):
    tokens = [*reversed(BYTES), b"\xe4\xb8", b"\xe4\xb8\xad", b" the"]
    write_rank_file(tmp_path / "ranks", tokens)
    assert (tmp_path / "ranks").read_bytes().startswith(b"/w== 0\n/g== 1\n")
    assert tokens_by_rank(tmp_path / "ranks") == dict(enumerate(tokens))
    assert open_tokenizer(tmp_path / "ranks").encode_batch(["中", " the", "A"]) == [[257], [258], [255 - 65]]


def test_blank_lines_and_crlf_line_ends_change_nothing(tmp_path):
    path = write(tmp_path, b"\r\n".join([*rank_lines([*BYTES, b"ab"]), b"", b""]))
    assert open_tokenizer(path).encode_batch(["abc"]) == [[256, 99]]


def test_sentencepiece_model_is_told_by_its_content(tmp_path):
    import sentencepiece
    content = train_sentencepiece()
    tokenizer = open_tokenizer(write(tmp_path, content))  # the name says nothing: both kinds are tokenizer.model
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    texts = ["hello world", "how are you?", ""]
    assert tokenizer.encode_batch(texts) == [reference.encode(text) for text in texts]
    assert tokenizer.decode(reference.encode("hello world")) == "hello world"
    assert tokenizer.vocab_size == 40


@pytest.mark.parametrize(("options", "pad"), [({}, 0), ({"pad_id": 3}, 3)], ids=["no pad token", "a pad token"])
def test_sentencepiece_model_pads_with_its_pad_token_or_the_unknown_one(tmp_path, options, pad):
    assert open_tokenizer(write(tmp_path, train_sentencepiece(**options))).pad_token_id == pad


def test_sentencepiece_control_token_in_a_text_is_text(tmp_path):
    tokenizer = open_tokenizer(write(tmp_path, train_sentencepiece()))
    assert not {1, 2} & set(tokenizer.encode_batch(["<s> hello </s>"])[0])  # 1 and 2 are <s> and </s>


@pytest.mark.parametrize(("content", "found"), [
    (b"", "an empty file"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"b'\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR'"),
    (b"\xff" * 100, "b'" + r"\xff" * 24 + "'"),
    (LFS_POINTER, LFS_TEXT),
], ids=["empty", "PNG", "noise", "pointer"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content, found):
    path = write(tmp_path, content)
    assert message_of(path) == (f"{path}: not a tokenizer file: found {found}, expected a GLM-4 rank file (lines of "
                                "`base64-token rank`), a SentencePiece model, or transformers' tokenizer.json")


def test_cut_sentencepiece_model_is_refused(tmp_path):
    content = train_sentencepiece()
    path = write(tmp_path, content[:len(content) // 2])
    assert message_of(path).startswith(f"{path}: not a tokenizer file: found ")


@pytest.mark.parametrize(("path", "reason"), [("missing.model", "No such file or directory"),
                                              ("", "No such file or directory")],
                         ids=["a file", "a folder without tokenizer.model"])
def test_missing_file_is_refused(tmp_path, path, reason):
    missing = tmp_path / path if path else tmp_path / "tokenizer.model"
    assert message_of(tmp_path / path) == f"{missing}: tokenizer cannot be read: {reason}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_refused(tmp_path):
    path = write(tmp_path, b"AA== 0\n")
    path.chmod(0)
    assert message_of(path) == f"{path}: tokenizer cannot be read: Permission denied"


@pytest.mark.parametrize(("line", "message"), [
    (b"Yg=", "found b'Yg=', expected `base64-token rank`"),
    (b"YWI= x", "found b'YWI= x', expected `base64-token rank`"),
    (b"YWI= 1 2", "found b'YWI= 1 2', expected `base64-token rank`"),
    (b"!!!! 100", "found b'!!!! 100', expected `base64-token rank`"),
    (b"YWI 100", "found b'YWI 100', expected `base64-token rank`"),
    (b"YWI= 99", "token or rank 99 is there twice"),
    (b"AA== 100", "token or rank 100 is there twice"),
    (b"YWI= -1", "found b'YWI= -1', expected `base64-token rank`"),
    (b"YWI= 99999999999", "found b'YWI= 99999999999', expected `base64-token rank`"),
], ids=["no rank", "rank is a word", "two ranks", "not base64", "base64 without padding", "rank twice", "token twice",
        "negative rank", "rank beyond 32 bits"])
def test_broken_rank_line_is_named(tmp_path, line, message):
    lines = rank_lines([*BYTES[:100], b"\xff\xff", *BYTES[100:]])
    lines[100] = line
    path = write(tmp_path, b"\n".join(lines))
    assert message_of(path) == f"{path}:101: {message}"


def test_rank_file_that_was_cut_lacks_bytes(tmp_path):
    path = write(tmp_path, b"\n".join(rank_lines(BYTES[:100])))
    assert message_of(path) == (f"{path}: 156 of the 256 single bytes have no rank: not a byte-level tokenizer, or cut")


@needs_shared
def test_full_size_file_has_glm4s_special_tokens(full_tokenizer):
    assert (full_tokenizer.pad_token_id, full_tokenizer.vocab_size) == (151329, 151343)
    assert max(full_tokenizer.encode_batch(["<|endoftext|><|user|>"])[0]) < 151329


@pytest.mark.further
@needs_shared
def test_ids_equal_those_of_mindformers(full_tokenizer):
    """400 pairs as they are converted, and texts without control tokens: MindFormers' class makes ids of these on
    purpose, and this one does not.
    """
    from mindformers.models.glm2.glm4_tokenizer import ChatGLM4Tokenizer
    theirs = ChatGLM4Tokenizer(str(SHARED / "tokenizer.model"))
    names = ("zh_preference.jsonl", "hh_harmless_test.jsonl")
    rows = [row for name in names for row in read_preferences(SHARED / name)]
    texts = [text for row in rows for text in (row.prompt[0].content, *(
        render(PROMPT_TEMPLATE, row.prompt[0].content, answer.content)
        for answer in (row.chosen[0], row.rejected[0])))] + [
        text for text in TEXTS if "<|" not in text]
    assert len(texts) > 1200
    for text, ids in zip(texts, full_tokenizer.encode_batch(texts)):
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text


@needs_shared
@pytest.mark.parametrize("text", TEXTS)
def test_no_byte_is_lost_with_the_full_size_file(full_tokenizer, full_tokens, text):
    assert b"".join(full_tokens[index] for index in full_tokenizer.encode_batch([text])[0]) == text.encode("utf-8")


@pytest.fixture(scope="module")
def full_tokens():
    return tokens_by_rank(SHARED / "tokenizer.model")
