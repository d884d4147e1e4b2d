"""Scoring: what evaluation and inference share, and both of them.

Scores come from the network itself, called in evaluation mode through `mindspore.Model`: compiled once in the YAML's
parallel layout, with the rank's own slices of a checkpoint.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.checkpoint import list_checkpoints, load_strictly, read_checkpoint, read_data_settings
from mindrlhf.config import check_checkpoint_path, check_dataset, checked_data_settings, get, is_semi_auto, load_config
from mindrlhf.data.encode import pad_row
from mindrlhf.data.preference import PAIR_FIELDS, Rejected, Row, check_text_fields, read_rows
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import Tokenizer, check_same_tokenizer, open_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.partial import partial_file
from mindrlhf.report import format_table, plot_score_histogram
from mindrlhf.runtime import output_path, start

__all__ = ["EvalResult", "Scorer", "check_output_file", "evaluate", "infer", "load_eval_config", "load_infer_config",
           "read_questions"]


class Scorer:
    """A reward model that scores rows of tokens in batches of one fixed size, so that one graph is compiled.

    Args:
        run:  the configuration that `mindrlhf.runtime.start` returned
        rows: answers a batch; rounded up to a multiple of the layout's data parallelism
    """

    def __init__(self, run, rows: int):
        import mindspore as ms
        from mindformers.core.parallel_config import build_parallel_config
        from mindformers.models.build_model import build_network
        from mindformers.tools.utils import get_real_rank

        from mindrlhf import compat
        self.rank = get_real_rank()
        self.sliced = is_semi_auto(run)
        if not self.sliced:
            for key in ("data_parallel", "model_parallel", "pipeline_stage"):
                run.parallel_config[key] = 1
        split = run.parallel_config.data_parallel
        self.rows = -(-rows // split) * split
        self.seq_length = run.model.model_config.seq_length
        build_parallel_config(run)
        with compat.no_init_parameters():
            self.network = build_network(run.model, default_args={"parallel_config": run.parallel_config,
                                                                  "moe_config": run.moe_config})
        self.network.set_train(False)
        self._model = ms.Model(self.network)
        self._laid_out = False

    def load(self, path: Path) -> None:
        """Load a checkpoint, strictly, and log what was loaded."""
        from mindformers.tools.logger import logger
        parameters = read_checkpoint(path)
        if self.sliced and not self._laid_out:
            self._model.infer_predict_layout(*self._tensors(*self._full_batch()))
            self._laid_out = True
        logger.info(load_strictly(self.network, parameters, str(path), need_head=True).as_text())
        self.network.init_parameters_data()

    def _full_batch(self):
        ids = np.zeros((self.rows, self.seq_length), np.int32)
        return ids, np.ones_like(ids), np.full(self.rows, self.seq_length, np.int32)

    def _tensors(self, input_ids, attention_mask, end_ind):
        import mindspore as ms
        positions = np.broadcast_to(np.arange(self.seq_length, dtype=np.int32), input_ids.shape)
        return (ms.Tensor(input_ids, ms.int32), ms.Tensor(np.ascontiguousarray(positions)),
                ms.Tensor(attention_mask, ms.float16), ms.Tensor(np.zeros_like(input_ids), ms.float16),
                ms.Tensor(end_ind, ms.int32))

    def score(self, input_ids: np.ndarray, attention_mask: np.ndarray, end_ind: np.ndarray) -> np.ndarray:
        """End scores of any number of rows.

        Args:
            input_ids:      (N, S) int32
            attention_mask: (N, S), 1 for text
            end_ind:        (N,), number of tokens

        Returns:
            (N,) float32, in the order of the rows
        """
        scores = np.empty(len(input_ids), np.float32)
        for begin in range(0, len(input_ids), self.rows):
            part = slice(begin, begin + self.rows)
            filled = self._full_batch()  # rows beyond the last one are scored and forgotten
            count = len(input_ids[part])
            for whole, given in zip(filled, (input_ids, attention_mask, end_ind)):
                whole[:count] = given[part]
            scores[part] = self._model.predict(*self._tensors(*filled)).asnumpy()[:count, 0]
        return scores


def _base_overrides(args) -> Dict[str, Any]:
    return {"model.model_config.seq_length": args.seq_length, "run_mode": "eval"}


def _warn_of_template(found: Optional[str], trained: Optional[str], place: str) -> None:
    """Say so when texts were rendered otherwise than in training; None where it is not known."""
    from mindformers.tools.logger import logger
    if found and trained and found != trained:
        logger.warning("the prompt template of %s is %r, the model was trained with %r: its scores mean little",
                       place, found, trained)


# --- evaluation -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalResult:
    """Scores of all pairs by one checkpoint, in the data's order; (pairs,) float32 each."""

    checkpoint: str
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen end score is larger than the rejected one."""
        return float(np.mean(self.chosen > self.rejected))

    @property
    def margin(self) -> float:
        """Mean of chosen minus rejected end score."""
        return float(np.mean(self.chosen - self.rejected))

    def as_row(self) -> List[str]:
        return [self.checkpoint, str(len(self.chosen)), f"{self.accuracy:.4f}", f"{self.margin:.4f}",
                f"{self.chosen.mean():.4f}", f"{self.rejected.mean():.4f}"]

    def as_line(self) -> str:
        return (f"{self.checkpoint}: {len(self.chosen)} pairs, accuracy {self.accuracy:.4f}, "
                f"mean margin {self.margin:.4f}")


def load_eval_config(args) -> Dict[str, Any]:
    """The YAML with `reward_eval.py`'s flags in it, checked together with the data and checkpoints it names."""
    overrides = {**_base_overrides(args), "eval_dataset.data_loader.dataset_dir": args.eval_dataset,
                 "runner_config.batch_size": args.batch_size}
    config = load_config(args.config, overrides)
    files = check_dataset(config, "eval_dataset", "eval_dataset")
    check_checkpoint_path("distributed_ckpt_path", args.distributed_ckpt_path)
    settings, trained = read_data_settings(args.distributed_ckpt_path)
    check_same_tokenizer(files[0], checked_data_settings(files).get("tokenizer"), trained.get("tokenizer"), settings)
    return config


