#!/usr/bin/env python3
r"""GLM-4's weights between Hugging Face and MindSpore.

    python scripts/convert_weight.py hf_to_ms --input glm-4-9b --output glm4_9b_ckpt \
      --config model_configs/glm_config/run_glm4_9b_rm.yaml
    python scripts/convert_weight.py ms_to_hf --input output/checkpoint_network --output glm4_9b_rm \
      --config model_configs/glm_config/run_glm4_9b_rm.yaml --tokenizer tokenizer.model

Neither needs PyTorch. Weights are copied in chunks, so that memory does not grow with the model (unless slices of
several ranks have to be merged first).
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until `begin`

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not
if __name__ == "__main__":
    from mindrlhf.entry import begin
    begin()

import argparse
from typing import Optional, Sequence

from mindrlhf.cli import boolean, new_parser, template
from mindrlhf.errors import run_main

_TYPES = ("float32", "bfloat16", "float16")


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="direction", required=True, metavar="hf_to_ms|ms_to_hf")
    into = commands.add_parser("hf_to_ms", allow_abbrev=False, help="a published GLM-4 to a MindSpore checkpoint")
    into.add_argument("--input", required=True, type=Path,
                      help="folder with config.json and .safetensors: glm-4-9b(-chat), glm-4-9b(-chat)-hf, or a "
                           "GlmForSequenceClassification")
    into.add_argument("--output", required=True, type=Path,
                      help="NAME.ckpt for one file, or a new or empty folder for shards of at most 5 GB")
    into.add_argument("--config", type=Path, help="a run's YAML to compare the model's dimensions with")
    out = commands.add_parser("ms_to_hf", allow_abbrev=False,
                              help="a trained reward model to a GlmForSequenceClassification")
    out.add_argument("--input", required=True,
                     help="a .ckpt file, or a folder with rank_0, ... (output/checkpoint_network) or with shards")
    out.add_argument("--config", required=True, type=Path, help="the run's YAML")
    out.add_argument("--output", required=True, type=Path, help="a new or empty folder")
    out.add_argument("--tokenizer",
                     help="GLM-4's tokenizer.model, or a tokenizer.json or folder made of it; without it no tokenizer "
                          "files are written")
    out.add_argument("--prompt_template", type=template,
                     help="text with {prompt} and {response}, glm4-chat, or a .jinja file; default: the one that the "
                          "model was trained with")
    out.add_argument("--add_eos", type=boolean, metavar="True|False",
                     help="end texts with <|endoftext|>; default: as the model was trained")
    out.add_argument("--src_strategy", help="strategy file, or folder of them, of a checkpoint sliced over ranks "
                                            "(output/strategy of the run)")
    out.add_argument("--language_model", action="store_true",
                     help="write a GlmForCausalLM from a checkpoint with an LM head")
    out.add_argument("--score_statistics", type=Path, metavar="EVAL_JSON",
                     help="write mean and std of the checkpoint's entry in this eval.json of reward_eval.py into "
                          "config.json, as OpenRLHF reads them")
    for command in (into, out):
        command.add_argument("--dtype", choices=_TYPES, help="of the weights (default: as they are)")
    args = parser.parse_args(argv)
    if args.direction == "ms_to_hf" and args.language_model and args.score_statistics:
        out.error("argument --score_statistics: has no effect with --language_model, which gives no scores")
    return args


def main() -> int:
    """Convert, and say what was mapped."""
    args = parse_args()
    from mindrlhf.config.check import load_config
    from mindrlhf.huggingface.convert import hf_to_ms, ms_to_hf
    model = load_config(args.config).model if args.config else None
    if args.direction == "hf_to_ms":
        result = hf_to_ms(args.input, args.output, args.dtype, model)
    else:
        result = ms_to_hf(args.input, model, args.output, args.dtype, args.tokenizer,
                          args.prompt_template and args.prompt_template.noted, args.src_strategy,
                          args.language_model, add_eos=args.add_eos, score_statistics=args.score_statistics)
    print(result.as_text())
    return 0


if __name__ == "__main__":
    run_main(main)
