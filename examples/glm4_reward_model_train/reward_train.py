#!/usr/bin/env python3
r"""Train a GLM-4 reward model on MindRecord data made by cvalues_comparison.py.

    bash ../../scripts/msrun_launcher.sh \
     "reward_train.py --config ../../model_configs/glm_config/run_glm4_9b_rm.yaml \
      --train_dataset /path/to/train.mindrecord" 8 9123 output/msrun_log False 600

Checkpoints go to output/checkpoint (with optimizer state) and output/checkpoint_network (weights alone), figures of
every step to output/metrics.csv, those of --eval_dataset to output/eval.csv, the curves of both to output/curves.png.
A flag that is not given leaves the YAML's value.
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

from mindrlhf.cli import add_set_flag, boolean, new_parser, not_used, positive_int
from mindrlhf.errors import run_main


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--config", required=True, help="the run's YAML")
    parser.add_argument("--run_mode", choices=("train",), default="train", help="train, nothing else")
    parser.add_argument("--task", choices=("text_generation",), default="text_generation",
                        help="MindFormers' name for the trainer: text_generation, nothing else")
    parser.add_argument("--train_dataset", nargs="+", metavar="PATH",
                        help="MindRecord files, or folders of them; with train_dataset.probabilities, what each "
                             "conversion wrote has its share of an epoch")
    parser.add_argument("--eval_dataset", nargs="+", metavar="[NAME=]PATH",
                        help="held-out pairs, which are evaluated while training, as the YAML's do_eval: True does: "
                             "MindRecord files, or folders of them; several sets have a name each (NAME=PATH)")
    parser.add_argument("--tokenizer", help="if given, the data must have been made with it")
    parser.add_argument("--predict_data", type=not_used("reward_infer.py --data_file scores answers"),
                        help="not used by training: reward_infer.py --data_file scores answers")
    parser.add_argument("--seq_length", type=positive_int,
                        help="tokens of the longest text; the data's may be smaller unless rows are padded")
    parser.add_argument("--use_parallel", type=boolean, metavar="BOOL", help="several processes")
    parser.add_argument("--load_checkpoint", help="weights to start from: a .ckpt file, or a folder with rank_0, ...")
    parser.add_argument("--src_strategy", help="strategy files of a sliced --load_checkpoint")
    parser.add_argument("--auto_trans_ckpt", type=boolean, metavar="BOOL",
                        help="reshard --load_checkpoint for the YAML's layout")
    parser.add_argument("--resume", type=boolean, metavar="BOOL",
                        help="continue with the step and optimizer state of --load_checkpoint (output/checkpoint)")
    add_set_flag(parser)
    parser.add_argument("--dry_run", action="store_true",
                        help="check everything, say what the run would do and need, and stop; touches no device")
    parser.add_argument("--verbose", action="store_true",
                        help="show MindFormers' log too, which is in output/log, and a line a step in place of a bar")
    return parser.parse_args(argv)


def main() -> int:
    """Check everything that needs no device, then train."""
    args = parse_args()
    from mindrlhf.training.plan import plan_training
    plan = plan_training(args)
    if args.dry_run:
        from mindrlhf.training.dry_run import dry_run
        dry_run(plan, print)
        print("OK")
    else:
        from mindrlhf.training.train import train
        train(plan, args.verbose)
    return 0


if __name__ == "__main__":
    run_main(main)
