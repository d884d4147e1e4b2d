"""The tokenizer files of an exported model: the same ids as in training, the same text as in training.

| test                                   | proves                                   | judged against              |
| test_ids_by_hand                       | merges in the order of the ranks, digits | ids worked out by eye       |
| test_ids_of_..._equal_tiktokens        | pattern, merges and ids                  | tokenizers against tiktoken |
| test_any_ranks_give_tiktokens_ids      | merges of ranks that no training orders  | tokenizers against tiktoken |
| test_ids_become_the_text_again         | the decoder                              | the text                    |
| test_special_tokens_have_glm4s_ids     | <|endoftext|> is 151329, <|user|> 151336 | GLM-4's published numbers   |
| test_chat_template_writes_the_text_... | the chat template is the prompt template | jinja2 against render       |
| test_a_dialogue_is_blocks_...          | several turns, system, observation       | the text written out        |
| test_other_conversations_are_refused   | no text with a hole in it                | the exception               |

Three tokenizers are compared: the bundled one, one of GLM-4's size where it is there, and one with a token for any two
characters of a few, so that every wrong cut in front of the merges changes ids.

The environment's tokenizers 0.15 differs from release 0.23, with which these files were compared with tiktoken by hand
over every character of Unicode, in three ways that the tests go round:

- it knows nothing of `ignore_merges`, by which a whole word that is a token needs no merges to get there. In the rank
  files every token that is text can be merged; of random ranks only words that are no token are compared.
- its Unicode is older than tiktoken's: it takes the digits U+1D2C0 to U+1D2D3 for symbols. The random characters are
  those of Python's Unicode, which is older than both.
- control tokens in a text become control tokens, whatever a caller says. transformers obeys `split_special_tokens`
  (5.23, by hand); here the list of control tokens is taken away to see what their text is cut into.
"""
import base64
import functools
import json
import random
import re
import unicodedata
from collections import namedtuple
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from mindrlhf.data.dialogue import Message
from mindrlhf.data.template import PROMPT_TEMPLATE, TextTemplate, render
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, open_tokenizer, write_rank_file
from mindrlhf.huggingface.tokenizer_files import tokenizer_config, tokenizer_json

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "glm4_reward_model_train" / "sample_data"
SHARED = ROOT.parent / "shared" / "data"
BYTES = [bytes([value]) for value in range(256)]
PUBLISHED_IDS = {"<|endoftext|>": 151329, "[MASK]": 151330, "[gMASK]": 151331, "[sMASK]": 151332, "<sop>": 151333,
                 "<eop>": 151334, "<|system|>": 151335, "<|user|>": 151336, "<|assistant|>": 151337,
                 "<|observation|>": 151338, "<|begin_of_image|>": 151339, "<|end_of_image|>": 151340,
                 "<|begin_of_video|>": 151341, "<|end_of_video|>": 151342}
