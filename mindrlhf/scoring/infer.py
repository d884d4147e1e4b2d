"""Inference: the score of every answer of a file."""
import json
import os
from collections import deque
from contextlib import nullcontext
from typing import Deque, List, Tuple

from mindrlhf.atomic import partial_file
from mindrlhf.data.template import render
from mindrlhf.errors import UserError
from mindrlhf.scoring.plan import InferencePlan
from mindrlhf.scoring.questions import Question, read_questions
from mindrlhf.scoring.scorer import Scorer, warn_of_template
from mindrlhf.set_up import set_up_mindspore

__all__ = ["infer"]


def infer(plan: InferencePlan) -> None:
    """Score every answer of a file: a log line `Sample:` with the full text and `reward score: [[..]]` each, and one
    JSON line a row, in the input's order, to the plan's output file: the row's own keys and its scores.

    The file is read as a stream, so that memory does not grow with it.

    Raises:
        UserError: the checkpoint is damaged or does not fit the model; a text has no token.
    """
    template, data_file = plan.template, plan.data_file
    run = set_up_mindspore(plan.config)
    from mindformers.tools.logger import logger
    warn_of_template(template, plan.trained.get("prompt_template"), "--prompt_template")
    scorer = Scorer(plan.config, run)
    scorer.load(scorer.checkpoints(plan.checkpoint)[-1])

    waiting: Deque[Tuple[Question, List[str]]] = deque()  # read, and not yet scored
    counts = {"rows": 0, "texts": 0, "too long": 0}

    def encoded():
        for question in read_questions(data_file):
            texts = [render(template, question.values["prompt"], answer) for answer in question.answers.values()]
            ids = plan.tokenizer.encode_batch(texts)
            counts["texts"] += len(ids)
            counts["too long"] += sum(len(row) > scorer.seq_length for row in ids)
            if not all(ids):
                raise UserError(f"{data_file}: a text without a token cannot be scored: prompt "
                                f"{question.values['prompt']!r}, template {template!r}")
            waiting.append((question, texts))
            yield ids

    place = partial_file(plan.output_file) if scorer.rank == 0 else nullcontext(os.devnull)
    # Half of a surrogate pair in a key of the user's becomes the JSON escape that it came from.
    with place as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        for scores in scorer.score(encoded()):
            question, texts = waiting.popleft()
            for text, score in zip(texts, scores):
                logger.info("Sample:\n%s", text)
                logger.info("reward score: [[%s]]", score)
            row = {**question.values, **dict(zip(question.answers, scores))}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts["rows"] += 1
    if counts["too long"]:
        logger.warning("%d of %d texts are longer than the sequence length %d and were cut there", counts["too long"],
                       counts["texts"], scorer.seq_length)
    logger.info("wrote the scores of %d rows to %s", counts["rows"], plan.output_file)
