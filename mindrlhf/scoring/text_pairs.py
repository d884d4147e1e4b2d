"""Pairs to evaluate on that are read as text, each time that they are scored."""
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, Optional, Tuple

import numpy as np

from mindrlhf.data.encoding_processes import EncodedPair, encode_rows
from mindrlhf.data.preference import InvalidRow, Preference, Skipped
from mindrlhf.data.sources import Sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.errors import UserError
from mindrlhf.scoring.eval_rows import EvalRow, group_name

__all__ = ["TextPairs"]

_READ, _CUT, _SAME, _LOST = "read", "cut", "two equal answers", "a difference that the cut took"


@dataclass(frozen=True)
class TextPairs:
    """The pairs that a conversion of the same files would write, of which none is dropped for its length.

    Attributes:
        sources: the files
        encoder: their texts to ids
        length:  at which texts are cut
    """

    sources: Sources
    encoder: TextEncoder
    length: int
    doubts: Tuple[str, ...] = ()
    _counts: Counter = field(default_factory=Counter, repr=False, compare=False)  # of the last reading

    @property
    def files(self) -> Tuple[str, ...]:
        """Paths."""
        return tuple(str(file.name) for file in self.sources.files)

    @property
    def pairs(self) -> Optional[int]:
        """About how many; None where only reading them tells."""
        return self.sources.row_count()

    @property
    def settings(self) -> Dict[str, Any]:
        """How the texts are made, as a `RecordSet` has it."""
        return {"prompt_template": self.encoder.noted, "add_eos": self.encoder.add_eos}

    def read(self) -> Iterator[EvalRow]:
        """Each pair, of the group that the keys of `Reading.keep` give it. Pairs of which both texts are the same, or
        are the same after the cut, are left out.

        Raises:
            UserError: a row is invalid, or there is no pair.
        """
        self._counts.clear()
        for read in self.sources.preferences():
            row, = encode_rows([read], self.encoder, self.length)
            if isinstance(row, InvalidRow):
                raise row.as_error()
            if isinstance(row, Skipped):
                self._counts[row.reason] += row.pairs
            elif isinstance(row, EncodedPair) and np.array_equal(*row.ids()):
                self._counts[_LOST if row.different else _SAME] += 1
            elif isinstance(read, Preference):
                self._counts[_READ] += 1
                self._counts[_CUT] += row.cut_answer or row.cut_prompt
                yield EvalRow(read.place, row.ids(), read.values,
                              group_name(read.values, self.sources.reading.keep),
                              texts=(read.prompt, (read.chosen, read.rejected)))
        if not self._counts[_READ]:
            raise UserError(f"--data_file: {self.sources}: no pair in it, expected at least one")

    def account(self) -> str:
        """What became of the pairs when they were read last, for the log."""
        left_out = "; ".join(f"{count} for {reason}" for reason, count in self._counts.items()
                             if reason not in (_READ, _CUT))
        formats = ", ".join(file.format for file in self.sources.files)
        return (f"{self.sources}: format {formats}, {self._counts[_READ]} pairs, of which {self._counts[_CUT]} are cut "
                f"at {self.length} tokens; pairs left out: {left_out or 'none'}")
