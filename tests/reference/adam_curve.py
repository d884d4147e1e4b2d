"""What both sides of the comparison of 50 Adam steps start from: pairs, batches and weights. Knows neither framework.

The two sets of pairs: "sample", bundled with its tokenizer, and "harmless", real pairs with a full-size vocabulary that
lie beside the checkout (../shared/data) and are not part of the project.
"""
from itertools import islice
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np

from mindrlhf.data.encode import encode_pair
from mindrlhf.data.preference import read_preferences
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer
from mindrlhf.models.glm4.dimensions import Dimensions, Weight, backbone_weights

ROOT = Path(__file__).resolve().parents[2]
SAMPLE, SHARED = ROOT / "examples" / "glm4_reward_model_train" / "sample_data", ROOT.parent / "shared" / "data"
STEPS, PAIRS, SEQ, SEED = 50, 4, 128, 16
LEARNING_RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8
# Name -> pairs, tokenizer.
CURVES = {"sample": (SAMPLE / "train.jsonl", SAMPLE / "tokenizer.model"),
          "harmless": (SHARED / "hh_harmless_train.jsonl", SHARED / "tokenizer.model")}
# The model's, under the YAML's names.
DIMENSIONS = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "multi_query_group_num": 2,
              "kv_channels": 8, "ffn_hidden_size": 64, "padded_vocab_size": 8192, "layernorm_epsilon": 1e-5,
              "rope_ratio": 1, "seq_length": SEQ}


def batches(name: str) -> Iterator[Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(input_ids, attention_mask, loss_mask, lengths) of each step: (2B, S) with the chosen first, (B, S), (2B,).

    Tokens are numbered anew in the order in which they occur, so that a small model has a place for each of them.
    """
    pairs, tokenizer = CURVES[name]
    tokenizer = open_tokenizer(tokenizer)
    numbers: Dict[int, int] = {}

    def samples():
        for row in read_preferences(pairs):
            prompt, *answers = (messages[0].content for messages in (row.prompt, row.chosen, row.rejected))
            ids = tokenizer.encode_batch([render(PROMPT_TEMPLATE, prompt, answer) for answer in answers])
            sample = encode_pair(*ids, SEQ, tokenizer.pad_token_id, "right")
            if sample is not None:
                yield sample

    rows = samples()
    for _ in range(STEPS):
        step = list(islice(rows, PAIRS))
        ids, mask = (np.stack([sample[f"{side}_{field}"] for side in ("chosen", "rejected") for sample in step])
                     for field in ("input_ids", "attention_mask"))
        ids = np.vectorize(lambda token: numbers.setdefault(token, len(numbers)), otypes=[np.int32])(ids)
        yield ids, mask, np.stack([sample["loss_mask"] for sample in step]), mask.sum(-1).astype(np.int32)


def initial_weights() -> Dict[str, Tuple[Weight, Dict[str, np.ndarray]]]:
    """MindFormers' name -> (weight, transformers' name -> array); float32, normal with standard deviation 0.1."""
    random = np.random.RandomState(SEED)  # its stream is the same in every release of NumPy
    head = Weight("v_head0.weight", (1, DIMENSIONS["hidden_size"]), "", (("score.weight", 1),))
    weights = [*backbone_weights(Dimensions.from_yaml(DIMENSIONS, "adam_curve")), head]
    return {weight.name: (weight, {
        name: ("norm" in name) + 0.1 * random.standard_normal((rows, *weight.shape[1:])).astype(np.float32)
        for name, rows in weight.transformers}) for weight in weights}
