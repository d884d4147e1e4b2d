"""What becomes of texts that are too long: answers that are cut, prompts that are cut, pairs that are dropped."""
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

from mindrlhf.data.dialogue import Dialogue, Message

__all__ = ["TOO_LONG", "Fitted", "fit"]

TOO_LONG = ("cut", "cut_prompt", "drop")
Encode = Callable[[Dialogue], List[List[int]]]  # a prompt to the ids of each of its answers' texts


class Fitted(NamedTuple):
    """The texts of the answers to one prompt, at most as long as they may be.

    Attributes:
        ids:         of each text
        cut_prompt:  whether the prompt lost its beginning
        cut_answers: which texts lost their end
        dropped:     whether they are to be left out instead; `ids` are whole then
        different:   whether the texts differed before they were cut
    """

    ids: List[List[int]]
    cut_prompt: bool
    cut_answers: Tuple[bool, ...]
    dropped: bool
    different: bool


def fit(encode: Encode, prompt: Dialogue, length: Optional[int], too_long: str, keep_last: bool) -> Fitted:
    """The ids of each answer to a prompt, at most `length` of them (None: all).

    - `cut`: a text that is too long loses its end; `<|endoftext|>` is its last token all the same.
    - `cut_prompt`: the prompt, the same for all answers, loses its oldest turns, then its system message, then the
      beginning of what is left, until all texts fit; if they do not then, they lose their ends as well.
    - `drop`: all are to be left out if one is too long.

    Args:
        encode:    the ids of each answer's text behind a prompt
        too_long:  one of `TOO_LONG`
        keep_last: whether a text that is cut keeps its last token, `<|endoftext|>`
    """
    ids = encode(prompt)
    different = any(row != ids[0] for row in ids[1:])
    if length is None or _fit(ids, length) or too_long == "drop":
        return Fitted(ids, False, (False,) * len(ids), length is not None and not _fit(ids, length), different)
    cut_prompt = too_long == "cut_prompt"
    if cut_prompt:
        ids = _with_shorter_prompt(encode, prompt, length)
    return Fitted([_cut(row, length, keep_last) for row in ids], cut_prompt, tuple(len(row) > length for row in ids),
                  False, different)


def _fit(ids: List[List[int]], length: int) -> bool:
    return max(map(len, ids)) <= length


def _cut(ids: List[int], length: int, keep_last: bool) -> List[int]:
    return ids if len(ids) <= length else [*ids[:length - 1], ids[-1]] if keep_last else ids[:length]


def _with_shorter_prompt(encode: Encode, prompt: Dialogue, length: int) -> List[List[int]]:
    """The ids with the longest prompt that fits, or with an empty one."""
    shorter = list(_without_turns(prompt))
    low, high, fitting = 0, len(shorter), None  # from `high` on they fit, below `low` they do not
    while low < high:
        middle = (low + high) // 2
        found = encode(shorter[middle])
        if _fit(found, length):
            high, fitting = middle, found
        else:
            low = middle + 1
    return fitting or _with_end_of_prompt(encode, shorter[-1], length)


def _with_end_of_prompt(encode: Encode, prompt: Dialogue, length: int) -> List[List[int]]:
    """The ids with as many characters of a prompt's end as fit, or with none."""
    # `kept` characters fit, `above` do not. From few characters on, so that a very long text is not encoded as a whole
    # many times.
    whole = sum(len(message.content) for message in prompt)
    best, kept, above = encode(_end_of(prompt, 0)), 0, whole + 1
    while _fit(best, length) and kept + 1 < above:
        tried = (kept + above) // 2 if above <= whole else min(2 * kept or length, whole)
        found = encode(_end_of(prompt, tried))
        if _fit(found, length):
            best, kept = found, tried
        else:
            above = tried
    return best


def _without_turns(prompt: Dialogue) -> Iterator[Dialogue]:
    """The prompt without its oldest turn, its two oldest and so on, then without the system message: the last turn."""
    system = prompt[:1] if prompt[0].role == "system" else ()
    rest = prompt[len(system):]
    starts = [number for number, message in enumerate(rest) if message.role == "user" and number]
    for start in starts:
        yield system + rest[start:]
    if system and rest:
        yield rest[starts[-1] if starts else 0:]
    elif not starts:
        yield prompt


def _end_of(dialogue: Dialogue, characters: int) -> Dialogue:
    """The messages with the last so many characters of their texts."""
    messages = []
    for message in reversed(dialogue):
        content = message.content[max(len(message.content) - characters, 0):]
        characters -= len(content)
        messages.append(Message(message.role, content))
    return tuple(reversed(messages))
