"""Tables, and sizes for people, as text."""
import unicodedata
from typing import Sequence

__all__ = ["format_table", "size_text"]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows (the first one is the heading) as aligned columns with a rule below the heading.

    >>> print(format_table([["count", "max"], ["3", "12"]]))
    count  max
    -----  ---
        3   12
    """
    widths = [max(_width(str(cell)) for cell in column) for column in zip(*rows)]
    lines = ["  ".join(" " * (width - _width(str(cell))) + str(cell) for cell, width in zip(row, widths))
             for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def size_text(count: float, digits: int = 1) -> str:
    """A number of bytes for people.

    >>> size_text(2_150_000), size_text(18.8e9, digits=2)
    ('2.1 MB', '18.80 GB')
    """
    return f"{count / 1e9:.{digits}f} GB" if count >= 1e9 else f"{count / 1e6:.{digits}f} MB"
