"""Pairs to evaluate on that are read as text, each time that they are scored."""
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

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

    def read(self, counts: Counter) -> Iterator[EvalRow]:
        """Each pair, of the group that the keys of `Reading.keep` give it. Pairs of which both texts are the same, or
        are the same after the cut, are left out.

        Args:
            counts: gets what became of the pairs, for `account`

        Raises:
            UserError: a row is invalid, or there is no pair.
        """
        for read in self.sources.preferences():
            row, = encode_rows([read], self.encoder, self.length)
            if isinstance(row, InvalidRow):
                raise row.as_error()
            if isinstance(row, Skipped):
                counts[row.reason] += row.pairs
            elif isinstance(row, EncodedPair) and np.array_equal(*row.ids()):
                counts[_LOST if row.different else _SAME] += 1
            elif isinstance(read, Preference):
                counts[_READ] += 1
                counts[_CUT] += row.cut_answer or row.cut_prompt
                yield EvalRow(read.place, row.ids(), read.values,
                              group_name(read.values, self.sources.reading.keep),
                              texts=(read.prompt, (read.chosen, read.rejected)))
        if not counts[_READ]:
            raise UserError(f"--data_file: {self.sources}: no pair in it, expected at least one")

    def account(self, counts: Mapping[str, int]) -> str:
        """What became of the pairs, for the log.

        Args:
            counts: those of one reading
        """
        left_out = "; ".join(f"{count} for {reason}" for reason, count in counts.items()
                             if reason not in (_READ, _CUT))
        formats = ", ".join(file.format for file in self.sources.files)
        return (f"{self.sources}: format {formats}, {counts[_READ]} pairs, of which {counts[_CUT]} are cut "
                f"at {self.length} tokens; pairs left out: {left_out or 'none'}")
