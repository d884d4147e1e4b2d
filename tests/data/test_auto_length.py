"""The sequence length that suits a data set, and whether its rows fit on the disk.

| test                                      | proves                                         | judged against |
| test_one_long_text_is_named_with_what_... | rows by file and line, smaller lengths by cuts | the message    |
| test_lengths_that_are_alike_...           | no warning up to four times the 99th ...       | None           |
| test_rows_that_do_not_fit_are_refused     | before anything is written                     | the message    |
"""
import shutil
from collections import namedtuple

import pytest

from mindrlhf.data.auto_length import LengthCounts, check_space
from mindrlhf.errors import UserError


def counts_of(lengths):
    counts = LengthCounts()
    for number, tokens in enumerate(lengths, start=1):
        counts.add(tokens, f"a.jsonl:{number}")
    return counts


def test_one_long_text_is_named_with_what_smaller_lengths_would_cut():
    counts = counts_of([100] * 397 + [1000, 600, 500])
    assert (counts.longest, counts.fitting, counts.most_of(0.99)) == (1000, 1024, 100)
    assert counts.warning() == (
        "--seq_length auto: 99 % of 400 pairs have at most 100 tokens; the longest are a.jsonl:398 (1000 tokens), "
        "a.jsonl:399 (600 tokens), a.jsonl:400 (500 tokens); of the next smaller lengths, 512 would cut 2, 256 would "
        "cut 3, 128 would cut 3")


@pytest.mark.parametrize("lengths", [[], [5], [100] * 399 + [400], [1, 1000], [10] * 98 + [999] * 2])
def test_lengths_that_are_alike_are_passed_by(lengths):
    assert counts_of(lengths).warning() is None


def test_rows_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(24_000_000))
    check_space(tmp_path / "a.mindrecord", tmp_path, 1000, 1000)
    with pytest.raises(UserError) as caught:
        check_space(tmp_path / "a.mindrecord", tmp_path, 1001, 1000)
    assert str(caught.value) == (f"--dst_file: {tmp_path / 'a.mindrecord'}: needs 24.02 MB for 1001 pairs of 1000 "
                                 "tokens, but 24.00 MB are free on the disk; a smaller --seq_length needs less")