def evaluate(config: Dict[str, Any], checkpoint_path: str, all_checkpoints: bool) -> List[EvalResult]:
    """Accuracy and margin of one or all checkpoints at a path on the YAML's `eval_dataset`.

    Logs `acc: [..]; avg acc: [..]` a batch: its share of pairs whose chosen end score is the larger one, and that of
    all pairs so far. Draws the score distributions to OUTPUT/eval_scores.png (of the last checkpoint, if several).

    Args:
        config:          from `load_eval_config`
        checkpoint_path: file or folder
        all_checkpoints: all of them in the order of their steps, or the last alone
    """
    files = check_dataset(config, "eval_dataset", "eval_dataset")
    run = start(config)
    from mindformers.tools.logger import logger
    scorer = Scorer(run, 2 * run.runner_config.batch_size)
    checkpoints = list_checkpoints(checkpoint_path, scorer.rank)
    _warn_of_template(checked_data_settings(files).get("prompt_template"),
                      read_data_settings(checkpoint_path)[1].get("prompt_template"), files[0])
    dataset = _eval_dataset(run, files)
    results = []
    for path in checkpoints if all_checkpoints else checkpoints[-1:]:
        scorer.load(path)
        results.append(_evaluate_one(scorer, dataset, str(path)))
        logger.info(results[-1].as_line())
    if len(results) > 1:
        table = [["checkpoint", "pairs", "accuracy", "margin", "chosen mean", "rejected mean"],
                 *(result.as_row() for result in results)]
        logger.info("all checkpoints:\n%s", format_table(table))
    if scorer.rank == 0:
        last = results[-1]
        target = plot_score_histogram(last.chosen.tolist(), last.rejected.tolist(), Path(last.checkpoint).name,
                                      output_path(config) / "eval_scores.png")
        logger.info("the distributions of the scores are in %s", target)
    return results


def _eval_dataset(run, files: Sequence[str]):
    from mindrlhf.data.dataset import RewardModelDataset
    block = run.eval_dataset
    block.data_loader.dataset_dir = list(files)
    block.seq_length = run.model.model_config.seq_length
    block.batch_size = run.runner_config.batch_size
    block.drop_remainder = False
    block.seed = run.seed or 0
    return RewardModelDataset(block)


def _evaluate_one(scorer: Scorer, dataset, name: str) -> EvalResult:
    from mindformers.tools.logger import logger
    chosen: List[float] = []
    rejected: List[float] = []
    for batch in dataset.create_dict_iterator(num_epochs=1, output_numpy=True):
        scores = scorer.score(batch["input_ids"], batch["attention_mask"], batch["end_ind"])
        pairs = len(scores) // 2
        chosen.extend(scores[:pairs].tolist())
        rejected.extend(scores[pairs:].tolist())
        right = np.greater(chosen, rejected)
        logger.info("acc: [%s]; avg acc: [%s]", float(right[-pairs:].mean()), float(right.mean()))
    return EvalResult(name, np.array(chosen, np.float32), np.array(rejected, np.float32))


# --- inference ------------------------------------------------------------------------------------------------------

