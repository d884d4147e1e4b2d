"""Which pairs are held out.

| test                                     | proves                                               | judged against  |
| test_the_place_of_a_prompt_...           | the same on all machines and in all releases         | literal numbers |
| test_a_share_of_the_prompts_...          | places are spread evenly                             | binomial bounds |
| test_a_dialogue_has_the_place_of_...     | every message and its role count                     | other dialogues |
"""
import pytest

from mindrlhf.data.split import place_of_prompt


@pytest.mark.parametrize(("prompt", "place"), [
    ("Why?", 0.3982412), (" Why?\n", 0.3982412), ("怎样才能作弊？", 0.2403804), ("\ud83d", 0.1166097)])
def test_the_place_of_a_prompt_is_the_same_everywhere(prompt, place):
    assert place_of_prompt(prompt) == pytest.approx(place, abs=1e-7)


def test_a_share_of_the_prompts_is_below_that_share():
    places = [place_of_prompt(f"prompt {number}") for number in range(20_000)]
    for share in (0.02, 0.3, 0.5, 0.98):
        below = sum(place < share for place in places) / len(places)
        assert abs(below - share) < 4 * (share * (1 - share) / len(places)) ** 0.5
    assert all(0 <= place < 1 for place in places)


def test_a_dialogue_has_the_place_of_all_its_messages():
    dialogue = [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert place_of_prompt(dialogue) == place_of_prompt(tuple((role, f" {text}\n") for role, text in dialogue))
    others = [dialogue[:1], dialogue[1:], [("system", "a"), *dialogue[1:]], [*dialogue[:2], ("user", "d")]]
    assert len({place_of_prompt(other) for other in [dialogue, *others]}) == 5
