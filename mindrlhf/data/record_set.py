"""The MindRecord files of a data set, opened once: what they are, how many pairs they have, and how they were made."""
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Tuple, Union

from mindrlhf.config.read import get
from mindrlhf.config.run_config import Model
from mindrlhf.data.mindrecord_files import check_files, check_head, find_record_files, read_sidecar, read_sidecars
from mindrlhf.errors import UserError, raise_each

__all__ = ["RecordSet", "check_records", "open_records"]

_SETTINGS = ("seq_length", "pad_token_id", "padding_side", "prompt_template", "tokenizer")


@dataclass(frozen=True)
class RecordSet:
    """A data set whose files are there, belong together, and have the sizes, headers and indices that were written.

    Attributes:
        files:        paths, in the order in which their pairs are read
        pairs:        in all of them, by their indices
        settings:     what their sidecars agree on, as far as they have it: `seq_length`, `pad_token_id`,
                      `padding_side`, `prompt_template`, `tokenizer`; {} without a sidecar
        sidecar:      the file that says so; None without one
        row_checksums: CRC-32 of the rows of each file; None where a sidecar does not know it
        unverifiable: files without checksums, as another converter writes them
    """

    files: Tuple[str, ...]
    pairs: int
    settings: Mapping[str, Any]
    sidecar: Optional[Path]
    row_checksums: Optional[Tuple[int, ...]]
    unverifiable: Tuple[str, ...]

    @classmethod
    def open(cls, paths: Union[str, Sequence[str]]) -> "RecordSet":
        """The data set that a file, a folder (searched to its bottom) or a list of both stands for. Reads no rows.

        Raises:
            UserError: there is no such file, one is not what was written, or they were made differently.
        """
        files = find_record_files(paths)
        if not files:
            raise UserError("data_loader.dataset_dir: empty, expected a MindRecord file, a folder of them or a list")
        settings, sidecar = _common_settings(files)
        check_files(files)
        for file in files:
            check_head(file)
        written = [(read_sidecar(file) or {}).get("files") for file in files]
        checksums = [(known or {}).get(Path(file).name, {}).get("rows") for file, known in zip(files, written)]
        return cls(tuple(files), sum(map(_count_pairs, files)), settings, sidecar,
                   None if None in checksums else tuple(checksums),
                   tuple(file for file, known in zip(files, written) if known is None))

    def verify_rows(self) -> None:
        """Read all rows (1.5 GB a second) and compare them with their checksums.

        Raises:
            UserError: they are not what was written.
        """
        check_files(self.files, whole=True)

    def __str__(self) -> str:
        return ", ".join(self.files)


def _common_settings(files: Sequence[str]) -> Tuple[Dict[str, Any], Optional[Path]]:
    settings: Dict[str, Any] = {}
    origin: Optional[Path] = None
    for path, sidecar in read_sidecars(files):
        found = {key: sidecar.get(key) for key in _SETTINGS}
        for key, value in found.items():
            if settings and value != settings[key]:
                raise UserError(f"{path}: {key} is {value!r}, but {origin} says {settings[key]!r}; files of one data "
                                "set must be made with the same settings")
        settings, origin = found, path
    return settings, origin


def _count_pairs(file: str) -> int:
    """The rows of a MindRecord file's index, which is an SQLite file."""
    try:
        connection = sqlite3.connect(f"{Path(f'{file}.db').absolute().as_uri()}?mode=ro", uri=True)
        try:
            return connection.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(f"{file}.db: not readable as the index of a MindRecord file: {error}; copy both again, or "
                        "convert again") from None


def open_records(mapping: Mapping[str, Any], block: str) -> RecordSet:
    """The data that `train_dataset` or `eval_dataset`, which are flags too, names.

    Raises:
        UserError: no data is named; see `RecordSet.open`.
    """
    loader = get(mapping, f"{block}.data_loader")
    paths = loader.get("dataset_dir") or loader.get("dataset_files")
    if not paths:
        raise UserError(f"no data: give --{block}, or {block}.data_loader.dataset_dir in the YAML")
    return RecordSet.open(paths)


def check_records(records: RecordSet, model: Model, exact: bool) -> None:
    """Raise `UserError` unless the data was made for a model with these dimensions.

    Args:
        exact: rows have the data's length, which must be the model's; otherwise it may be smaller
    """
    raise_each(str(records.sidecar), _record_problems(records.settings, model, exact))


def _record_problems(settings: Mapping[str, Any], model: Model, exact: bool) -> Iterable[str]:
    length, pad_token_id = settings.get("seq_length"), settings.get("pad_token_id")
    if length is not None and (length > model.seq_length or (exact and length != model.seq_length)):
        yield (f"the data's seq_length is {length}, model.model_config.seq_length (or --seq_length) is "
               f"{model.seq_length}; {'they must be equal' if exact else 'it must not be larger'}")
    if pad_token_id is not None and pad_token_id != model.pad_token_id:
        yield (f"the data's pad_token_id is {pad_token_id}, model.model_config.pad_token_id is {model.pad_token_id}; "
               "they must be equal")
    vocabulary = get(settings, "tokenizer.vocab_size")
    if isinstance(vocabulary, int) and vocabulary > model.dimensions.padded_vocab_size:
        yield (f"the data's tokenizer has {vocabulary} ids, model.model_config.padded_vocab_size is "
               f"{model.dimensions.padded_vocab_size}; expected at least as many")
