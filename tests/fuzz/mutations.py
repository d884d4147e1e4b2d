"""What the fuzz tests share: how many examples, from which seed, damage to bytes, and how often each outcome came.

| variable     | meaning                                                          | without it        |
| FUZZ_SEED    | of hypothesis; the same number gives the same examples           | 0                 |
| FUZZ_FULL    | 1: the counts that scripts/fuzz.sh runs                          | a few of each     |
| FUZZ_SUMMARY | file that gets a line of JSON a test: counts by outcome, seconds | none is written   |
"""
import collections
import contextlib
import faulthandler
import json
import os
import time

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

SEED = int(os.environ.get("FUZZ_SEED", "0"))
FULL = os.environ.get("FUZZ_FULL") == "1"
_HANGS = 300  # seconds of one example


def fuzz(few, full):
    """A decorator beside `given`: so many examples, all from the committed seed or that of the environment."""
    def decorate(test):
        return seed(SEED)(settings(
            max_examples=full if FULL else few, deadline=None, database=None, derandomize=False,
            phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))(test))
    return decorate


class Outcomes:
    """Counts what became of the examples of a test, and ends the process with a stack where one hangs."""

    def __init__(self, name):
        self.name, self.counts, self.begin = name, collections.Counter(), time.monotonic()

    def count(self, outcome, number=1):
        self.counts[outcome] += number

    @contextlib.contextmanager
    def no_hang(self):
        faulthandler.dump_traceback_later(_HANGS, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def write(self):
        if os.environ.get("FUZZ_SUMMARY") and self.counts:
            with open(os.environ["FUZZ_SUMMARY"], "a", encoding="utf-8") as file:
                seconds = round(time.monotonic() - self.begin, 1)
                file.write(json.dumps({"test": self.name, "seed": SEED, "seconds": seconds, **self.counts}) + "\n")


def outcomes_of(name):
    """A fixture's body: outcomes that are written when the module's tests are done."""
    outcomes = Outcomes(name)
    yield outcomes
    outcomes.write()


def one_line(error, names=""):
    """The message of a `UserError`, which must be a line that a terminal can show, with the name of a file in it."""
    for message in error.messages:
        assert message.isprintable(), repr(message)
        assert len(message) < 3000, f"{len(message)} characters: {message[:200]}"
    assert str(names) in str(error)
    return str(error)


_PLACE = st.floats(0, 1, exclude_max=True)
# Damage: (what, where, how much, bytes); `where` and `how much` are shares of the content, so that they fit any file.
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), _PLACE, st.integers(0, 7)),
    st.tuples(st.just("set"), _PLACE, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), _PLACE, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("delete"), _PLACE, st.integers(1, 64)),
    st.tuples(st.just("zero"), _PLACE, st.integers(1, 512)),
    st.tuples(st.just("repeat"), _PLACE, st.integers(1, 64)),
    st.tuples(st.just("swap"), _PLACE, st.integers(1, 64)),
    st.tuples(st.just("cut"), _PLACE, st.none()),
    st.tuples(st.just("append"), st.just(1.0), st.binary(min_size=1, max_size=64)),
)


def damaged(content, damage):
    """`content` after one piece of damage of `DAMAGE`."""
    what, share, value = damage
    at = int(share * len(content))
    if what == "flip":
        return content[:at] + bytes(byte ^ 1 << value for byte in content[at:at + 1]) + content[at + 1:]
    if what == "set":
        return content[:at] + value[:len(content) - at] + content[at + len(value):]
    if what in ("insert", "append"):
        return content[:at] + value + content[at:]
    if what == "delete":
        return content[:at] + content[at + value:]
    if what == "zero":
        return content[:at] + bytes(len(content[at:at + value])) + content[at + value:]
    if what == "repeat":
        return content[:at + value] + content[at:]
    if what == "swap":
        return content[:at] + content[at + value:at + 2 * value] + content[at:at + value] + content[at + 2 * value:]
    return content[:at]
