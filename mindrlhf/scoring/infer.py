"""Inference: the score of every answer of a file."""
import itertools
import json
import os
from contextlib import nullcontext

from mindrlhf.atomic import partial_file
from mindrlhf.scoring.plan import InferencePlan
from mindrlhf.scoring.questions import read_questions
from mindrlhf.scoring.text_scorer import TextScorer

__all__ = ["infer"]


def infer(plan: InferencePlan) -> None:
    """Score every answer of a file: a log line `Sample:` with the full text and `reward score: [[..]]` each, and one
    JSON line a row, in the input's order, to the plan's output file: the row's own keys and its scores.

    The file is read as a stream, so that memory does not grow with it.

    Raises:
        UserError: the checkpoint is damaged or does not fit the model; a text has no token.
    """
    scorer, rows = TextScorer(plan), 0
    from mindformers.tools.logger import logger
    questions, asked = itertools.tee(read_questions(plan.data_file))
    scored = scorer.score_all((question.values["prompt"], list(question.answers.values())) for question in asked)
    place = partial_file(plan.output_file) if scorer.rank == 0 else nullcontext(os.devnull)
    # Half of a surrogate pair in a key of the user's becomes the JSON escape that it came from.
    with place as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        for texts, question in zip(scored, questions):
            rows += 1
            for text in texts:
                logger.info("Sample:\n%s", text.text)
                logger.info("reward score: [[%s]]", text.score)
            scores = dict(zip(question.answers, (text.score for text in texts)))
            file.write(json.dumps({**question.values, **scores}, ensure_ascii=False) + "\n")
    if scorer.cut:
        logger.warning("%d of %d texts are longer than the sequence length %d and were cut there", scorer.cut,
                       scorer.texts, plan.config.model.seq_length)
    logger.info("wrote the scores of %d rows to %s", rows, plan.output_file)
