"""What a file is that is not what was expected, by its first bytes."""
from pathlib import Path
from typing import Optional, Union

__all__ = ["HEAD_BYTES", "kind_of_file", "known_kind"]

HEAD_BYTES = 512
_BEGINNINGS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer in the file's place: git lfs pull fetches the file",
    b"\x1f\x8b": "a gzip archive: gunzip it first",
    b"PK\x03\x04": "a ZIP archive (or an Excel sheet, or PyTorch's weights): unpack or export it first",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unzstd it first",
    b"BZh": "a bzip2 archive: bunzip2 it first",
    b"\xfd7zXZ\0": "an xz archive: unxz it first",
    b"PAR1": "a Parquet file: write its rows as JSON lines first",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"<!DOCTYPE": "a web page: the download was none",
    b"<html": "a web page: the download was none",
}


def known_kind(head: bytes) -> Optional[str]:
    """What a file is that begins with `head`, and what to do then; None where its beginning says nothing.

    >>> known_kind(b"\\x1f\\x8b\\x08")
    'a gzip archive: gunzip it first'
    >>> known_kind(b'{"prompt"') is None
    True
    """
    return next((text for beginning, text in _BEGINNINGS.items() if head.startswith(beginning)), None)


def kind_of_file(path: Union[str, Path]) -> Optional[str]:
    """The same of a file that cannot be read as what it was taken for; None also where it cannot be read at all.

    Only such a file is asked: a sound one in a binary format may begin like another kind by chance.
    """
    try:
        with open(path, "rb") as file:
            return known_kind(file.read(HEAD_BYTES))
    except OSError:
        return None
