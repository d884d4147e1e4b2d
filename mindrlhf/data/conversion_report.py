"""What a conversion says at its end."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Optional, Sequence

from mindrlhf.data.mindrecord_writer import LengthStatistics
from mindrlhf.tables import format_table

__all__ = ["ConversionReport"]


@dataclass(frozen=True)
class ConversionReport:
    """What became of the rows: counts of pairs, and where they are.

    Attributes:
        lengths:       of the pairs in `output`
        cut:           pairs with an answer that was cut at the sequence length
        cut_prompts:   pairs whose prompt lost its beginning
        dropped:       pairs that were left out because they are too long
        lost_by_cut:   pairs whose texts are the same after the cut, and were not before
        empty_answers: pairs with an answer that is empty
        identical:     pairs that were left out because both answers are the same
        prefixes:      pairs of which one text begins the other
        invalid:       rows that cannot be used, which are in `rejected_file`
        skipped:       pairs that say nothing of which answer is better, by the reason
        not_above_zero: margins of the pairs in `output`; None where they have none
        prompts:       of which there are pairs in `output`
        held_out:      lengths of the pairs in `held_out_file`
        gone:          files of an earlier conversion's held-out pairs, which are in `output` now
    """

    lengths: LengthStatistics
    cut: int
    empty_answers: int
    identical: int
    prefixes: int
    invalid: int
    rejected_file: Optional[Path]
    output: Path
    shard_num: int = 1
    cut_prompts: int = 0
    dropped: int = 0
    lost_by_cut: int = 0
    skipped: Dict[str, int] = field(default_factory=dict)
    not_above_zero: Optional[int] = None
    prompts: Optional[int] = None
    held_out: Optional[LengthStatistics] = None
    held_out_file: Optional[Path] = None
    gone: Sequence[str] = ()

    def as_text(self) -> str:
        """The closing lines for the user: the table of lengths, then what was cut, skipped and written."""
        row = self.lengths.as_dict()
        lines = [format_table([list(row), [str(value) for value in row.values()]]),
                 f"too long: {self.cut} with a cut answer, {self.cut_prompts} with a cut prompt, {self.dropped} "
                 f"dropped, {self.lost_by_cut} lost because the cut took their difference",
                 f"with an empty answer: {self.empty_answers}; skipped because both answers are the same: "
                 f"{self.identical}"]
        if self.prefixes:
            lines.append(f"one answer begins the other: {self.prefixes}; the token_wise loss compares padding, not "
                         "answers, and says nothing of their order; end_token compares their ends")
        if self.skipped:
            reasons = "; ".join(f"{count} for {reason}" for reason, count in self.skipped.items())
            lines.append(f"pairs left out that say nothing of which is better: {reasons}")
        if self.not_above_zero is not None:
            line = f"margins of 0 or below: {self.not_above_zero} of {self.lengths.count}"
            lines.append(f"{line}; training with objective.margin subtract takes them, scale refuses them"
                         if self.not_above_zero else line)
        if self.invalid:
            lines.append(f"invalid lines left out: {self.invalid}, see {self.rejected_file}")
        shards = f"{self.shard_num} shards of " if self.shard_num > 1 else ""
        if self.prompts in (None, self.lengths.count):
            lines.append(f"wrote {self.lengths.count} pairs to {shards}{self.output}")
        else:
            lines.append(f"wrote {self.lengths.count} pairs of {self.prompts} prompts to {shards}{self.output}")
        if self.held_out:
            share = self.held_out.count / (self.held_out.count + self.lengths.count)
            lines.append(f"held out {self.held_out.count} pairs ({share:.2%}), whose prompts are nowhere else, in "
                         f"{self.held_out_file}")
        if self.gone:
            lines.append(f"removed {', '.join(self.gone)}: what an earlier conversion held out is not held out now")
        return "\n".join(lines)
