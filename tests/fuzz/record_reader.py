"""Read MindRecord data as a start of training does, a folder a line on standard input, an answer a line on output.

A process of its own, because MindRecord's reader may end it. An answer is JSON: `refused`, what the user is told;
`rows`, what was read after the check at every start and the dry run of both kinds of rows; or `fault`, a traceback.
"""
import json
import os
import sys
import traceback
from dataclasses import replace
from types import SimpleNamespace

import mindspore.dataset as ds

from mindrlhf.config.check import typed_config
from mindrlhf.errors import UserError
from mindrlhf.training.dry_run import describe
from mindrlhf.training.plan import plan_training


def read(yaml, folder):
    absent = dict.fromkeys(("use_parallel", "load_checkpoint", "src_strategy", "auto_trans_ckpt", "resume",
                            "tokenizer"))
    plan = plan_training(SimpleNamespace(config=yaml, train_dataset=[folder], seq_length=16, task="", **absent))
    for batching in ("padded", "buckets"):
        plan.config.mapping["train_dataset"]["batching"] = batching
        describe(replace(plan, config=typed_config(yaml, plan.config.mapping)))
    rows = [{name: value.tolist() for name, value in row.items()} for row in ds.MindDataset(
        list(plan.records.files), shuffle=False).create_dict_iterator(num_epochs=1, output_numpy=True)]
    return plan.records.pairs, rows


def main():
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        folder = line.rstrip("\n")
        try:
            pairs, rows = read(sys.argv[1], folder)
            answer = {"pairs": pairs, "rows": rows}
        except UserError as error:
            answer = {"refused": error.messages}
        except BaseException:  # noqa: B036 (a finding, to be told)
            answer = {"fault": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
