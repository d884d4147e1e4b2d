"""Preference data to MindRecord: the story of `cvalues_comparison.py`."""
import contextlib
from collections import Counter
from typing import Any, Dict

import numpy as np
from tqdm import tqdm

from mindrlhf import __version__
from mindrlhf.data.auto_length import LengthCounts, check_space
from mindrlhf.data.conversion_plan import LONGEST, ConversionPlan
from mindrlhf.data.conversion_report import ConversionReport
from mindrlhf.data.encode import encode_pair
from mindrlhf.data.encoding_processes import EncodedPair, EncodedSources
from mindrlhf.data.further_fields import further_fields
from mindrlhf.data.mindrecord_writer import HELD_OUT, HELD_OUT_OF, LengthStatistics, RecordWriter
from mindrlhf.data.preference import FewerRows, InvalidRow, Skipped
from mindrlhf.data.rejected_rows import RejectedRows
from mindrlhf.data.sources import Sources, Tally, open_sources
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.errors import UserError
from mindrlhf.output_paths import check_outputs

__all__ = ["convert_preferences"]

_COUNTED = ("cut", "empty_answers", "identical", "prefixes", "invalid")  # in a sidecar, whether there are any or not


def convert_preferences(plan: ConversionPlan) -> ConversionReport:
    """Convert preference data to MindRecord, its index and its sidecar.

    Raises:
        UserError: the source cannot be read or has no known format, a line is invalid (unless `skip_invalid`) or too
                   many are, no pair is left or fewer than `shard_num`, an output is one of the inputs or cannot be
                   written, there is no space, or an encoding process was ended from outside.
    """
    given, encoder, val_split, seq_length = plan.given, plan.encoder, plan.val_split, plan.seq_length
    writer = RecordWriter(plan.output, plan.shard_num)
    validation = writer.for_validation() if val_split else None
    rejected = RejectedRows(writer.path, plan.skip_invalid, with_place=len(given) > 1)
    check_outputs({"--dst_file": [*writer.files, *(validation.files if validation else []), rejected.path]},
                  {"--src_file": [path for path, _ in given], "--tokenizer": encoder.tokenizer.path})
    lengths, held_out, tally = LengthStatistics(), LengthStatistics(), Tally()
    counts = Counter(dict.fromkeys(_COUNTED, 0))
    with writer, validation or contextlib.nullcontext(), rejected:
        sources = open_sources(given, rejected.folder, plan.format_name, plan.reading)
        for file in sources.files:
            tqdm.write(f"format: {file.format}{f' ({file.name})' if len(given) > 1 else ''}")
        encoded = EncodedSources(sources, encoder, seq_length, plan.num_workers)
        if seq_length is None:
            found = _lengths_of(encoded, plan.skip_invalid)
            seq_length = found.fitting
            check_space(writer.path, rejected.folder, found.pairs, seq_length)
            encoded = encoded._replace(length=seq_length)
        with encoded.rows() as rows, _progress("convert", sources) as bar:
            for part in filter(None, (writer, validation)):
                part.open()  # while the other processes start
            for row in rows:
                if isinstance(row, FewerRows):
                    tqdm.write(str(row))
                    continue
                bar.update(tally.meet(row))
                if isinstance(row, Skipped):
                    continue
                if isinstance(row, InvalidRow):
                    rejected.add(row)
                    counts["invalid"] += 1
                    continue
                ids = row.ids()
                sample = None if row.dropped else encode_pair(
                    *ids, seq_length, plan.pad_token_id, plan.padding_side)
                _count(row, ids, sample is not None, plan.padding_side, counts)
                if sample is None:
                    continue
                is_held_out = validation is not None and row.prompt_place < val_split
                (held_out if is_held_out else lengths).add(row.prompt_length, *map(len, ids))
                (validation if is_held_out else writer).write(sample, further_fields(row))
                if not is_held_out:
                    tally.write(row)
        usable = lengths.count + held_out.count
        if not usable:
            raise UserError(_nothing_usable(sources, counts, tally))
        rejected.check_share(sources, tally.rows - counts["invalid"], plan.max_invalid)
        if validation and not (lengths.count and held_out.count):
            raise UserError(f"--val_split: {val_split} of the prompts of {sources} holds out {held_out.count} of "
                            f"{usable} pairs, expected some, and not all of them: too few prompts for this share")
        earlier_rejected = rejected.of_earlier_run()
        made = {
            "made_by": f"mindrlhf {__version__}", **_noted(sources), "seq_length": seq_length,
            "pad_token_id": plan.pad_token_id, "padding_side": plan.padding_side, **_noted_of(encoder)}
        sidecar, beside = {**made, **lengths.as_dict(), **counts}, None
        if tally.skipped:
            sidecar["skipped"] = dict(tally.skipped)
        if validation:
            sidecar[HELD_OUT] = {"file": validation.path.name, "val_split": val_split, "count": held_out.count}
            beside = validation, {**made, HELD_OUT_OF: writer.path.name, **held_out.as_dict()}
        gone = writer.finish(sidecar, beside)
        rejected_file = rejected.finish(earlier_rejected)
    return ConversionReport(lengths, output=writer.path, rejected_file=rejected_file, shard_num=plan.shard_num,
                            prompts=tally.prompts, skipped=dict(tally.skipped), not_above_zero=writer.not_above_zero,
                            held_out=held_out if validation else None,
                            held_out_file=validation.path if validation else None, gone=gone, **counts)


