#!/usr/bin/env python3
r"""Accuracy of a reward model on preference data: how often the better answer gets the higher score.

    bash ../../scripts/msrun_launcher.sh \
     "reward_eval.py --config ../../model_configs/glm_config/run_glm4_9b_rm.yaml \
      --eval_dataset /path/to/test.mindrecord --batch_size 16 \
      --distributed_ckpt_path /path/to/checkpoint_network --load_all_ckpt False" 8 9123 output/msrun_log False 600

--data_file with --tokenizer in place of --eval_dataset evaluates on text as it is, without a conversion. With --format
reward-bench or reward-bench-2, the benchmark's own figures are in results/BENCHMARK/CHECKPOINT.json too.
A flag that is not given leaves the YAML's value. In the YAML's output_dir, eval.json has the figures, eval_scores.jsonl
each pair with its scores, eval_scores.png their distributions, and eval_groups.png accuracy by group and reliability;
of several checkpoints, eval_steps.png has accuracy over steps. Exit code 3: some scores are NaN or infinite, and are
not counted.
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
    add_set_flag,
    add_text_flags,
    boolean,
    key_list,
    new_parser,
    positive_int,
    score_key,
)
from mindrlhf.errors import run_main


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--config", required=True, help="the run's YAML")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--eval_dataset", nargs="+", metavar="PATH", help="MindRecord files, or folders of them")
    data.add_argument("--data_file", type=Path, metavar="FILE",
                      help="preference data as text, in any format and kind of file that cvalues_comparison.py reads")
    parser.add_argument("--tokenizer", help="the tokenizer file that the data was made with; with MindRecord it shows "
                                            "the pairs that are scored wrongly, in the log")
    add_format_flags(parser)
    add_preference_flag(parser)
    add_text_flags(parser)
    parser.add_argument("--group_by", type=key_list, default=(), metavar="KEY,...",
                        help="figures by the values of these keys of the rows, such as pos_type,neg_type; with "
                             "MindRecord, keys that cvalues_comparison.py --keep has kept")
    parser.add_argument("--score_key", type=score_key, default="score", metavar="NAME",
                        help="the keys of a pair's scores in eval_scores.jsonl are chosen_NAME and rejected_NAME "
                             "(default: score)")
    parser.add_argument("--batch_size", type=positive_int,
                        help="bounds what is scored at once; does not change the result")
    parser.add_argument("--seq_length", type=positive_int, help="tokens of the longest text; the data's may be smaller")
    add_set_flag(parser)
    parser.add_argument("--distributed_ckpt_path", required=True,
                        help="a .ckpt file, or a folder with rank_0, ... (output/checkpoint_network)")
    parser.add_argument("--load_all_ckpt", type=boolean, metavar="BOOL", default=False,
                        help="True: all checkpoints of a folder's last run in the order of their steps, without those "
                             "that it went back from; False (default): the last")
    parser.add_argument("--verbose", action="store_true",
                        help="show MindFormers' log, and the accuracy of each batch, on the terminal too")
    args = parser.parse_args(argv)
    if args.data_file and not args.tokenizer:
        parser.error("argument --data_file: needs --tokenizer, expected both")
    for flag in ("format", "columns", "preference", "prompt_template", "add_eos"):
        if not args.data_file and getattr(args, flag) not in (None, ()):
            parser.error(f"argument --{flag}: has an effect with --data_file only")
    return args


def main() -> int:
    """Check everything that needs no device, then evaluate."""
    args = parse_args()
    from mindrlhf.scoring.evaluate import evaluate
    from mindrlhf.scoring.plan import plan_evaluation
    evaluate(plan_evaluation(args), args.verbose)
    return 0


if __name__ == "__main__":
    run_main(main)
