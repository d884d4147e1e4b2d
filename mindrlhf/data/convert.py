"""CValues-Comparison to MindRecord: the story of `cvalues_comparison.py`."""
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from mindrlhf import __version__
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.preference import Rejected, read_preferences
from mindrlhf.data.record import LengthStatistics, RecordWriter
from mindrlhf.data.template import render
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.errors import UserError
from mindrlhf.report import format_table

__all__ = ["ConversionReport", "convert_preferences"]


@dataclass(frozen=True)
class ConversionReport:
    """What became of the rows of a file. All but `lengths` are counts of pairs."""

    lengths: LengthStatistics
    cut: int
    empty_answers: int
    identical: int
    invalid: int
    rejected_file: Optional[Path]
    output: Path

    def as_text(self) -> str:
        """The closing lines for the user: the table of lengths, then what was cut, skipped and written."""
        row = self.lengths.as_dict()
        lines = [format_table([list(row), [str(value) for value in row.values()]]),
                 f"cut at the sequence length: {self.cut}; with an empty answer: {self.empty_answers}; "
                 f"skipped because both answers are the same: {self.identical}"]
        if self.invalid:
            lines.append(f"invalid lines left out: {self.invalid}, see {self.rejected_file}")
        lines.append(f"wrote {self.lengths.count} pairs to {self.output}")
        return "\n".join(lines)


def convert_preferences(source: Path, output: Path, tokenizer: Tokenizer, seq_length: int, template: str,
                        padding_side: str = "right", pad_token_id: Optional[int] = None,
                        skip_invalid: bool = False) -> ConversionReport:
    """Convert a file of preference pairs to `output`, its index and its sidecar.

    Args:
        source:       .jsonl (or .json array) with prompt, pos_resp, neg_resp
        output:       OUT.mindrecord
        tokenizer:    text to ids
        seq_length:   N, tokens a sample; longer texts are cut
        template:     see `mindrlhf.data.template`
        padding_side: "right" or "left"
        pad_token_id: default: the tokenizer's
        skip_invalid: leave out lines that cannot be used and write them to OUT.mindrecord.rejected.jsonl

    Raises:
        UserError: the source cannot be read, a line is invalid (unless `skip_invalid`), or no pair is left.
    """
    pad_token_id = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
    lengths, counts = LengthStatistics(), dict.fromkeys(("cut", "empty_answers", "identical", "invalid"), 0)
    with RecordWriter(output) as writer, _RejectedLines(output, skip_invalid) as rejected, _progress(source) as bar:
        for row in read_preferences(source):
            bar.update()
            if isinstance(row, Rejected):
                rejected.add(row)
                counts["invalid"] += 1
                continue
            _, prompt, chosen, reject = row
            prompt_ids, chosen_ids, reject_ids = tokenizer.encode_batch(
                [prompt.strip(), render(template, prompt, chosen), render(template, prompt, reject)])
            sample = encode_pair(chosen_ids, reject_ids, seq_length, pad_token_id, padding_side)
            if sample is None:
                counts["identical"] += 1
                continue
            counts["cut"] += max(len(chosen_ids), len(reject_ids)) > seq_length
            counts["empty_answers"] += not (chosen.strip() and reject.strip())
            lengths.add(len(prompt_ids), min(len(chosen_ids), seq_length), min(len(reject_ids), seq_length))
            writer.write(sample)
        if not lengths.count:
            raise UserError(f"{source}: no usable pair ({counts['invalid']} invalid lines, {counts['identical']} with "
                            "two equal answers), expected at least one")
        writer.finish({
            "made_by": f"mindrlhf {__version__}", "source": source.name, "seq_length": seq_length,
            "pad_token_id": pad_token_id, "padding_side": padding_side, "prompt_template": template,
            "tokenizer": {"file": tokenizer.path.name, "sha256": tokenizer.sha256,
                          "vocab_size": tokenizer.vocab_size},
            **lengths.as_dict(), **counts})
        rejected_file = rejected.finish()
    return ConversionReport(lengths, output=output, rejected_file=rejected_file, **counts)


class _RejectedLines:
    """Takes invalid lines: the first one ends the run, or with `keep` all go to OUT.mindrecord.rejected.jsonl."""

    def __init__(self, output: Path, keep: bool):
        self.keep = keep
        self.path = output.with_name(f"{output.name}.rejected.jsonl")
        self._file = None

    def __enter__(self) -> "_RejectedLines":
        return self

    def add(self, line: Rejected) -> None:
        if not self.keep:
            raise line.as_error()
        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed by finish or __exit__)
                "w", encoding="utf-8", dir=self.path.parent, delete=False, prefix=f".{self.path.name}.",
                errors="backslashreplace")  # half of a surrogate pair becomes the JSON escape that it came from
        place = int(line.place.rpartition(":")[2].removeprefix("item "))
        json.dump({"line": place, "reason": line.reason, "text": line.text}, self._file, ensure_ascii=False)
        self._file.write("\n")

    def finish(self) -> Optional[Path]:
        """Move the file to its name; an older one goes when there is nothing to say."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return None
        self._file.close()
        os.chmod(self._file.name, 0o644)
        os.replace(self._file.name, self.path)
        return self.path

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)


def _progress(source: Path) -> tqdm:
    """A bar with rate and time left; the number of rows of a .jsonl file is that of its line breaks."""
    total = None
    try:
        with open(source, "rb") as file:
            if source.suffix != ".json":
                total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except (OSError, ValueError):
        pass  # reading says so, in a moment
    return tqdm(desc=f"convert {source.name}", total=total, unit=" pairs", mininterval=0.5)