def load_infer_config(args) -> Tuple[Dict[str, Any], Tokenizer, str]:
    """The YAML with `reward_infer.py`'s flags in it, the tokenizer and the prompt template, all checked.

    The template is `--prompt_template`, or the one that the model was trained with, or the default.
    """
    config = load_config(args.config, _base_overrides(args))
    check_checkpoint_path("distributed_ckpt_path", args.distributed_ckpt_path)
    tokenizer = open_tokenizer(args.tokenizer)
    settings, trained = read_data_settings(args.distributed_ckpt_path)
    check_same_tokenizer(args.tokenizer, {"file": tokenizer.path.name, "sha256": tokenizer.sha256},
                     trained.get("tokenizer"), settings)
    vocab = get(config, "model.model_config.padded_vocab_size")
    if tokenizer.vocab_size > vocab:
        raise UserError(f"{args.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, "
                        f"model.model_config.padded_vocab_size is {vocab}; expected at least as many")
    return config, tokenizer, args.prompt_template or trained.get("prompt_template") or PROMPT_TEMPLATE


def check_output_file(path: Path) -> None:
    """Raise `UserError`, before anything is scored, if no file can be written at `path`."""
    if path.is_dir():
        raise UserError(f"--output_file: {path} is a folder, expected a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"--output_file: {path}: the folder {path.parent} cannot be written")


@dataclass(frozen=True)
class _Question:
    """A row of the input: its values, and the answers to score, name of the score -> text."""

    values: Dict[str, Any]
    answers: Dict[str, str]


def read_questions(path: Path) -> Iterator[_Question]:
    """Rows to score: prompt with pos_resp and neg_resp (scores pos_score, neg_score), or with response (score).

    Raises:
        UserError: a row has none of these, or another fault; FILE:LINE and what was found.
    """
    for row in read_rows(path):
        single = isinstance(row, Row) and "response" in row.values and "pos_resp" not in row.values
        fields = ("prompt", "response") if single else PAIR_FIELDS
        if isinstance(row, Row):
            row = check_text_fields(row, fields)
        if isinstance(row, Rejected):
            raise row.as_error()
        names = ("score",) if single else ("pos_score", "neg_score")
        yield _Question(row.values, {name: row.values[field] for name, field in zip(names, fields[1:])})


def infer(config: Dict[str, Any], questions: Sequence[_Question], tokenizer: Tokenizer, template: str,
          checkpoint_path: str, output_file: Path) -> None:
    """Score every answer of `questions`: a log line `Sample:` with the full text and `reward score: [[..]]` each, and
    one JSON line a row, in the input's order, to `output_file`: the row's own keys and its scores.
    """
    run = start(config)
    from mindformers.tools.logger import logger
    _warn_of_template(template, read_data_settings(checkpoint_path)[1].get("prompt_template"), "--prompt_template")
    scorer = Scorer(run, 2 * run.runner_config.batch_size)
    scorer.load(list_checkpoints(checkpoint_path, scorer.rank)[-1])

    texts = [render(template, question.values["prompt"], answer)
             for question in questions for answer in question.answers.values()]
    ids = tokenizer.encode_batch(texts)
    too_long = sum(len(row) > scorer.seq_length for row in ids)
    if too_long:
        logger.warning("%d of %d texts are longer than the sequence length %d and are cut there", too_long, len(ids),
                       scorer.seq_length)
    scores: List[float] = []
    for begin in range(0, len(texts), scorer.rows):
        part = slice(begin, begin + scorer.rows)
        scores.extend(_score_texts(scorer, ids[part], run.model.model_config.pad_token_id))
        for text, score in zip(texts[part], scores[begin:]):
            logger.info("Sample: %s", text)
            logger.info("reward score: [[%s]]", score)
    if scorer.rank == 0:
        _write_scores(questions, scores, output_file)
        logger.info("wrote the scores of %d rows to %s", len(questions), output_file)


def _score_texts(scorer: Scorer, ids: Sequence[Sequence[int]], pad_token_id: int) -> List[float]:
    rows = np.stack([pad_row(row, scorer.seq_length, pad_token_id) for row in ids])
    lengths = np.array([min(len(row), scorer.seq_length) for row in ids], np.int32)
    mask = (np.arange(scorer.seq_length) < lengths[:, None]).astype(np.int32)
    return scorer.score(rows, mask, lengths).tolist()


def _write_scores(questions: Sequence[_Question], scores: Sequence[float], output_file: Path) -> None:
    """One JSON line a question; the file appears under its name when it is whole."""
    remaining = iter(scores)
    with partial_file(output_file) as partial, open(partial, "w", encoding="utf-8") as file:
        for question in questions:
            row = {**question.values, **{name: next(remaining) for name in question.answers}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
