"""Dialogues to ids: control tokens of a template alone, the end-of-text token, and texts that are too long.

| test                                   | proves                                             | judged against         |
| test_ids_of_glm4s_chat_template        | `glm4-chat`, and the same written in Jinja         | another program's ids  |
| test_a_users_control_tokens_stay_text  | every control token, in every field, each template | those of other texts   |
| test_one_text_is_encoded_in_one_piece  | today's ids for one question                       | tiktoken's             |
| test_control_tokens_of_a_text_...      | `[gMASK]` is one, `\\[gMASK]` letters              | ids by hand            |
| test_add_eos_...                       | the last token, also behind a cut                  | ids by hand            |
| test_cut_prompt_...                    | what is taken first; one prompt for all answers    | texts written out      |
| test_what_is_too_long_...              | each case by its name                              | flags by hand          |
| test_a_tokenizer_without_...           | control tokens that are not there are refused      | the message            |

The letters of most texts are never merged by the bundled tokenizer: an id is the value of a byte, as "ab" is [97, 98].
"""
import json
from pathlib import Path

import pytest

from mindrlhf.data.dialogue import ROLES, Message
from mindrlhf.data.template import PROMPT_TEMPLATE, open_template, render
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, open_tokenizer
from mindrlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "glm4_reward_model_train" / "sample_data"
SHARED = ROOT.parent / "shared" / "data"
TOKENIZER = open_tokenizer(SAMPLE / "tokenizer.model")
EOS, G_MASK, SOP = 996, 998, 1000
JINJA = "{#jinja#}[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
TEMPLATES = {"default": PROMPT_TEMPLATE, "chat": "glm4-chat", "jinja": JINJA,
             "control": open_template("[gMASK]<sop><|user|>{prompt}<|assistant|>{response}<|endoftext|>").noted}
SHORT = "{prompt}:{response}"


def user(content):
    return Message("user", content)


def assistant(content):
    return Message("assistant", content)


def encoder(template=SHORT, add_eos=False, too_long="cut"):
    return TextEncoder(TOKENIZER, template, add_eos, too_long)


def ids_of(dialogue, *args):
    return encoder(*args).encode([tuple(dialogue)])[0]


@pytest.mark.skipif(not (SHARED / "glm4_chat.jsonl").is_file(), reason="needs ../shared/data/glm4_chat.jsonl")
@pytest.mark.parametrize("template", ["glm4-chat", JINJA], ids=["glm4-chat", "jinja"])
def test_ids_of_glm4s_chat_template(template):
    rows = [json.loads(line) for line in (SHARED / "glm4_chat.jsonl").read_text(encoding="utf-8").splitlines()]
    dialogues = [tuple(Message(message["role"], message["content"]) for message in row["messages"]) for row in rows]
    assert len(rows) == 40
    assert {message.role for dialogue in dialogues for message in dialogue} == set(ROLES)
    found = TextEncoder(open_tokenizer(SHARED / "tokenizer.model"), template).encode(dialogues)
    assert found == [row["ids"] for row in rows]


