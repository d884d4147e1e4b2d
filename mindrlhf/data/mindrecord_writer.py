"""Writing MindRecord files of samples, whole or not at all, and their sidecar."""
import contextlib
import json
import os
import re
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np

from mindrlhf.atomic import naming_a_full_disk, partial_folder
from mindrlhf.compat.records import spare_writer
from mindrlhf.data.encode import FIELDS
from mindrlhf.data.further_fields import FURTHER_FIELDS, KEPT, MARGIN, NOT_ABOVE_ZERO, completed, schema_of
from mindrlhf.data.mindrecord_files import (
    CHECKSUM,
    HEADER_BYTES,
    fingerprint,
    read_sidecar,
    sidecar_checksum,
    sidecar_path,
)
from mindrlhf.data.preference import MOST_KEPT
from mindrlhf.errors import UserError
from mindrlhf.output_paths import follow_link
from mindrlhf.signals import undisturbed

__all__ = ["HELD_OUT", "HELD_OUT_OF", "LengthStatistics", "RecordWriter", "validation_path"]

# A sidecar's keys: how many pairs were held out and where they are; what they were held out of.
HELD_OUT, HELD_OUT_OF = "held_out", "held_out_of"
_BATCH = 128  # rows handed to MindRecord at once; one by one it is half as fast
_BATCH_BYTES = 256 << 20
_MAX_SHARDS = 1000  # MindRecord's own limit
# MindRecord makes the index of a page in 1.9 kB of memory for each of its up to 58,000 entries a MB: with its own pages
# of 32 MB memory grows with the data. A header must hold 195 bytes a page.
_PAGE_BYTES, _MAX_PAGE_BYTES = 512 << 10, 256 << 20
_NOTHING: Mapping[str, Union[int, float, str]] = MappingProxyType({})
_PAGE_ROWS = 5  # that a page must hold at least: what is left of it after the last one is lost


@dataclass
class LengthStatistics:
    """Counts, and lengths in tokens, of what was converted: the table that is published for the data set.

    `prompt` is the length of the prompts alone, `chosen` and `reject` that of the samples as written: template,
    prompt and answer, cut at the sequence length.
    """

    count: int = 0
    maxima: Dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "chosen", "reject"), 0))
    sums: Dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "chosen", "reject"), 0))

    def add(self, prompt: int, chosen: int, reject: int) -> None:
        """Count one pair with these lengths in tokens."""
        self.count += 1
        for name, length in (("prompt", prompt), ("chosen", chosen), ("reject", reject)):
            self.maxima[name] = max(self.maxima[name], length)
            self.sums[name] += length

    def as_dict(self) -> Dict[str, Union[int, float]]:
        """count, prompt_max, prompt_avg, chosen_max, chosen_avg, reject_max, reject_avg."""
        row: Dict[str, Union[int, float]] = {"count": self.count}
        for name in ("prompt", "chosen", "reject"):
            row[f"{name}_max"] = self.maxima[name]
            row[f"{name}_avg"] = round(self.sums[name] / self.count, 1) if self.count else 0.0
        return row


def _known(record: Path) -> Dict[str, Any]:
    """The sidecar of an earlier conversion to an output; {} if there is none, or it is damaged: what is not known
    stays.
    """
    try:
        return read_sidecar(record) or {}
    except UserError:
        return {}


def _files_of(record: Path, sidecar: Mapping[str, Any]) -> Set[str]:
    """Names of MindRecord files and indices that a sidecar knows."""
    return {name for name in sidecar.get("files") or {}
            if re.fullmatch(re.escape(record.name) + r"\d*(\.db)?", name)}


def validation_path(record: Path) -> Path:
    """Where the pairs go that a conversion to a file holds out.

    >>> validation_path(Path("data/train.mindrecord")).as_posix()
    'data/train.val.mindrecord'
    """
    return record.with_name(f"{record.name[:-len(record.suffix)]}.val{record.suffix}")