def _lengths_of(encoded: EncodedSources, skip_invalid: bool) -> LengthCounts:
    """How long the pairs of the sources are; the length that fits them is printed, with the longest text's."""
    lengths, tally = LengthCounts(), Tally()
    with encoded.rows() as rows, _progress("count tokens of", encoded.sources) as bar:
        for row in rows:
            if isinstance(row, FewerRows):
                continue
            bar.update(tally.meet(row))
            if isinstance(row, InvalidRow):
                if not skip_invalid:
                    raise row.as_error()
            elif isinstance(row, EncodedPair) and row.different:
                lengths.add(max(row.lengths()), row.place)
    if lengths.fitting > LONGEST:
        raise UserError(f"{encoded.sources}: the longest text has {lengths.longest} tokens, expected at most "
                        f"{LONGEST} for --seq_length auto; give the length at which longer ones are to be cut")
    if lengths.pairs:
        tqdm.write(f"--seq_length auto: {lengths.fitting} (the longest text has {lengths.longest} tokens)")
        warning = lengths.warning()
        if warning:
            tqdm.write(warning)
    return lengths


def _count(row: EncodedPair, ids, written: bool, padding_side: str, counts: Counter) -> None:
    """Count a pair by what became of it, under the names of `ConversionReport`."""
    if row.dropped:
        counts["dropped"] += 1
    elif not written:
        counts["lost_by_cut" if row.different else "identical"] += 1
    else:
        counts["cut"] += row.cut_answer
        counts["empty_answers"] += row.empty_answer
        if row.cut_prompt:
            counts["cut_prompts"] += 1
        shorter = min(map(len, ids))
        counts["prefixes"] += padding_side == "right" and np.array_equal(*(text[:shorter] for text in ids))


def _nothing_usable(sources: Sources, counts: Counter, tally: Tally) -> str:
    too_long = counts["dropped"] + counts["lost_by_cut"]
    others = [f", {too_long} too long"] * (too_long > 0)
    others += [f", {count} with {reason}" for reason, count in tally.skipped.items()]
    return (f"{sources}: no usable pair ({counts['invalid']} invalid lines, {counts['identical']} with two equal "
            f"answers{''.join(others)}), expected at least one")


def _noted(sources: Sources) -> Dict[str, Any]:
    """What a sidecar says of where the pairs are from."""
    noted: Dict[str, Any] = {"source": sources.names if len(sources.files) > 1 else sources.names[0]}
    formats = [file.format for file in sources.files]
    if set(formats) != {"cvalues"}:
        noted["format"] = formats if len(formats) > 1 else formats[0]
    if sources.reading.columns:
        noted["columns"] = dict(sources.reading.columns)
    if "pku-saferlhf" in formats:
        noted["preference"] = sources.reading.preference or "better"
    if sources.reading.grades:
        noted.update(grades=dict(sources.reading.grades), margin_scale=sources.reading.scale)
    return noted


def _noted_of(encoder: TextEncoder) -> Dict[str, Any]:
    """What a sidecar says of how texts became ids."""
    tokenizer = encoder.tokenizer
    noted = {"prompt_template": encoder.noted,
             "tokenizer": {**tokenizer.identity, "vocab_size": tokenizer.vocab_size}}
    if encoder.add_eos:
        noted["add_eos"] = True
    if encoder.too_long != "cut":
        noted["too_long"] = encoder.too_long
    return noted


def _progress(what: str, sources: Sources) -> tqdm:
    """A bar with rate and time left, of rows."""
    return tqdm(desc=f"{what} {sources.title}", total=sources.row_count(), unit=" rows", mininterval=0.5)