@pytest.mark.parametrize("add_eos", [pytest.param(False, marks=pytest.mark.further), True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_users_control_tokens_stay_text(template, add_eos):
    """The control tokens among the ids are those of the same dialogue with letters in their place."""
    for role in ROLES:
        for token in GLM4_SPECIAL_TOKENS:
            for content in (token, f"a {token} b", f"{token}{token}", f"<{token}>"):
                dialogue = [Message("system", "s"), user("q"), assistant("a"), Message("observation", "o"),
                            assistant("b")]
                at = next(number for number, message in enumerate(dialogue) if message.role == role)
                plain = ids_of(dialogue, template, add_eos)
                dialogue[at] = Message(role, content)
                found = ids_of(dialogue, template, add_eos)
                assert [number for number in found if number >= EOS] == [number for number in plain if number >= EOS]
                assert token in encoder(template, add_eos).text(tuple(dialogue))


def test_one_text_is_encoded_in_one_piece():
    texts = [("天为什么是蓝的？", "因为散射。"), ("How?  ", "\n\n'Tis so"), ("<sop>", "[gMASK]")]
    for prompt, answer in texts:
        assert ids_of([user(prompt), assistant(answer)], PROMPT_TEMPLATE) == \
            TOKENIZER.encode_batch([render(PROMPT_TEMPLATE, prompt, answer)])[0]


def test_control_tokens_of_a_text_template_are_some_unless_a_backslash_is_in_front():
    assert ids_of([user("a"), assistant("b")], open_template("[gMASK]<sop>{prompt}:{response}").noted) == \
        [G_MASK, SOP, 97, 58, 98]
    letters = open_template(r"\[gMASK]{prompt}:{response}").noted
    assert ids_of([user("a"), assistant("b")], letters) == TOKENIZER.encode_batch(["[gMASK]a:b"])[0]


def test_what_an_earlier_release_noted_as_letters_stays_letters():
    assert ids_of([user("a"), assistant("b")], "[gMASK]{prompt}:{response}") == \
        TOKENIZER.encode_batch(["[gMASK]a:b"])[0]


def test_what_a_text_begins_with_stands_once():
    template = open_template("[gMASK]<sop>{prompt}:{response}").noted
    found = ids_of([Message("system", "s"), user("a"), assistant("b"), user("c"), assistant("d")], template)
    assert found == [G_MASK, SOP, *TOKENIZER.encode_batch(["s\n\na:b\n\nc:d"])[0]]


def test_add_eos_ends_a_text_with_the_token_also_where_it_is_cut():
    prompt, answers = (user("a"),), [(assistant("b"),), (assistant("bcd"),)]
    assert encoder(add_eos=True).fit(prompt, answers, 4).ids == [[97, 58, 98, EOS], [97, 58, 98, EOS]]
    assert encoder(add_eos=True).fit(prompt, answers, 5).ids == [[97, 58, 98, EOS], [97, 58, 98, 99, EOS]]


DIALOGUE = (Message("system", "ss"), user("aa"), assistant("bb"), user("cc"), assistant("dd"), user("ee"))


def test_cut_prompt_does_not_try_each_turn_of_a_long_dialogue(monkeypatch):
    found, tried = encoder(too_long="cut_prompt"), []
    encode = TOKENIZER.encode_batch
    monkeypatch.setattr(TOKENIZER, "encode_batch", lambda texts: tried.append(texts) or encode(texts))
    prompt = (*(message for _ in range(500) for message in (user("aa"), assistant("bb"))), user("c"))
    fitting = found.fit(prompt, [(assistant("d"),), (assistant("e"),)], 20)
    assert fitting.ids[0] == ids_of([*prompt[-5:], assistant("d")])
    assert len(tried) < 15


@pytest.mark.parametrize(("length", "text"), [
    (22, "ss\n\naa:bb\n\ncc:dd\n\nee:ffff"), (21, "ss\n\ncc:dd\n\nee:ffff"), (15, "ss\n\nee:ffff"), (9, "ee:ffff"),
    (6, "e:ffff"), (5, ":ffff"), (4, ":fff"),
])
def test_cut_prompt_takes_oldest_turns_then_the_system_message_then_the_beginning(length, text):
    """A blank line is one token; the longer answer decides for both."""
    fitting = encoder(too_long="cut_prompt").fit(DIALOGUE, [(assistant("ffff"),), (assistant("g"),)], length)
    expected = TOKENIZER.encode_batch([text, f"{text.rpartition(':')[0]}:g"])
    assert fitting.ids == expected
    assert len(expected[0]) <= length
    assert (fitting.cut_prompt, fitting.cut_answers) == (length < 22, (length == 4, False))


@pytest.mark.parametrize("length", [3, 17, 64, 200])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_cut_prompt_keeps_as_much_as_fits(template, length):
    """With one character more it would be too long."""
    text = "".join(f"{number} 为什么 why<|user|>\N{GRINNING FACE}" for number in range(30))
    whole, answer = encoder(template), (assistant("因为"),)
    found = encoder(template, too_long="cut_prompt").fit((user(text),), [answer], length)
    if found.cut_answers[0]:
        assert len(ids_of([user(""), *answer], template)) > length == len(found.ids[0])
        return
    ends = [text[start:] for start in range(len(text) + 1)]
    kept = next(end for end in ends if len(whole.encode([(user(end), *answer)])[0]) <= length)
    assert found.ids == whole.encode([(user(kept), *answer)])


@pytest.mark.parametrize(("too_long", "prompt", "answers", "expected"), [
    ("cut", "a", ("b", "cc"), ([[97, 58, 98], [97, 58, 99, 99]], False, (False, False), False, True)),
    ("cut", "a", ("b", "ccc"), ([[97, 58, 98], [97, 58, 99, 99]], False, (False, True), False, True)),
    ("cut", "aaaa", ("b", "c"), ([[97] * 4] * 2, False, (True, True), False, True)),
    ("drop", "a", ("b", "ccc"), ([[97, 58, 98], [97, 58, 99, 99, 99]], False, (False, False), True, True)),
    ("cut_prompt", "aab", ("b", "c"), ([[97, 98, 58, 98], [97, 98, 58, 99]], True, (False, False), False, True)),
    ("cut_prompt", "a", ("bbbb", "c"), ([[58, 98, 98, 98], [58, 99]], True, (True, False), False, True)),
    ("cut", "a", ("bb ", "bb"), ([[97, 58, 98, 98]] * 2, False, (False, False), False, False)),
])
def test_what_is_too_long_is_told_by_its_case(too_long, prompt, answers, expected):
    found = encoder(too_long=too_long).fit((user(prompt),), [(assistant(answer),) for answer in answers], 4)
    assert tuple(found) == expected


@pytest.mark.parametrize(("template", "add_eos", "message"), [
    ("glm4-chat", False, "ranks: no control token [gMASK] in it, which the prompt template needs, expected GLM-4's "
                         "tokenizer"),
    (SHORT, True, "ranks: no control token <|endoftext|> in it, which --add_eos needs, expected GLM-4's tokenizer"),
])
def test_a_tokenizer_without_the_control_tokens_is_refused(template, add_eos, message):
    class Letters:
        path, control_ids = Path("ranks"), {}

    with pytest.raises(UserError) as caught:
        TextEncoder(Letters(), template, add_eos)
    assert str(caught.value) == message
