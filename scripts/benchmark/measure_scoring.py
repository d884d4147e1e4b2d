"""Scoring, beside transformers."""
import json
from collections import defaultdict
from itertools import cycle, islice
from typing import Any, Dict, List

import numpy as np
from measure_training import text_figures
from runner import Bench, sgemm
from settings import (
    ANSWER_TOKENS,
    ANSWERS,
    OURS,
    PROMPT_TOKENS,
    SCORE_BATCH,
    THREADS,
    TRANSFORMERS,
    Shape,
)

from mindrlhf.data.row_packing import text_group


def scoring(bench: Bench, part: str, shape: Shape, ceilings: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Rounds by what scored, and what the texts are."""
    model, questions = bench.make_model(shape), questions_of(bench, part)
    flat = [text for answers in questions for text in answers]
    texts, asked = bench.work / f"{part}_texts.json", bench.work / f"{part}_questions.json"
    texts.write_text(json.dumps(flat))
    asked.write_text(json.dumps(questions))
    figures = text_figures(shape, flat)
    rounds: Dict[str, List[Dict[str, Any]]] = defaultdict(list)
    difference = 0.0
    for number in range(1, bench.amounts.rounds + 1):
        ceilings.append(sgemm(bench, f"{part}_{number}"))
        ours = bench.call(f"{part}_{number}", "score", yaml=model.yaml, checkpoint=model.checkpoint, questions=asked,
                          folder=bench.work / part)
        found = {OURS: ours}
        if bench.peers:
            theirs = bench.call(f"{part}_transformers_{number}", "score", peers=True, model=model.folder, texts=texts,
                                threads=THREADS, batch_size=SCORE_BATCH)
            found.update({f"{TRANSFORMERS}, {way}": {**figures, "peak_mb": theirs["peak_mb"]}
                          for way, figures in theirs["ways"].items()})
        scores = np.array(ours["scores"])
        for way, measured in found.items():
            difference = max(difference, float(np.abs(scores - measured.pop("scores")).max()))
            rounds[way].append(measured)
            bench.say(f"{part}, {way}, round {number} of {bench.amounts.rounds}: "
                      f"{figures['texts'] / measured['seconds']:.1f} texts/s")
    groups = [text_group([np.array(text, np.int32) for text in answers]) for answers in questions]
    return {"rounds": dict(rounds), "largest_difference_of_scores": difference, "questions": len(questions),
            "tokens_with_prompts_once": sum(map(len, groups)), "spread_of_scores": float(np.ptp(scores)), **figures}


def questions_of(bench: Bench, part: str) -> List[List[List[int]]]:
    """The texts of each question, as ids: pairs; or answers of one length to prompts of one length, cut from them."""
    if part == "scoring":
        return [pair.ids for pair in bench.take(bench.amounts.scoring)]
    ids = cycle(token for pair in bench.pairs for token in pair.ids[0])
    prompts = [list(islice(ids, PROMPT_TOKENS)) for _ in range(bench.amounts.scoring_answers)]
    return [[prompt + list(islice(ids, ANSWER_TOKENS)) for _ in range(ANSWERS)] for prompt in prompts]
