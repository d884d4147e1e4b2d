"""How attention on a CPU is cut into pieces; also for the estimate of its memory, which is made without MindSpore."""
from typing import List, Tuple

__all__ = ["MOST_PIECES", "query_pieces"]

MOST_PIECES = 4
_SHORTEST_PIECE = 128  # queries


def query_pieces(seq_length: int) -> List[Tuple[int, int]]:
    """(first, end) of the pieces in which `PiecewiseAttention` takes the queries; all have the same length.

    >>> query_pieces(255), query_pieces(400)
    ([(0, 255)], [(0, 200), (200, 400)])
    """
    pieces = max(count for count in range(1, MOST_PIECES + 1)
                 if count == 1 or (seq_length % count == 0 and seq_length // count >= _SHORTEST_PIECE))
    length = seq_length // pieces
    return [(first, first + length) for first in range(0, seq_length, length)]
