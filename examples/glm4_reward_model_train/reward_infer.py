#!/usr/bin/env python3
r"""Score answers with a reward model.

    bash ../../scripts/msrun_launcher.sh \
     "reward_infer.py --config ../../model_configs/glm_config/run_glm4_9b_rm.yaml \
      --data_file /path/to/input.jsonl --tokenizer /path/to/tokenizer.model \
      --distributed_ckpt_path /path/to/checkpoint_network" 8 9123 output/msrun_log False 600

The input is preference data of any format (FORMATS_EN.md beside this script), or has prompt and response in a row. The
output has a line for each: the row's own keys, and pos_score and neg_score, chosen_score and rejected_score, or score;
"cut": true where a text was too long. It grows as OUTPUT_FILE.partial, from which --resume goes on. Exit code 3: all
rows are written, and scores that are NaN or infinite are null.
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

from mindrlhf.cli import add_format_flags, add_set_flag, add_text_flags, new_parser, positive_int, score_key
from mindrlhf.errors import run_main


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--config", required=True, help="the run's YAML")
    parser.add_argument("--data_file", required=True, type=Path,
                        help="rows to score: .jsonl, .json, .csv, .parquet, .arrow, each also .gz, a folder made by "
                             "datasets.save_to_disk, or a pipe, as /dev/stdin")
    add_format_flags(parser)
    parser.add_argument("--tokenizer", required=True, help="the tokenizer file that the training data was made with")
    parser.add_argument("--distributed_ckpt_path", required=True,
                        help="a .ckpt file, or a folder with rank_0, ... (output/checkpoint_network)")
    parser.add_argument("--seq_length", type=positive_int, help="tokens a text; longer ones are cut (default: YAML)")
    add_set_flag(parser)
    parser.add_argument("--output_file", type=Path,
                        help="default: scores.jsonl in the YAML's output_dir; for the model of a folder's second run, "
                             "scores_1.jsonl. Rows go to a pipe or a device, as /dev/stdout, as they are scored")
    parser.add_argument("--score_key", type=score_key, default="score", metavar="NAME",
                        help="the key of a response's score (default: score), or of the list of several; those of a "
                             "pair are pos_NAME and neg_NAME, or chosen_NAME and rejected_NAME")
    parser.add_argument("--normalize", type=Path, metavar="EVAL_JSON",
                        help="give (score - mean) / std in place of each score, with mean and std of the checkpoint's "
                             "entry in this eval.json of reward_eval.py")
    parser.add_argument("--skip_invalid", action="store_true",
                        help="write rows that cannot be scored to OUTPUT_FILE.invalid.jsonl and go on; otherwise the "
                             "first one ends the run")
    parser.add_argument("--resume", action="store_true",
                        help="go on from OUTPUT_FILE.partial, which a run that was cut short has left, if there is one")
    parser.add_argument("--verbose", action="store_true",
                        help="show MindFormers' log, and each text with its score, on the terminal too")
    add_text_flags(parser)
    return parser.parse_args(argv)


def main() -> int:
    """Check everything that needs no device, then score."""
    args = parse_args()
    from mindrlhf.scoring.infer import infer
    from mindrlhf.scoring.plan import plan_inference
    infer(plan_inference(args), args.verbose)
    return 0


if __name__ == "__main__":
    run_main(main)
