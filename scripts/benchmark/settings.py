"""What is measured: models, amounts, releases' names, and where files are."""
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Tuple

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, SHARED = ROOT / "examples" / "glm4_reward_model_train", ROOT.parent / "shared" / "data"
TINY_YAML = ROOT / "model_configs" / "glm_config" / "run_glm4_tiny_rm_cpu.yaml"
ENTRIES = ("cvalues_comparison.py", "reward_train.py", "reward_eval.py", "reward_infer.py")
PARTS = ("conversion", "training", "training-16", "training-large", "scoring", "scoring-8", "start-up")
OURS, TRL, TRANSFORMERS = "mindrlhf", "TRL RewardTrainer", "transformers"
THREADS, SEQ = 2, 1024
DIMENSIONS = {"hidden_size": 256, "num_attention_heads": 8, "multi_query_group_num": 2, "kv_channels": 32,
              "ffn_hidden_size": 688, "padded_vocab_size": 151552, "seq_length": SEQ}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "kv_channels": 64, "ffn_hidden_size": 2752}
OPTIMIZER = {"lr_schedule.learning_rate": 1e-4, "optimizer.weight_decay": 0.1, "optimizer.beta1": 0.9,
             "optimizer.beta2": 0.95, "optimizer.eps": 1e-8, "runner_wrapper.max_grad_norm": 1.0}
PEER_NAMES = {key: {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}.get(name, name)
              for key, name in ((key, key.rpartition(".")[2]) for key in OPTIMIZER)}  # in TRL's configuration
# Epochs. Where steps have several shapes, the first epoch warms up: it compiles each shape, and all come up again.
EPOCHS = {"padded": 1, "buckets": 2, "packing": 1, TRL: 2}
WARM_UP = 2             # steps that are left out where there is one shape and one epoch
LENGTH_STEP = 64        # row lengths of packing are multiples of it
WRITE_ROWS = 128        # rows that MindRecord's writer is given at once, as the converter does
PREPARED_ROWS = 256     # different rows that the bare writer writes over and over
SCORE_BATCH = 16        # of transformers
ANSWERS, ANSWER_TOKENS, PROMPT_TOKENS = 8, 100, 500  # of each question of scoring-8
SGEMM_SIZE = 2048
SIZES = ("pairs", "text_tokens", "computed_tokens")  # of a training step


@dataclass(frozen=True)
class Shape:
    """A model, and how it is trained: pairs a step, and the ways of batching that are measured, TRL's among them."""

    dimensions: Dict[str, int]
    pairs_a_step: int
    ways: Tuple[str, ...]


@dataclass(frozen=True)
class Amounts:
    """How much is measured: rounds, layers of the models (of training-large apart), pairs (of conversion by sequence
    length, of training by part) and repeats.

    Padded steps are slow and cost the same whatever stands in them, so that fewer pairs will do.
    """

    rounds: int
    layers: int
    layers_of_large: int
    conversion: Dict[int, int]
    slow_conversion: int
    training: Dict[str, int]
    padded_training: int
    scoring: int
    scoring_answers: int
    sgemm: int
    start_up: int


FULL = Amounts(rounds=3, layers=4, layers_of_large=8, conversion={1024: 12000, 8192: 3000}, slow_conversion=600,
               training={"training": 160, "training-16": 160, "training-large": 48}, padded_training=32, scoring=600,
               scoring_answers=40, sgemm=20, start_up=5)
QUICK = Amounts(rounds=1, layers=1, layers_of_large=1, conversion={1024: 512, 8192: 256}, slow_conversion=64,
                training={"training": 16, "training-16": 64, "training-large": 32}, padded_training=12, scoring=24,
                scoring_answers=4, sgemm=3, start_up=1)


def shapes(amounts: Amounts) -> Dict[str, Shape]:
    """What each part that trains measures. Scoring has the model of `training`."""
    small, packed = {"num_layers": amounts.layers, **DIMENSIONS}, ("buckets", "packing", TRL)
    large = {"num_layers": amounts.layers_of_large, **DIMENSIONS, **LARGE}
    return {"training": Shape(small, 4, tuple(EPOCHS)), "training-16": Shape(small, 16, packed),
            "training-large": Shape(large, 8, packed)}
