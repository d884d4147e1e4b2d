"""Preferences: what every format of preference data becomes, and the reading of files of them. Knows nothing of
MindSpore.
"""
import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence, Union

from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.formats import FORMATS, format_of
from mindrlhf.data.formats.fields import Answers, NoAnswers, Reading
from mindrlhf.data.rows.read import read_rows
from mindrlhf.data.rows.row import InvalidRow, Row
from mindrlhf.errors import UserError

__all__ = ["AS_THEY_ARE", "FewerRows", "InvalidRow", "MOST_KEPT", "Preference", "PreferenceFile", "Reading", "Row",
           "Skipped", "detect_format", "read_files", "read_preferences", "read_rows"]

AS_THEY_ARE = Reading()
_LOOKED_AT = 1000  # rows, until one is of a known format
MOST_KEPT = 1 << 16  # bytes of what is kept of a row; a page of MindRecord holds several


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        place, number:   see `Row`
        prompt:          its last message is the user's or an observation; a system text is its first message
        chosen:          one or more messages, of which the first is the assistant's
        rejected:        likewise
        margin:          how much better the better one is, if the row says so
        prompt_id:       where a prompt has more than two answers: its number among the prompts of the conversion, from
                         0, of which each has at least one pair
        chosen_answer:   then, which of the prompt's answers this is, from 0
        rejected_answer: likewise
        kept:            what `Reading.keep` names, an object of JSON in ASCII; None where it names nothing
        values:          the row's own keys and values
    """

    place: str
    number: int
    prompt: Dialogue
    chosen: Dialogue
    rejected: Dialogue
    margin: Optional[float] = None
    prompt_id: Optional[int] = None
    chosen_answer: Optional[int] = None
    rejected_answer: Optional[int] = None
    kept: Optional[str] = None
    values: Dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


class Skipped(NamedTuple):
    """Pairs of a row that say nothing of which answer is better.

    Attributes:
        place, number: see `Row`
        reason:        the same words for all rows, to be counted by
        pairs:         how many
        whole_row:     nothing else comes of the row
    """

    place: str
    number: int
    reason: str
    pairs: int
    whole_row: bool


class FewerRows(NamedTuple):
    """A file, read to its end, that has fewer rows than its FILE#ROWS says."""

    name: Path
    asked: int
    found: int

    def __str__(self) -> str:
        return f"{self.name}#{self.asked}: the file has {self.found} rows, fewer than {self.asked}; all are taken"


class PreferenceFile(NamedTuple):
    """A file of preferences.

    Attributes:
        name:   for messages
        path:   where it can be read again and again
        format: a name of `FORMATS`
        rows:   how many of its rows are read, from the first; None: all
    """

    name: Path
    path: Path
    format: str
    rows: Optional[int] = None


def read_preferences(path: Union[str, Path], name: Optional[Path] = None, format_name: Optional[str] = None,
                     reading: Reading = AS_THEY_ARE) -> Iterator[Union[Preference, Skipped, InvalidRow]]:
    """Each pair of a file, and why a row has none; see `read_rows`.

    Args:
        format_name: of the rows; None: that of the first row of a known format
        reading:     what the user says of the rows

    Raises:
        UserError: the file cannot be read; or without a name no row is of a known format.
    """
    name = Path(name or path)
    found = format_name or detect_format(Path(path), name, reading)
    return read_files([PreferenceFile(name, Path(path), found)], reading)


def detect_format(path: Path, name: Path, reading: Reading) -> str:
    """The name of the format of the first row that is of a known one (of an empty file, or one without a row, the
    default).

    Raises:
        UserError: the file cannot be read, or there are rows and none of the first is of a known format.
    """
    first: Optional[Row] = None
    for _, row in zip(range(_LOOKED_AT), _renamed(read_rows(path, name), reading)):
        if isinstance(row, Row):
            found = format_of(row)
            if found:
                return found
            first = first or row
    if first is None:
        return next(iter(FORMATS))
    raise UserError(f"{first.place}: no format has the keys {', '.join(first.values) or '(none)'} with values of these "
                    "kinds, expected for example prompt, chosen, rejected, or prompt, pos_resp, neg_resp; --columns "
                    "OURS=THEIRS renames keys, --format NAME forces a format")


def read_files(files: Sequence[PreferenceFile],
               reading: Reading = AS_THEY_ARE) -> Iterator[Union[Preference, Skipped, InvalidRow, FewerRows]]:
    """Each pair of all files, in order, and why a row has none. Prompts are numbered over all of them. Behind a file
    with fewer rows than were asked for comes a `FewerRows`.
    """
    prompts = 0
    for name, path, format_name, most in files:
        answers_of = FORMATS[format_name].answers
        found = 0
        for given in islice(read_rows(path, name), most):
            found += 1
            row = reading.read(given) if isinstance(given, Row) else given
            if isinstance(row, InvalidRow):
                yield row
                continue
            kept = json.dumps({key: given.values[key] for key in reading.keep}, allow_nan=False)
            if len(kept) > MOST_KEPT:
                yield row.invalid(f"the keys that --keep or --group_by names have {len(kept)} bytes as JSON, expected "
                                  f"at most {MOST_KEPT}")
                continue
            try:
                answers = answers_of(row, reading)
            except NoAnswers as reason:
                yield row.invalid(str(reason))
                continue
            yield from _pairs(row, answers, prompts, given.values, kept if reading.keep else None)
            prompts += bool(answers.pairs)
        if most is not None and found < most:
            yield FewerRows(name, most, found)


def _renamed(rows: Iterator[Union[Row, InvalidRow]], reading: Reading) -> Iterator[Union[Row, InvalidRow]]:
    """The rows with our names of their keys, if the user has given any."""
    if not reading.columns:
        return rows
    return (reading.renamed(row) if isinstance(row, Row) else row for row in rows)


def _pairs(row: Row, answers: Answers, prompt_id: int, values: Dict[str, Any],
           kept: Optional[str]) -> Iterator[Union[Preference, Skipped]]:
    prompt, texts, pairs, margin, left_out, reason = answers
    several = len(texts) > 2
    for better, worse in pairs:
        yield Preference(row.place, row.number, prompt, texts[better], texts[worse], margin,
                         *((prompt_id, better, worse) if several else (None, None, None)), kept, values)
    if left_out:
        yield Skipped(row.place, row.number, reason, left_out, not pairs)
