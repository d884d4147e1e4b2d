"""Scoring, beside transformers."""
import json
from collections import defaultdict
from typing import Any, Dict, List

import numpy as np
from measure_training import text_figures
from runner import Bench, sgemm
from settings import OURS, SCORE_BATCH, THREADS, TRANSFORMERS


def scoring(bench: Bench, ceilings: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Rounds by what scored, and what the texts are."""
    pairs = bench.take(bench.amounts.scoring)
    texts, questions = bench.work / "texts.json", bench.work / "questions.json"
    texts.write_text(json.dumps([text for pair in pairs for text in pair.ids]))
    questions.write_text(json.dumps([pair.ids for pair in pairs]))
    figures = text_figures(bench, [text for pair in pairs for text in pair.ids])
    rounds: Dict[str, List[Dict[str, Any]]] = defaultdict(list)
    difference = 0.0
    for number in range(1, bench.amounts.rounds + 1):
        ceilings.append(sgemm(bench, f"scoring_{number}"))
        ours = bench.call(f"scoring_{number}", "score", yaml=bench.yaml, checkpoint=bench.checkpoint,
                          questions=questions, folder=bench.work / "scoring")
        found = {OURS: ours}
        if bench.peers:
            theirs = bench.call(f"scoring_transformers_{number}", "score", peers=True, model=bench.model, texts=texts,
                                threads=THREADS, batch_size=SCORE_BATCH)
            found.update({f"{TRANSFORMERS}, {way}": {**figures, "peak_mb": theirs["peak_mb"]}
                          for way, figures in theirs["ways"].items()})
        scores = np.array(ours["scores"])
        for way, measured in found.items():
            difference = max(difference, float(np.abs(scores - measured.pop("scores")).max()))
            rounds[way].append(measured)
            bench.say(f"scoring, {way}, round {number} of {bench.amounts.rounds}: "
                      f"{figures['texts'] / measured['seconds']:.1f} texts/s")
    real = sum(len(pair.group) - pair.group.padding for pair in pairs)
    return {"rounds": dict(rounds), "largest_difference_of_scores": difference, "tokens_with_prompts_once": real,
            "spread_of_scores": float(np.ptp(scores)), **figures}