TEXTS = (
    "我不会提供任何帮助。", "中文 mixed 英文，100%！", "\u3000全角\u3000空格\u3000", "émigré naïve Ünïcödé",
    "e\u0301 и\u0306", "한국어 हिन्दी", "ไทย עברית",
    "What's the answer? I'll tell you: it's 42. We've, we're, I'd, I'm, don't.",
    "WHAT'S THE ANSWER? I'LL TELL YOU: IT'S 42. WE'VE, WE'RE, I'D, I'M, DON'T.",
    "'s 's' 'S''s x's'sy 'Ll'lL 'll1 ''re 'rE'Re ' s ’s ’LL 'ſ 'K '\u212a 'reverse 'demon",
    "a'sa a'Sa a'ta a'rea a'REa a'vea a'VEa a'ma a'lla a'LLa a'da a'DA", "'sa'Sb\n'ta'LLb1'llb 'lla ''Sa's!",
    "\N{GRINNING FACE}\N{FAMILY}\N{ZERO WIDTH JOINER}\N{HEAVY BLACK HEART}\N{VARIATION SELECTOR-16}",
    "\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} \N{REGIONAL INDICATOR SYMBOL LETTER C}"
    "\N{REGIONAL INDICATOR SYMBOL LETTER N}!!",
    "0 12 345 6789 12345 123456 1234567890123 ３４５６ ١٢٣٤٥ ²³½Ⅷ 1,234.5e-6 v2.10", "a1b22c333d4444 第1234章",
    "", " ", "  ", "   a", "a   ", "a  b   c", "\t", "\n", "\r", "\r\n", "\n\n", "\r\n\r\n", " \n", "\n ", " \n \n ",
    "a\n\n\r\n\tb  \n ", "one\r\ntwo\r\n\r\nthree\rfour\n\n\n  five", "if x:\n    return x\n\n\n\tpass\n",
    "...\n\n?!\r\n", "tail \n  \n\n   end", "\x85 \x85\u2028\u2029 \u00a0\u00a0x \u1680\u2003\u202f\ufeff\u180e\u200b",
    "\x00\x01\x02\x1b[0m\x7f\x80\x9f", "\x1c\x1d\x1e\x1f \x0b\x0c", "\ufeff\ufffd\uffff\U0010ffff", "\ue000\U000f0000",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~", "http://example.org/a?b=c&d=%20#e", "C:\\temp\\new\\r", "<html>\n</html>",
)
Pair = namedtuple("Pair", "ours content theirs")
needs_shared = pytest.mark.skipif(not (SHARED / "tokenizer.model").is_file(),
                                  reason="needs ../shared/data/tokenizer.model, a rank file of GLM-4's size")


def build(path):
    """Of a rank file: the tokenizer of training, the content of tokenizer.json, the tokenizers library's tokenizer."""
    ours = open_tokenizer(path)
    content = json.dumps(tokenizer_json(ours), ensure_ascii=False, allow_nan=False)
    return Pair(ours, content, Tokenizer.from_str(content))


@pytest.fixture(scope="module")
def sample():
    return build(SAMPLE / "tokenizer.model")


@pytest.fixture(scope="module")
def full():
    return build(SHARED / "tokenizer.model")


@pytest.fixture(scope="module")
def crossing(tmp_path_factory):
    characters = "abestlvrSLRéſ中'’0123!. \t\r\n\u3000\x85"
    tokens = [character.encode() for character in characters if len(character.encode()) == 2]
    tokens += ["中".encode()[:2], "中".encode(), "’".encode()[:2], "’".encode(), "\u3000".encode()[:2],
               "\u3000".encode()]
    tokens += [(left + right).encode() for left in characters for right in characters]
    tokens += [b"123", b"1231", b"12312", b"   ", b"\n\n\n", b"\r\n\r\n", b" ab", b"  ab", b"!ab", b"ab!\n"]
    return of_tokens(tmp_path_factory.mktemp("crossing"), *dict.fromkeys(tokens))


@pytest.fixture(params=["sample", "crossing", pytest.param("full", marks=needs_shared)])
def pair(request):
    return request.getfixturevalue(request.param)


def of_tokens(tmp_path, *tokens):
    """Tokenizers of the single bytes and `tokens`, whose ranks start at 256."""
    write_rank_file(tmp_path / "ranks", [*BYTES, *tokens])
    return build(tmp_path / "ranks")


def ids_of(theirs, texts):
    return [encoding.ids for encoding in theirs.encode_batch(list(texts))]


def differences(pair, texts):
    """The first few texts with other ids."""
    texts = list(texts)
    rows = zip(texts, pair.ours.encode_batch(texts), ids_of(pair.theirs, texts))
    return [row for row in rows if row[1] != row[2]][:3]


