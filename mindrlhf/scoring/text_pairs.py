"""Pairs to evaluate on that are read as text, each time that they are scored."""
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Optional, Tuple

import numpy as np

from mindrlhf.data.encoding_processes import EncodedPair, encode_rows
from mindrlhf.data.preference import InvalidRow
from mindrlhf.data.sources import Sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.errors import UserError

__all__ = ["TextPairs"]


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

    def read(self) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
        """Ids of the chosen and the rejected text of each pair, (length,) int32 each. Pairs of which both texts are the
        same, or are the same after the cut, are left out.

        Raises:
            UserError: a row is invalid, or there is no pair.
        """
        found = 0
        for row in encode_rows(self.sources.preferences(), self.encoder, self.length):
            if isinstance(row, InvalidRow):
                raise row.as_error()
            if isinstance(row, EncodedPair) and not np.array_equal(*row.ids()):
                found += 1
                yield row.ids()
        if not found:
            raise UserError(f"--data_file: {self.sources}: no pair in it, expected at least one")