class RecordWriter:
    """Writes `OUT.mindrecord`, its index `OUT.mindrecord.db` and the sidecar, which appear under their names only
    when `finish` has been called; leaving the context without it leaves everything as it was. If `OUT.mindrecord` is a
    link, all of them are written where it leads to.

    With more than one shard the rows are spread evenly over `OUT.mindrecord0`, `OUT.mindrecord1` and so on (as many
    digits as the last one needs), each with its index, and one sidecar. Files grow in a hidden folder beside the
    output (MindRecord stores its own file name, so a file cannot be renamed, only moved).
    """

    def __init__(self, path: Union[str, Path], shard_num: int = 1):
        self.path = follow_link(Path(path))
        if not self.path.name.endswith(".mindrecord"):
            raise UserError(f"--dst_file: found {self.path.name!r}, expected a name that ends in .mindrecord")
        if self.path.is_dir():
            raise UserError(f"--dst_file: {self.path} is a folder, expected a file name that ends in .mindrecord")
        if not 1 <= shard_num <= _MAX_SHARDS:
            raise UserError(f"--shard_num: found {shard_num}, expected 1 to {_MAX_SHARDS}")
        digits = len(str(shard_num - 1))
        self._records = [self.path] if shard_num == 1 else [
            self.path.with_name(f"{self.path.name}{shard:0{digits}}") for shard in range(shard_num)]
        for place in self.files:
            if place.is_symlink() or (place.exists() and not place.is_file()):
                raise UserError(f"--dst_file: {place}: a link, a folder or a device in the place of an output; the "
                                "files of a conversion lie beside each other: remove it, or choose another name")
        self._batch = max(_BATCH, shard_num)  # a batch with fewer rows leaves shards out
        self._count = self._flushed = 0
        self._further: List[str] = []  # fields beside the seven, in the order of the schema
        self.not_above_zero: Optional[int] = None  # margins, of how many samples; None where there are no margins
        self._rows: List[Dict[str, Any]] = []
        self._folder: Optional[Path] = None
        self._writer: Any = None
        self._stack = contextlib.ExitStack()

    @property
    def files(self) -> List[Path]:
        """All that `finish` puts in place: indices, records, sidecar."""
        return [*(Path(f"{record}.db") for record in self._records), *self._records, sidecar_path(self.path)]

    def __enter__(self) -> "RecordWriter":
        with contextlib.ExitStack() as stack:
            try:
                self._folder = stack.enter_context(partial_folder(self.path))
            except OSError as error:
                raise UserError(f"--dst_file: {self.path}: cannot be written: {error.strerror}") from None
            self._check_header_fits()
            self._stack = stack.pop_all()
        return self

    def open(self) -> None:
        """Open the files, for which MindSpore is loaded; the first `write` does it otherwise."""
        from mindspore.mindrecord import FileWriter
        self._writer = FileWriter(str(self._folder / self.path.name), shard_num=len(self._records), overwrite=True)

    def _begin(self, size: int, further: Iterable[str]) -> None:
        """Give the open files their schema, and pages for samples of `size` bytes."""
        self._further = [name for name in FURTHER_FIELDS if name in schema_of(further)]
        self._batch = max(min(self._batch, _BATCH_BYTES // size), len(self._records))
        arrays = {name: {"type": np.dtype(kind).name, "shape": [-1]} for name, kind in FIELDS.items()}
        self._writer.add_schema({**arrays, "end_ind": {"type": np.dtype(FIELDS["end_ind"]).name},
                                 **{name: {"type": FURTHER_FIELDS[name]} for name in self._further}},
                                "preference pairs")
        self._writer.set_header_size(HEADER_BYTES)
        wanted = _PAGE_ROWS * size
        self._writer.set_page_size(min(max(wanted // 4096 * 4096 + 4096, _PAGE_BYTES), _MAX_PAGE_BYTES))
        spare_writer(self._writer)

    def _widen(self, size: int, further: Iterable[str]) -> None:
        """Begin again with further fields: a schema is given before the first row. What was written is copied."""
        before, pending, self._rows = self._further, self._rows, []
        narrow = self._folder / "narrow"
        if self._flushed:
            self._call(self._writer.commit)
            narrow.mkdir()
            for record in self._records:
                for name in (record.name, f"{record.name}.db"):
                    os.replace(self._folder / name, narrow / name)
        self.open()
        self._begin(size, {*before, *further})
        if self._flushed:
            import mindspore.dataset as ds
            rows = ds.MindDataset([str(narrow / record.name) for record in self._records], shuffle=False,
                                  columns_list=[*FIELDS, *before])
            for row in rows.create_dict_iterator(num_epochs=1, output_numpy=True):
                self._add({name: row[name] for name in FIELDS}, {name: row[name].item() for name in before})
            shutil.rmtree(narrow)
        for row in pending:
            self._add({name: row[name] for name in FIELDS}, {name: row[name] for name in before})

    def _check_header_fits(self) -> None:
        """Raise `OSError` where a file may not be as large as its header (a limit of the shell, say), which would end
        MindRecord with SIGSEGV. The header is a hole: this takes no space.
        """
        probe = self._folder / "probe"
        with naming_a_full_disk(self.path), open(probe, "wb") as file:
            file.truncate(HEADER_BYTES + 1)
        probe.unlink()

    def write(self, sample: Mapping[str, np.ndarray],
              further: Mapping[str, Union[int, float, str]] = _NOTHING) -> None:
        """Add a sample with the fields of `FIELDS`, and those of `FURTHER_FIELDS` that it has.

        Raises:
            ValueError: it has a margin, or something kept, where others have none, or none where others have one.
        """
        if self._writer is None:
            self.open()
        for name, what in ((MARGIN, "a margin"), (KEPT, "what is kept")):
            if self._count and (name in further) != (name in self._further):
                raise ValueError(f"{what} is in all samples of a file, or in none")
        if not self._count or not further.keys() <= set(self._further):
            size = sum(value.nbytes for value in sample.values()) + (MOST_KEPT if KEPT in further else 0)
            (self._widen if self._count else self._begin)(size, further)
        self._add(sample, further)
        self._count += 1
        if MARGIN in further:
            self.not_above_zero = (self.not_above_zero or 0) + bool(np.float32(further[MARGIN]) <= 0)

    def _add(self, sample: Mapping[str, np.ndarray], further: Mapping[str, Union[int, float, str]]) -> None:
        self._rows.append({**sample, "end_ind": int(sample["end_ind"]), **completed(further, self._further)})
        if len(self._rows) >= self._batch:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._call(self._writer.write_raw_data, self._rows)
            self._flushed += len(self._rows)
            self._rows = []

    def for_validation(self) -> "RecordWriter":
        """A writer of the pairs that are held out, one file beside this one's."""
        place = validation_path(self.path)
        if place.is_symlink():
            raise UserError(f"--val_split: {place}: a link, in the place of an output; the files of a conversion lie "
                            "beside each other: remove it, or choose another --dst_file")
        return RecordWriter(place)

    def finish(self, sidecar: Dict[str, Any],
               validation: Optional[Tuple["RecordWriter", Dict[str, Any]]] = None) -> List[str]:
        """Close the files and move them to their names; then files of an earlier conversion to the same output that
        have other names (another number of shards, pairs that were held out) go, as far as its sidecar knows them.

        Args:
            sidecar:    what it says, beside what was written
            validation: the writer of the pairs that were held out, if there are any, and their sidecar: its files
                        appear along with these

        Returns:
            names of the files that an earlier conversion held out and that are gone

        Raises:
            UserError: there are fewer rows than shards, or MindRecord cannot write.
        """
        earlier, held_out = self._files_of_earlier_run(), self._held_out_by_earlier_run()
        self._close(sidecar)
        if validation:
            other, its_sidecar = validation
            earlier_of_other = other._files_of_earlier_run()
            other._close(its_sidecar)
            held_out.difference_update(place.name for place in other.files)
        index = Path(f"{validation_path(self.path)}.db")
        with undisturbed():
            # Held-out pairs of an earlier run may be in the new file: without their index they are refused at once.
            if validation or index.name in held_out:
                index.unlink(missing_ok=True)
            self._move(earlier.union(held_out))
            if validation:
                other._move(earlier_of_other, [*other.files[1:], index])
        return sorted(held_out)

    def _close(self, sidecar: Dict[str, Any]) -> None:
        """Write what is left, and the sidecar, in the hidden folder."""
        if self._count < len(self._records):
            raise UserError(f"--shard_num: found {len(self._records)}, expected at most {self._count}, the number of "
                            "pairs")
        self._flush()
        self._call(self._writer.commit)
        files = [file.name for file in self.files[:-1]]
        if self._further:
            sidecar = {**sidecar, "schema": 2, "fields": self._further}
        if self.not_above_zero is not None:
            sidecar[NOT_ABOVE_ZERO] = self.not_above_zero
        sidecar = {**sidecar, "files": {file: fingerprint(self._folder / file, whole=True) for file in sorted(files)}}
        sidecar[CHECKSUM] = sidecar_checksum(sidecar)
        # A name that is not UTF-8, in which Python has halves of surrogate pairs, becomes JSON's escapes.
        with naming_a_full_disk(self.files[-1]), open(self._folder / self.files[-1].name, "w", encoding="utf-8",
                                                      errors="backslashreplace") as file:
            json.dump(sidecar, file, ensure_ascii=False, allow_nan=False, indent=2)
            file.write("\n")

    def _move(self, earlier: Set[str], places: Sequence[Path] = ()) -> None:
        """Put the files in their places, in this order, and remove those of an earlier run that have other names."""
        for place in places or self.files:
            os.replace(self._folder / place.name, place)
        for name in earlier.difference(place.name for place in self.files):
            place = self.path.with_name(name)
            if place.is_file() and not place.is_symlink():
                place.unlink()

    def _files_of_earlier_run(self) -> Set[str]:
        """Names of MindRecord files and indices that the sidecar of an earlier conversion to this output knows."""
        return _files_of(self.path, _known(self.path))

    def _held_out_by_earlier_run(self) -> Set[str]:
        """Names of the files with what an earlier conversion to this output held out, as both sidecars say."""
        place = validation_path(self.path)
        sidecar = _known(place) if HELD_OUT in _known(self.path) else {}
        if sidecar.get(HELD_OUT_OF) != self.path.name:
            return set()
        return {*_files_of(place, sidecar), sidecar_path(place).name}

    def _call(self, function, *args) -> None:
        try:
            function(*args)
        except RuntimeError as error:  # MindRecord's C++ side has one exception for everything
            room = f"{shutil.disk_usage(self._folder).free >> 20} MB free on the disk"
            limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            if limit != resource.RLIM_INFINITY:
                room += f", files of at most {limit >> 20} MB (ulimit -f)"
            lines = str(error).splitlines()
            reason = next((line for line in lines if line.startswith("[ERROR]")), lines[0]).replace("[ERROR] ", "")
            raise UserError(f"{self.path}: MindRecord could not be written ({room}): {reason}") from None

    def __exit__(self, *_) -> None:
        self._writer = None
        self._stack.close()
