"""Scoring: what evaluation and inference share, and both of them.

Scores come from the network itself, called in evaluation mode through `mindspore.Model`: compiled in the YAML's
parallel layout, with the rank's own slices of a checkpoint. Several processes that each have the whole model divide the
batches among them; all of them know all scores, and the first one says and writes what is found.
"""
import json
import os
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Deque, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from mindrlhf.checkpoint import list_checkpoints, load_strictly, read_checkpoint, read_data_settings
from mindrlhf.config import check_checkpoint_path, check_config, read_config
from mindrlhf.data.encode import FIELDS
from mindrlhf.data.packing import Group, longest_row, pack_groups, plan_steps, text_group, whole_steps
from mindrlhf.data.preference import PAIR_FIELDS, Rejected, Row, check_text_fields, read_rows
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import Tokenizer, check_same_tokenizer, open_tokenizer
from mindrlhf.errors import Problems, UserError
from mindrlhf.partial import partial_file
from mindrlhf.plan import check_records, open_records
from mindrlhf.processes import sum_over_processes
from mindrlhf.report import format_table, plot_score_histogram
from mindrlhf.run_config import RunConfig
from mindrlhf.runtime import start
from mindrlhf.slices import check_cut, is_sliced, steps_of_slices

__all__ = ["EvalResult", "EvaluationPlan", "InferencePlan", "Scorer", "ScoringPlan", "evaluate", "infer",
           "plan_evaluation", "plan_inference", "read_questions", "row_shapes"]


_WINDOW = 2048            # groups of texts that are sorted by length together; bounds the memory of a run
_SHORTEST_ROW = 256        # tokens
_MOST_LENGTHS = 4          # so many graphs are compiled, at most
_TOKENS = 4096             # of a batch, at most; larger ones are no faster
_SHORTEST_GROUP = 16       # tokens; bounds the groups of a row