def texts_of(path):
    """Prompts, answers and texts as they are trained on, of a preference file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = {row[key] for row in rows for key in ("prompt", "pos_resp", "neg_resp")}
    return sorted(texts | {render(PROMPT_TEMPLATE, row["prompt"], row["pos_resp"]) for row in rows})


@functools.lru_cache
def named_characters():
    """All that have a meaning in Python's Unicode."""
    return [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")]


def random_texts(count, seed=16):
    """Strings of any characters, and of those that GLM-4's pattern cuts at."""
    rng = random.Random(seed)
    named = named_characters()
    usual = "abcdefgst IVXLDMRET'’ſ\n\r\t 0123456789.,!?中文的，。 \u3000\x85\u2028\x00\x1b\x7f\N{GRINNING FACE}"
    for _ in range(count):
        share = rng.random()
        yield "".join(rng.choice(named if rng.random() < share else usual) for _ in range(rng.randrange(1, 60)))


# --- ids ------------------------------------------------------------------------------------------------------------

def test_ids_by_hand(tmp_path):
    """Ranks 256 "ab", 257 "abc", 258 "bc": the lowest rank first. Digits are cut after three, before any merge."""
    theirs = of_tokens(tmp_path, b"ab", b"abc", b"bc", b"12", b"123", b"1234").theirs
    assert ids_of(theirs, ["abcbc", "ab", "", "bca", "z", "1234"]) == [[257, 258], [256], [], [258, 97], [122],
                                                                      [260, 52]]


def test_letters_of_several_bytes_by_hand(tmp_path):
    """中 is e4 b8 ad, 不 is e4 b8 8d: what they begin with is a token, and a byte may be left over."""
    theirs = of_tokens(tmp_path, b"\xe4\xb8", b"\xe4\xb8\xad").theirs
    assert ids_of(theirs, ["中不", " 中"]) == [[257, 256, 0x8d], [32, 257]]


@pytest.mark.parametrize(("there", "here"), [
    ("(?i:'s|", "(?:'s|"), ("'s|", ""), ("'ll|", ""), ("'re|", ""), (r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?\p{L}+"),
    ("{1,3}", "{1,2}"), ("{1,3}", "+"), (r"| ?[^\s", r"|[^\s"), (r"+[\r\n]*", "+"), (r"|\s*[\r\n]+", ""),
    (r"|\s+(?!\S)", ""),
])
def test_wrong_pattern_is_noticed(crossing, there, here):
    """The comparison of odd texts can fail, for every part of the pattern."""
    content = json.loads(crossing.content)
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert there in split["Regex"]
    split["Regex"] = split["Regex"].replace(there, here)
    assert differences(crossing._replace(theirs=Tokenizer.from_str(json.dumps(content))), TEXTS)


def test_wrong_merges_are_noticed(sample):
    content = json.loads(sample.content)
    content["model"]["merges"].reverse()
    wrong = sample._replace(theirs=Tokenizer.from_str(json.dumps(content)))
    assert differences(wrong, texts_of(SAMPLE / "test.jsonl"))


@pytest.mark.parametrize("name", [pytest.param("train.jsonl", marks=pytest.mark.further), "test.jsonl"])
def test_ids_of_the_sample_equal_tiktokens(pair, name):
    texts = texts_of(SAMPLE / name)
    assert len(texts) > 100
    assert differences(pair, texts) == []


@pytest.mark.parametrize("name", ["cvalues_two.jsonl", *(pytest.param(name, marks=pytest.mark.further) for name in (
    "hh_harmless_train.jsonl", "hh_harmless_test.jsonl", "zh_preference.jsonl"))])
@needs_shared
def test_ids_of_shared_preferences_equal_tiktokens(full, name):
    if not (SHARED / name).is_file():
        pytest.skip(f"needs ../shared/data/{name}")
    assert differences(full, texts_of(SHARED / name)) == []


def test_ids_of_odd_texts_equal_tiktokens(pair):
    assert differences(pair, TEXTS) == []
    assert differences(pair, [f"{left}{right}" for left in TEXTS for right in TEXTS]) == []


def test_ids_of_random_texts_equal_tiktokens(pair):
    assert differences(pair, random_texts(3000)) == []


def test_ids_of_a_long_text_equal_tiktokens(pair):
    texts = ["".join(random_texts(2000, seed=17)), "啊" * 5000, "a" * 5000, " " * 3000 + "x", "\n" * 3000, "12" * 2000]
    assert differences(pair, texts) == []


@pytest.mark.further
def test_ids_of_every_token_equal_tiktokens(pair):
    """Every token that is text."""
    tokens = []
    for token in pair.ours.ranks:
        try:
            tokens.append(token.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    assert differences(pair, tokens) == []


def test_any_ranks_give_tiktokens_ids(tmp_path):
    """Tokens of two or three letters in any order: many pairs give the same token, some tokens cannot be merged."""
    rng = random.Random(16)
    compared = 0
    for table in range(100):
        letters = ["a", "b", "c"][:2 + table % 2]
        tokens = set()
        while len(tokens) < 12:
            parts = sorted(tokens) + letters
            tokens.add((rng.choice(parts) + rng.choice(parts))[:9] if table % 3 else
                       "".join(rng.choices(letters, k=rng.randrange(2, 7))))
        ranked = sorted(tokens)
        rng.shuffle(ranked)
        both = of_tokens(tmp_path, *(token.encode() for token in ranked))
        words = {"".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(40)} - tokens
        assert differences(both, sorted(words)) == [], ranked
        compared += len(words)
    assert compared > 2000


def test_text_that_looks_like_a_control_token_is_text(sample):
    content = json.loads(sample.content)
    content["added_tokens"] = []
    texts = [f"a {token} b" for token in GLM4_SPECIAL_TOKENS] + ["".join(GLM4_SPECIAL_TOKENS)]
    assert differences(sample._replace(theirs=Tokenizer.from_str(json.dumps(content))), texts) == []


def test_ids_become_the_text_again(pair):
    texts = [*TEXTS, *random_texts(300), *texts_of(SAMPLE / "test.jsonl")]
    assert pair.theirs.decode_batch(pair.ours.encode_batch(texts)) == texts


def test_ids_are_the_ranks(sample):
    vocabulary = sample.theirs.get_vocab(with_added_tokens=False)
    lines = map(str.split, (SAMPLE / "tokenizer.model").read_text().splitlines())
    ranks = {int(rank): base64.b64decode(token) for token, rank in lines}
    assert sorted(vocabulary.values()) == sorted(ranks)
    for index, token in ranks.items():
        assert sample.theirs.decode([index]) == token.decode("utf-8", errors="replace")


# --- special tokens -------------------------------------------------------------------------------------------------

@needs_shared
def test_special_tokens_have_glm4s_ids(full):
    assert {token: full.theirs.token_to_id(token) for token in PUBLISHED_IDS} == PUBLISHED_IDS
    assert full.theirs.get_vocab_size() == 151343


def test_special_tokens_follow_the_ranks(pair):
    first = pair.ours.first_special
    assert [pair.theirs.token_to_id(token) for token in PUBLISHED_IDS] == list(range(first, first + 14))
    assert pair.theirs.get_vocab_size() == pair.ours.vocab_size
    assert pair.theirs.get_vocab_size(with_added_tokens=False) == len(pair.ours.ranks)


def test_special_tokens_are_left_out_of_a_text_where_that_is_asked_for(sample):
    ids = [sample.theirs.token_to_id("[gMASK]"), *sample.ours.encode_batch(["a  b "])[0],
           sample.theirs.token_to_id("<|endoftext|>")]
    assert sample.theirs.decode(ids, skip_special_tokens=False) == "[gMASK]a  b <|endoftext|>"
    assert sample.theirs.decode(ids, skip_special_tokens=True) == "a  b "


def test_nothing_is_put_in_front_or_behind(pair):
    for text in ("", "a"):
        with_special, without = (pair.theirs.encode(text, add_special_tokens=add).ids for add in (True, False))
        assert with_special == without == pair.ours.encode_batch([text])[0]
    assert pair.theirs.num_special_tokens_to_add(False) == 0


def test_whole_words_need_no_merges(sample):
    """What tokenizers 0.15 does not know: release 0.23 gives such words tiktoken's ids (by hand)."""
    assert json.loads(sample.content)["model"]["ignore_merges"] is True


# --- tokenizer_config.json ------------------------------------------------------------------------------------------

def test_keys_of_the_configuration(sample):
    config = json.loads(json.dumps(tokenizer_config(sample.ours, 996, 8192, TextTemplate(PROMPT_TEMPLATE))))
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
        "padding_side": "right", "model_max_length": 8192, "clean_up_tokenization_spaces": False,
        "split_special_tokens": True, "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": TextTemplate(PROMPT_TEMPLATE).chat_template(False)}


@pytest.mark.parametrize("number", range(len(GLM4_SPECIAL_TOKENS)))
def test_pad_token_is_the_one_with_the_pad_id(sample, number):
    config = tokenizer_config(sample.ours, 996 + number, 128, TextTemplate(PROMPT_TEMPLATE))
    assert sample.theirs.token_to_id(config["pad_token"]) == 996 + number
    assert config["eos_token"] == "<|endoftext|>"


# --- chat template --------------------------------------------------------------------------------------------------

TEMPLATES = {
    "default": PROMPT_TEMPLATE,
    "bare": "{prompt}{response}",
    "text behind": "Q {prompt} A {response} </s>",
    "double quotes": 'say "{prompt}" and "{response}"',
    "single quotes": "it's '{prompt}' '{response}'",
    "both quotes": "\"'{prompt}'\"\"{response}'\"",
    "backslashes": "\\ \\n \\\\ \\u0041 \\x41 \\{prompt}\\é\\中{response}\\",
    "variables": "{{ x }} {{ messages }} {{{prompt}}} {{response}} {{",
    "blocks": "{% if x %}{prompt}{% endif %}{% raw %}{response}{% endraw %}{%- -%}",
    "raw": "{% raw %}{prompt}{response}",
    "comments": "{# x #}{prompt}#}{#{response}{#- x",
    "ends of blocks": "}} %} -}} {prompt} \"}} '%} {response} -%}",
    "line breaks at the ends": "\n\n{prompt}\n\n{response}\n\n",
    "white space at the ends": " \t\n {prompt} \n\t {response}\t \r\n ",
    "line ends": "a\r\nb\rc\n{prompt}\r\n{response}\r",
    "lines of white space": "x\n   {prompt}\n\t\n   {response}\n   ",
    "control characters": "\x00\x01\x08\x0b\x0c\x1b\x1f\x7f\x80\x85{prompt}\u2028\u2029\ufeff{response}\x00",
    "emoji": "\N{GRINNING FACE}{prompt}\N{FAMILY}\u200d\uffff\U0010ffff{response}",
    "slashes and tags": "<a href=\"x\">&amp; & < > {prompt} </a> {response} /",
    "control tokens": "[gMASK]<sop><|user|>\n{prompt}<|assistant|>\n{response}<|endoftext|>",
    "other fields": "{0} {} %s %(x)s ${x} {prompt} {answer} {response} {}",
}
CONTENTS = [
    ("why?", "because"), ("", ""), (" ", "\n"), ("  why?\n", "\n\n because \t"), ("\u3000为什么\u3000", "\xa0因为\x85"),
    ("a\n\nb", "c\r\nd  e"), ("{{ 1 + 1 }}", "{% raw %}"), ("{prompt}", "{response}"), ("'\"\\", "\\n"),
    ("{# x #}", "<b>&amp;</b>"), ("\x1c\x00x\x00\x1f", "\u200bx\ufeff"), ("<|user|>", "\N{GRINNING FACE}"),
]


def write(template, messages, **others):
    """The text, as transformers makes it of a chat template."""
    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    text = TextTemplate(template, control=False).chat_template(False)
    return environment.from_string(text).render(messages=messages, **others)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_template_writes_the_text_of_training(template):
    for prompt, answer in CONTENTS:
        assert write(template, [user(prompt), assistant(answer)]) == render(template, prompt, answer)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_prompt_alone_has_an_empty_answer(template):
    for prompt, _ in CONTENTS:
        assert write(template, [user(prompt)]) == render(template, prompt, "")


def test_text_of_training_by_hand():
    text = write(PROMPT_TEMPLATE, [user(" 天为什么是蓝的？\n"), assistant("因为散射。 ")])
    assert text == "根据一下问题，写一个合适的回答。\n\n### 问题：\n天为什么是蓝的？\n\n### 回答：\n因为散射。"


def test_what_transformers_hands_in_besides_changes_nothing():
    expected = render(PROMPT_TEMPLATE, "why?", "because")
    for prompted in (False, True):
        assert write(PROMPT_TEMPLATE, [user("why?"), assistant("because")], tools=None, documents=None,
                     add_generation_prompt=prompted, pad_token="<|endoftext|>", eos_token="<|endoftext|>") == expected


@pytest.mark.further
def test_random_templates_write_the_text_of_training():
    rng = random.Random(16)
    pieces = ["{{", "}}", "{%", "%}", "{#", "#}", "-", "\n", "\r", "\\", '"', "'", " ", "x", "raw", "endraw", "中",
              "\t", "u0041", "\N{GRINNING FACE}", "~", "|"]
    for _ in range(200):
        before, between, after, prompt, answer = ("".join(rng.choices(pieces, k=rng.randrange(6))) for _ in range(5))
        template = f"{before}{{prompt}}{between}{{response}}{after}"
        assert write(template, [user(prompt), assistant(answer)]) == render(template, prompt, answer), template


@pytest.mark.parametrize(("messages", "expected"), [
    ([user("why?"), assistant("because"), user("really?"), assistant("yes")], "Q why? A because.\n\nQ really? A yes."),
    ([{"role": "system", "content": " be kind "}, user("why?"), assistant("because")], "be kind\n\nQ why? A because."),
    ([user("why?"), assistant("see"), {"role": "observation", "content": "8"}], "Q why? A see.\n\nQ 8 A ."),
    ([user("why?"), user("well?"), assistant("a"), assistant("b")], "Q why? A .\n\nQ well? A a.\n\nb."),
], ids=["two rounds", "system", "observation", "no answer, two answers"])
def test_a_dialogue_is_blocks_with_a_blank_line_between(messages, expected):
    template = "Q {prompt} A {response}."
    assert write(template, messages) == expected
    pieces = TextTemplate(template).pieces([Message(message["role"], message["content"]) for message in messages])
    assert "".join(pieces) == expected


def test_a_generation_starts_behind_the_question():
    assert write("Q {prompt} A {response}.", [user("why?")], add_generation_prompt=True) == "Q why? A "


@pytest.mark.parametrize(("messages", "message"), [
    ([], "expected at least one message"),
    ([assistant("because")], "expected a message of the user in front of the first one of the assistant"),
    ([{"role": "system", "content": "be kind"}, assistant("because")],
     "expected a message of the user in front of the first one of the assistant"),
    ([user("why?"), {"role": "tool", "content": "because"}], "expected a role of system, user, assistant, observation"),
    ([{"content": "why?"}], "expected a role of system, user, assistant, observation"),
], ids=["none", "answer alone", "answer behind a system message", "a tool's answer", "no role"])
def test_other_conversations_are_refused(messages, message):
    with pytest.raises(jinja2.exceptions.TemplateError, match=re.escape(message)):
        write(PROMPT_TEMPLATE, messages)
