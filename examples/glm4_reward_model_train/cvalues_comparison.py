#!/usr/bin/env python3
r"""Convert preference data to MindRecord for reward_train.py and reward_eval.py.

    python cvalues_comparison.py --tokenizer /path/to/tokenizer.model \
        --src_file train.jsonl --dst_file train.mindrecord --seq_length 8192

CValues-Comparison has prompt, pos_resp (the better answer) and neg_resp (the worse one) in a row. The other formats
and the kinds of files that are read are in FORMATS_EN.md beside this script.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until `begin`

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not
if __name__ == "__main__":
    from mindrlhf.entry import begin
    begin()

import argparse
from typing import Optional, Sequence

from mindrlhf.cli import (
    add_format_flags,
    add_preference_flag,
    grades,
    inner_share,
    new_parser,
    positive_int,
    positive_number,
    share,
    source_file,
    template,
)
from mindrlhf.data.template import PROMPT_TEMPLATE
from mindrlhf.data.too_long import TOO_LONG
from mindrlhf.errors import run_main


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--tokenizer", required=True, type=Path,
                        help="GLM-4's tokenizer.model (rank file), transformers' tokenizer.json, a folder with one of "
                             "them, or a SentencePiece model (ChatGLM2, ChatGLM3)")
    parser.add_argument("--src_file", required=True, type=source_file, nargs="+", metavar="FILE",
                        help="one or more files of preference data: .jsonl, .json, .csv, .parquet, .arrow, each also "
                             ".gz, a folder made by datasets.save_to_disk, or a pipe; FILE#5000 takes the first 5000 "
                             "rows")
    add_format_flags(parser)
    add_preference_flag(parser)
    parser.add_argument("--grades", type=grades, default=(), metavar="KIND=GRADE,...",
                        help="of CValues' pos_type and neg_type; a pair's margin is the difference of its grades")
    parser.add_argument("--margin_scale", type=positive_number, metavar="NUMBER",
                        help="of --grades: times the difference; default: 1")
    parser.add_argument("--dst_file", required=True, type=Path, help="the MindRecord file, NAME.mindrecord")
    parser.add_argument("--seq_length", required=True, type=_seq_length,
                        help="tokens a sample, the model's seq_length; longer texts are cut. auto: the smallest "
                             "multiple of 64 that cuts nothing, for which the texts are encoded twice")
    parser.add_argument("--too_long", choices=TOO_LONG, default="cut",
                        help="of longer texts: cut their end; cut the prompt's beginning; or drop the pair. Default: "
                             "cut")
    parser.add_argument("--padding_side", choices=("right", "left"), default="right", help="default: right")
    parser.add_argument("--pad_token_id", type=int, help="default: the tokenizer's (151329 for GLM-4)")
    parser.add_argument("--prompt_template", type=template, default=PROMPT_TEMPLATE,
                        help="text with {prompt} and {response}, \\n for line breaks; glm4-chat; or a .jinja file")
    parser.add_argument("--add_eos", action="store_true",
                        help="end texts with <|endoftext|>, where their score is read")
    parser.add_argument("--skip_invalid", action="store_true",
                        help="leave out invalid lines and write them, with the reason, to DST_FILE.rejected.jsonl")
    parser.add_argument("--max_invalid", type=share, metavar="SHARE",
                        help="of --skip_invalid: if a larger share of the lines is invalid, write nothing; default: "
                             "0.01")
    parser.add_argument("--num_workers", type=positive_int, default=1,
                        help="processes that encode, beside the one that writes; default: 1")
    parser.add_argument("--shard_num", type=positive_int, default=1,
                        help="more than 1: pairs are spread over so many files DST_FILE0, DST_FILE1, ...; default: 1")
    parser.add_argument("--val_split", type=inner_share, metavar="SHARE",
                        help="so large a share of the prompts, such as 0.02, goes to NAME.val.mindrecord beside, with "
                             "all of their pairs; which ones depends on the prompts alone")
    args = parser.parse_args(argv)
    if args.margin_scale is not None and not args.grades:
        parser.error("argument --margin_scale: has an effect with --grades only")
    if args.max_invalid is not None and not args.skip_invalid:
        parser.error("argument --max_invalid: has an effect with --skip_invalid only")
    return args


def _seq_length(text: str) -> Optional[int]:
    """A number of tokens; None for auto."""
    try:
        return None if text == "auto" else positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def main() -> int:
    """Check everything that is known before the rows, convert, print what became of them."""
    args = parse_args()
    from mindrlhf.data.conversion_plan import plan_conversion
    from mindrlhf.data.convert import convert_preferences
    report = convert_preferences(plan_conversion(args))
    sys.stdout.write(report.as_text() + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