class Scorer:
    """A reward model that scores texts without padding: in packed rows of at most four lengths, so that at most four
    graphs are compiled, each when it is needed first. All processes must score the same questions.

    Args:
        config: what is scored with
        run:    what `mindrlhf.runtime.start` returned for it
    """

    def __init__(self, config: RunConfig, run):
        from mindformers.core.parallel_config import build_parallel_config
        from mindformers.tools.utils import get_real_group_size, get_real_rank

        self.rank = get_real_rank()
        layout = config.layout
        self._semi_auto, self._sliced = layout.semi_auto, False
        divided = layout.parallel and not layout.semi_auto
        self._part, self._parts = (self.rank, get_real_group_size()) if divided else (0, 1)  # of the batches
        run.parallel_config.update(data_parallel=layout.data, model_parallel=layout.model,
                                   pipeline_stage=layout.stages)
        self.seq_length, self.pad_token_id = config.model.seq_length, config.model.pad_token_id
        texts = 2 * config.batching.size
        self.shapes = row_shapes(self.seq_length, min(texts * self.seq_length, _TOKENS), layout.data)
        self.most = max(self.shapes[-1][1] // _SHORTEST_GROUP, 1)  # groups of a row
        build_parallel_config(run)
        self._run = run
        self._build()

    def _build(self) -> None:
        """The network, without weights."""
        import mindspore as ms
        from mindformers.models.build_model import build_network

        from mindrlhf.compat.model import no_init_parameters
        with no_init_parameters():
            self.network = build_network(self._run.model, default_args={"parallel_config": self._run.parallel_config,
                                                                        "moe_config": self._run.moe_config})
        self.network.set_train(False)
        self._model = ms.Model(self.network)
        self._laid_out = False

    def checkpoints(self, path: str) -> List[Path]:
        """The checkpoints at a path, see `list_checkpoints`: the rank's own slices, or whole ones."""
        self._sliced = self._semi_auto and is_sliced(path)
        if not self._sliced:
            return list_checkpoints(path, 0)
        list_checkpoints(path, self.rank)
        return [slices[self.rank] for slices in steps_of_slices(path, "distributed_ckpt_path")]

    def load(self, path: Path) -> None:
        """Load one of `checkpoints`, strictly, and log what was loaded."""
        from mindformers.tools.logger import logger
        parameters = read_checkpoint(path)
        if self._laid_out and not self._sliced:  # a network that is cut takes slices alone
            self._build()
        if self._sliced:
            self._lay_out()
        logger.info(load_strictly(self.network, parameters, str(path), need_head=True).as_text())
        self.network.init_parameters_data()
        if self._semi_auto and not self._sliced:
            self._lay_out()
            check_cut({name: value.asnumpy() for name, value in parameters.items()},
                      {value.name: value.asnumpy() for value in self.network.get_parameters()})

    def _lay_out(self) -> None:
        """Cut the network, and the weights that are in it, for the layout."""
        if not self._laid_out:
            rows, length = self.shapes[0]
            self._model.infer_predict_layout(*self._tensors([[]] * rows, length)[0])
            self._laid_out = True

    def _tensors(self, rows: Sequence[Sequence[Group]], length: int):
        """(the network's inputs, where there is a text)."""
        import mindspore as ms
        packed = pack_groups(rows, length, 2 * self.most, self.pad_token_id)
        ends = np.where(packed.texts, packed.ends, -1).astype(np.int32)
        return [ms.Tensor(packed.input_ids), ms.Tensor(packed.positions), ms.Tensor(packed.segments),
                ms.Tensor(packed.weights), ms.Tensor(ends)], packed.texts

    def score(self, questions: Iterable[Sequence[np.ndarray]]) -> Iterator[List[float]]:
        """End scores of the texts of each question, in the questions' order.

        Args:
            questions: the token ids of texts that mostly begin alike, (length,) int32 each; longer ones are cut at the
                       sequence length. They are read as they are needed.
        """
        questions = iter(questions)
        while True:
            window = [text_group([np.asarray(text[:self.seq_length], np.int32) for text in texts])
                      for texts in islice(questions, _WINDOW)]
            if not window:
                return
            yield from self._score_window(window)

    def _score_window(self, groups: Sequence[Group]) -> List[List[float]]:
        last = np.cumsum([len(group.ends) for group in groups])
        scores = np.zeros(last[-1], np.float32)
        places = [np.arange(end - len(group.ends), end) for group, end in zip(groups, last)]
        steps = plan_steps([len(group) for group in groups], self.shapes, self.most, None)
        for step in steps[self._part::self._parts]:
            inputs, texts = self._tensors([[groups[number] for number in row] for row in step.rows], step.length)
            scores[np.concatenate([places[number] for number in step.groups])] = \
                self._model.predict(*inputs).asnumpy()[texts]
        if self._parts > 1:
            scores = sum_over_processes(scores)  # each score is there once and 0 elsewhere
        return [scores[place].tolist() for place in places]


def row_shapes(seq_length: int, tokens: int, split: int) -> List[Tuple[int, int]]:
    """(rows, length) of the batches: lengths up to two whole texts, about so many tokens each.

    >>> row_shapes(1024, 4096, 1)
    [(16, 256), (8, 512), (4, 1024), (2, 2048)]
    >>> row_shapes(100, 4096, 2)
    [(20, 208)]
    """
    longest = longest_row(seq_length)
    growth = max(longest / _SHORTEST_ROW, 1) ** (1 / (_MOST_LENGTHS - 1))
    lengths = [whole_steps(round(_SHORTEST_ROW * growth ** number)) for number in range(_MOST_LENGTHS - 1)]
    lengths = sorted({length for length in lengths if length < longest} | {longest})
    return [(-(-max(tokens // length, 1) // split) * split, length) for length in lengths]


@dataclass(frozen=True)
class ScoringPlan:
    """A checked run that scores.

    Attributes:
        config:     the YAML with the flags in it
        checkpoint: file or folder
        trained:    how the data was made that the model was trained with; {} where it is not known
    """

    config: RunConfig
    checkpoint: str
    trained: Mapping[str, Any]


def _plan(args, problems: Problems, **overrides) -> Tuple[ScoringPlan, Mapping[str, Any], Optional[Path]]:
    """What evaluation and inference have in common: (plan, the YAML's keys, the file that says how the model was
    trained); raises `UserError` where nothing further can be checked.
    """
    mapping = read_config(args.config, {"model.model_config.seq_length": args.seq_length, "run_mode": "eval",
                                        **overrides})
    config = check_config(args.config, mapping, problems)
    with problems:
        check_checkpoint_path("distributed_ckpt_path", args.distributed_ckpt_path)
    if config and config.layout.stages > 1:  # the first process, which says and writes what is found, has no scores
        with problems:
            raise UserError(f"parallel_config.pipeline_stage is {config.layout.stages}, expected 1 to score: the "
                            "stages of a pipeline do not hear of the scores; scripts/convert_weight.py ms_to_hf merges "
                            "the slices of training")
    place, trained = None, {}
    with problems:
        place, trained = read_data_settings(args.distributed_ckpt_path)
    return ScoringPlan(config, args.distributed_ckpt_path, trained), mapping, place


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


@dataclass(frozen=True)
class EvaluationPlan(ScoringPlan):
    """A checked evaluation; made by `plan_evaluation` alone.

    Attributes:
        records:         the pairs to score
        all_checkpoints: all that are there, in the order of their steps, or the last alone
    """

    records: RecordSet
    all_checkpoints: bool


def plan_evaluation(args) -> EvaluationPlan:
    """The run that `reward_eval.py`'s arguments ask for.

    Raises:
        UserError: everything that is wrong with YAML, flags, data and checkpoint.
    """
    problems = Problems()
    plan, mapping, place = _plan(args, problems, **{"eval_dataset.data_loader.dataset_dir": args.eval_dataset,
                                                    "runner_config.batch_size": args.batch_size})
    records: Optional[RecordSet] = None
    with problems:
        records = open_records(mapping, "eval_dataset")
    if records:
        with problems:
            check_same_tokenizer(str(records.sidecar), records.settings.get("tokenizer"),
                                 plan.trained.get("tokenizer"), place)
        if plan.config:
            with problems:
                check_records(records, plan.config.model, exact=False)
    problems.raise_all()
    return EvaluationPlan(**vars(plan), records=records, all_checkpoints=args.load_all_ckpt)


def evaluate(plan: EvaluationPlan) -> List[EvalResult]:
    """Accuracy and margin of one checkpoint, or of each.

    Logs `acc: [..]; avg acc: [..]` a batch: its share of pairs whose chosen end score is the larger one, and that of
    all pairs so far. Draws the score distributions to OUTPUT/eval_scores.png (of the last checkpoint, if several).

    Raises:
        UserError: data or checkpoint are damaged, or do not fit the model.
    """
    config, records = plan.config, plan.records
    run = start(config)
    from mindformers.tools.logger import logger

    from mindrlhf.data.compact import check_first_row
    records.verify_rows()
    for file in records.files:
        check_first_row(file, list(FIELDS), config.model.seq_length, exact=False)
    scorer = Scorer(config, run)
    checkpoints = scorer.checkpoints(plan.checkpoint)
    _warn_of_template(records.settings.get("prompt_template"), plan.trained.get("prompt_template"), records.files[0])
    results = []
    for path in checkpoints if plan.all_checkpoints else checkpoints[-1:]:
        scorer.load(path)
        results.append(_evaluate_one(scorer, records.files, str(path), config.batching.size))
        logger.info(results[-1].as_line())
    if len(results) > 1:
        table = [["checkpoint", "pairs", "accuracy", "margin", "chosen mean", "rejected mean"],
                 *(result.as_row() for result in results)]
        logger.info("all checkpoints:\n%s", format_table(table))
    if scorer.rank == 0:
        last = results[-1]
        target = plot_score_histogram(last.chosen.tolist(), last.rejected.tolist(), Path(last.checkpoint).name,
                                      config.output / "eval_scores.png")
        logger.info("the distributions of the scores are in %s", target)
    return results


def _evaluate_one(scorer: Scorer, files: Sequence[str], name: str, batch_size: int) -> EvalResult:
    from mindformers.tools.logger import logger

    from mindrlhf.data.compact import read_pairs
    chosen: List[float] = []
    rejected: List[float] = []
    scores = scorer.score((pair.chosen, pair.rejected) for pair in read_pairs(files, list(FIELDS)))
    for batch in iter(lambda: list(islice(scores, batch_size)), []):
        chosen.extend(pair[0] for pair in batch)
        rejected.extend(pair[1] for pair in batch)
        right = np.greater(chosen, rejected)
        logger.info("acc: [%s]; avg acc: [%s]", float(right[-len(batch):].mean()), float(right.mean()))
    return EvalResult(name, np.array(chosen, np.float32), np.array(rejected, np.float32))


# --- inference ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class InferencePlan(ScoringPlan):
    """A checked inference; made by `plan_inference` alone.

    Attributes:
        data_file:   rows to score, all of them checked
        tokenizer:   that of the training data, if it is known
        template:    the prompt template: the one that was asked for, or that the model was trained with, or the default
        output_file: where the rows go with their scores
    """

    data_file: Path
    tokenizer: Tokenizer
    template: str
    output_file: Path


def plan_inference(args) -> InferencePlan:
    """The run that `reward_infer.py`'s arguments ask for. Reads all of the input once.

    Raises:
        UserError: everything that is wrong with YAML, flags, input, tokenizer and checkpoint.
    """
    problems = Problems()
    plan, _, place = _plan(args, problems)
    tokenizer: Optional[Tokenizer] = None
    with problems:
        tokenizer = open_tokenizer(args.tokenizer)
        check_same_tokenizer(args.tokenizer, tokenizer.identity, plan.trained.get("tokenizer"), place)
    if tokenizer and plan.config and tokenizer.vocab_size > plan.config.model.dimensions.padded_vocab_size:
        with problems:
            raise UserError(f"{args.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, model.model_config."
                            f"padded_vocab_size is {plan.config.model.dimensions.padded_vocab_size}; expected at least "
                            "as many")
    with problems:
        if not sum(1 for _ in read_questions(args.data_file)):
            raise UserError(f"--data_file: {args.data_file}: no rows in it, expected at least one")
    problems.raise_all()
    output_file = args.output_file or plan.config.output / "scores.jsonl"
    _check_output_file(output_file)
    return InferencePlan(**vars(plan), data_file=args.data_file, tokenizer=tokenizer, output_file=output_file,
                         template=args.prompt_template or plan.trained.get("prompt_template") or PROMPT_TEMPLATE)


def _check_output_file(path: Path) -> None:
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


def infer(plan: InferencePlan) -> None:
    """Score every answer of a file: a log line `Sample:` with the full text and `reward score: [[..]]` each, and one
    JSON line a row, in the input's order, to the plan's output file: the row's own keys and its scores.

    The file is read as a stream, so that memory does not grow with it.

    Raises:
        UserError: the checkpoint is damaged or does not fit the model; a text has no token.
    """
    template, data_file = plan.template, plan.data_file
    run = start(plan.config)
    from mindformers.tools.logger import logger
    _warn_of_template(template, plan.trained.get("prompt_template"), "--prompt_template")
    scorer = Scorer(plan.config, run)
    scorer.load(scorer.checkpoints(plan.checkpoint)[-1])

    waiting: Deque[Tuple[_Question, List[str]]] = deque()  # read, and not yet scored
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
