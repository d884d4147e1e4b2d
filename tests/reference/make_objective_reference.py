"""Write tests/reference/objectives.npz and objective_curves.json: what TRL and PyTorch make of end scores.

    bash scripts/compare_with_torch.sh  # makes an environment for it, and runs it
    python tests/reference/make_objective_reference.py [--output FOLDER]

The model is transformers' `GlmForSequenceClassification`, small, with random weights from a fixed seed. Where TRL has
an objective, loss and gradients are those of its `RewardTrainer.compute_loss`, one call for the pairs of each prompt
where all answers are compared; the others (a factor for margins, label smoothing) are written out in PyTorch. For each
of tests/reference/objective.py's OBJECTIVES, objectives.npz holds `NAME/loss`, `NAME/by`, which says who computed it,
and `NAME/gradient/PARAMETER`; beside them dimensions, weights and texts. objective_curves.json holds the losses of 50
steps of `torch.optim.Adam` on TRL's loss, see tests/reference/adam_curve.py.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GlmForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import adam_curve  # noqa: E402
import objective  # noqa: E402
from make_glm_reference import build_model, losses_of_adam, mindformers_tensors  # noqa: E402


def scoring_model(size: dict, pad: int, head: torch.Tensor, weights=None) -> GlmForSequenceClassification:
    """The float32 model in evaluation mode; `weights` of its backbone instead of `build_model`'s."""
    backbone = build_model(size)
    if weights is not None:
        backbone.load_state_dict(weights)
    config = backbone.config
    config.pad_token_id, config.num_labels = pad, 1
    model = GlmForSequenceClassification(config).float().eval()
    model.model, model.score.weight = backbone, torch.nn.Parameter(head.clone())
    return model


def trainer_of(model, centering: float, folder: str) -> RewardTrainer:
    """TRL's trainer of a model; only its `compute_loss` is used."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "<pad>": 1}, "a")),
                                        pad_token="<pad>", eos_token="<pad>")
    pad = model.config.pad_token_id
    args = RewardConfig(folder, center_rewards_coefficient=centering or None, bf16=False, use_cpu=True,
                        gradient_checkpointing=False, report_to="none")
    trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list([{"chosen_ids": [0], "rejected_ids": [0]}]),
                            processing_class=tokenizer)
    model.config.pad_token_id = pad  # the trainer has put its tokenizer's in
    return trainer


def trl_loss(trainer, model, ids, mask, better, worse, margins=None) -> torch.Tensor:
    """TRL's loss of pairs of texts."""
    places = np.concatenate([better, worse])
    batch = {"input_ids": torch.tensor(ids[places]).long(), "attention_mask": torch.tensor(mask[places]).long()}
    if margins is not None:
        batch["margin"] = torch.tensor(margins, dtype=torch.float32)
    return trainer.compute_loss(model, batch)


def loss_of(name: str, model, ids, mask, folder: str):
    """(loss, who computed it) of an objective over the seven texts."""
    settings = objective.OBJECTIVES[name]
    compared = objective.comparisons_of(settings)
    margin, centering = settings.get("margin", "none"), settings.get("centering", 0.0)
    if margin != "scale" and not settings.get("label_smoothing"):
        trainer = trainer_of(model, centering, folder)
        prompts = np.array(objective.PROMPTS)[compared.better] if settings.get("answers") else np.zeros(
            len(compared.better))
        losses = [trl_loss(trainer, model, ids, mask, compared.better[group], compared.worse[group],
                           compared.margins[group] if margin == "subtract" else None)
                  for group in (prompts == prompt for prompt in np.unique(prompts))]
        return torch.stack(losses).mean(), f"TRL {trl.__version__}"
    scores = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
                   use_cache=False).logits[:, 0]
    better, worse = scores[compared.better], scores[compared.worse]
    weights, margins = (torch.tensor(value, dtype=torch.float32) for value in (compared.weights, compared.margins))
    ahead = better - worse - (margins if margin == "subtract" else 0)
    smoothing, log_sigmoid = settings.get("label_smoothing", 0.0), torch.nn.functional.logsigmoid
    each = -(1 - smoothing) * log_sigmoid(ahead) - smoothing * log_sigmoid(-ahead)
    each = (margins if margin == "scale" else 1) * each + centering * (better + worse) ** 2
    return (weights * each).sum(), f"torch {torch.__version__}"


def make_texts(pad: int):
    """(ids, mask), (7, S) int32 each: texts without the pad id, padded on the right."""
    rng = np.random.default_rng(17)
    texts = len(objective.LENGTHS)
    ids = np.full((texts, objective.SEQ), pad, np.int32)
    mask = np.zeros((texts, objective.SEQ), np.int32)
    prompts = rng.integers(0, pad, (max(objective.PROMPTS) + 1, objective.PROMPT))
    for row, (length, prompt) in enumerate(zip(objective.LENGTHS, objective.PROMPTS)):
        ids[row, :length] = rng.integers(0, pad, length)
        ids[row, :objective.PROMPT] = prompts[prompt]
        mask[row, :length] = 1
    return ids, mask


def make_objectives(folder: str) -> dict:
    """Name -> array of objectives.npz."""
    size, pad = objective.DIMENSIONS, objective.DIMENSIONS["padded_vocab_size"] - 1
    ids, mask = make_texts(pad)
    torch.manual_seed(17)
    model = scoring_model(size, pad, 0.3 * torch.randn(1, size["hidden_size"]))
    scores = model(input_ids=torch.tensor(ids).long(), use_cache=False).logits[:, 0]
    arrays = {"dimensions": np.array(json.dumps({**size, "seq_length": 16, "pad_token_id": pad})), "input_ids": ids,
              "attention_mask": mask, "end_ind": np.array(objective.LENGTHS, np.int32),
              "end_scores": scores.detach().numpy(),
              "versions": np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}",
                                    f"trl {trl.__version__}"])}
    arrays.update({f"weight/{name}": value for name, value in _tensors(model, lambda value: value).items()})
    for name in objective.OBJECTIVES:
        model.zero_grad()
        loss, by = loss_of(name, model, ids, mask, folder)
        loss.backward()
        arrays.update({f"{name}/loss": loss.detach().numpy(), f"{name}/by": np.array(by)})
        arrays.update({f"{name}/gradient/{parameter}": value
                       for parameter, value in _tensors(model, lambda value: value.grad).items()})
    return arrays


def _tensors(model, what) -> dict:
    """`what` of each parameter, under MindFormers' names and in its layout."""
    values = {name.removeprefix("model."): what(value).detach().numpy().copy()
              for name, value in model.named_parameters()}
    head = values.pop("score.weight")
    return {**mindformers_tensors(values, model.config.num_hidden_layers), "v_head0.weight": head}


def adam_losses(name: str, folder: str) -> list:
    """The loss of each step, before its update: TRL's loss, PyTorch's Adam."""
    start = {key.removeprefix("model."): torch.tensor(array) for _, parts in adam_curve.initial_weights().values()
             for key, array in parts.items()}
    pad = adam_curve.DIMENSIONS["padded_vocab_size"] - 1
    model = scoring_model(adam_curve.DIMENSIONS, pad, start.pop("score.weight"), start)
    trainer = trainer_of(model, 0.0, folder)

    def loss_of_batch(ids, mask, _, __):
        assert ids.max() < pad  # the pairs' own tokens are numbered from 0, that of their padding too
        better, worse = np.split(np.arange(len(ids)), 2)
        return trl_loss(trainer, model, np.where(mask, ids, pad), mask, better, worse)

    return losses_of_adam(model.parameters(), name, loss_of_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="default: where this script is")
    output = parser.parse_args().output
    target = output / "objective_curves.json"
    curves = json.loads(target.read_text()) if target.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        arrays = make_objectives(folder)
        curves.update({name: adam_losses(name, folder) for name, (pairs, _) in adam_curve.CURVES.items()
                       if pairs.is_file()})
    np.savez_compressed(output / "objectives.npz", **arrays)
    target.write_text(json.dumps(curves, indent=1) + "\n")
    for name, settings in objective.OBJECTIVES.items():
        formula = objective.loss(arrays["end_scores"], objective.comparisons_of(settings), **settings)
        print(f"{name}: {arrays[f'{name}/loss']:.6f} by {arrays[f'{name}/by']}; the formula in float64: {formula:.6f}")
    for name, losses in curves.items():
        print(f"{name}: {len(losses)} losses, first {losses[0]:.6f}, last {losses[-1]:.6f}")


if __name__ == "__main__":
    main()
