"""What a run that scores is given: everything about it that can be checked before a device is touched."""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

from mindrlhf.checkpoints.find import check_checkpoint_path, checkpoints_to_score, file_of_run, first_rank
from mindrlhf.checkpoints.score_statistics import ScoreStatistics, read_score_statistics
from mindrlhf.checkpoints.training_notes import TrainingNotes, problems_of_model, read_training_notes
from mindrlhf.config.check import check_config
from mindrlhf.config.check_data import check_records, open_records
from mindrlhf.config.read import read_config
from mindrlhf.config.run_config import RunConfig
from mindrlhf.config.settings import raise_located
from mindrlhf.data.preference import AS_THEY_ARE, InvalidRow, Reading
from mindrlhf.data.record_set import RecordSet
from mindrlhf.data.sources import is_read_once, open_sources
from mindrlhf.data.template import PROMPT_TEMPLATE
from mindrlhf.data.text_encoder import TextEncoder
from mindrlhf.data.tokenizer import Tokenizer, check_same_tokenizer, open_tokenizer
from mindrlhf.errors import Problems, UserError
from mindrlhf.output_paths import check_outputs
from mindrlhf.scoring.pair_lines import check_names_are_free
from mindrlhf.scoring.questions import read_questions
from mindrlhf.scoring.reward_bench import BENCHMARKS, BenchmarkPairs
from mindrlhf.scoring.score_file import check_score_file, invalid_rows_path
from mindrlhf.scoring.text_pairs import TextPairs

__all__ = ["OUTPUT_NAMES", "EvaluationPlan", "InferencePlan", "ScoringPlan", "TextScoringPlan", "plan_evaluation",
           "plan_inference"]


# Of an evaluation, in the run's folder.
OUTPUT_NAMES = ("eval.json", "eval_scores.jsonl", "eval_scores.png", "eval_groups.png", "eval_steps.png")


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


def _plan(args, problems: Problems, **overrides) -> Tuple[ScoringPlan, Mapping[str, Any], TrainingNotes]:
    """What evaluation and inference have in common: (plan, the YAML's keys, the notes of the model's training); raises
    `UserError` where nothing further can be checked.
    """
    settings = getattr(args, "settings", ())
    mapping = read_config(args.config, {"model.model_config.seq_length": args.seq_length, "run_mode": "eval",
                                        **overrides}, settings)
    config = check_config(args.config, mapping, problems, settings)
    with problems:
        check_checkpoint_path("distributed_ckpt_path", args.distributed_ckpt_path)
    if config and config.layout.stages > 1:  # the first process, which says and writes what is found, has no scores
        with problems:
            raise UserError(f"parallel_config.pipeline_stage is {config.layout.stages}, expected 1 to score: the "
                            "stages of a pipeline do not hear of the scores; scripts/convert_weight.py ms_to_hf merges "
                            "the slices of training")
    notes = TrainingNotes(None, {}, 0, None)
    with problems:
        notes = read_training_notes(args.distributed_ckpt_path)
        if config:
            raise_located(args.config, problems_of_model(notes, config.model.dimensions), settings)
    return ScoringPlan(config, args.distributed_ckpt_path, notes.values), mapping, notes


@dataclass(frozen=True)
class EvaluationPlan(ScoringPlan):
    """A checked evaluation; made by `plan_evaluation` alone.

    Attributes:
        records:         the pairs to score, encoded already, or as text
        all_checkpoints: all of the last run's current branch, in the order of their steps, or the last alone
        score_key:       NAME of the scores in eval_scores.jsonl, chosen_NAME and rejected_NAME
        group_by:        keys of the rows whose values give a pair its group
        tokenizer:       that the pairs of MindRecord are shown with; None: by their numbers
    """

    records: Union[RecordSet, TextPairs]
    all_checkpoints: bool
    score_key: str = "score"
    group_by: Tuple[str, ...] = ()
    tokenizer: Optional[Tokenizer] = None


def plan_evaluation(args) -> EvaluationPlan:
    """The run that `reward_eval.py`'s arguments ask for.

    Raises:
        UserError: everything that is wrong with YAML, flags, data and checkpoint.
    """
    problems = Problems()
    plan, mapping, notes = _plan(args, problems, **{"eval_dataset.data_loader.dataset_dir": args.eval_dataset,
                                                    "runner_config.batch_size": args.batch_size})
    records: Union[RecordSet, TextPairs, None] = None
    tokenizer: Optional[Tokenizer] = None
    if args.data_file:
        records = _text_pairs(args, plan, notes, problems)
    else:
        with problems:
            records = open_records(mapping, "eval_dataset")
    if isinstance(records, RecordSet):
        with problems:
            check_same_tokenizer(str(records.sidecar), records.settings.get("tokenizer"),
                                 plan.trained.get("tokenizer"), notes.place)
        with problems:
            _check_kept(records, args.group_by, args.score_key)
        with problems:
            tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else None
            if tokenizer:
                check_same_tokenizer("--tokenizer", tokenizer.identity, records.settings.get("tokenizer"),
                                     records.sidecar, "the data was made")
        if plan.config:
            with problems:
                check_records(records, plan.config.model, exact=False)
    problems.raise_all()
    outputs = [file_of_run(plan.config.output / name, notes.number) for name in OUTPUT_NAMES]
    check_outputs({"output_dir": outputs}, {"--config": args.config, "--data_file": args.data_file,
                                            "--tokenizer": args.tokenizer})
    return EvaluationPlan(**vars(plan), records=records, all_checkpoints=args.load_all_ckpt, score_key=args.score_key,
                          group_by=args.group_by, tokenizer=tokenizer)


def _check_kept(records: RecordSet, group_by: Sequence[str], score_key: str) -> None:
    """Raise `UserError` if files have not kept what pairs are grouped by, or have kept a key with a score's name."""
    for part in records.parts:
        missing = [key for key in group_by if key not in part.keep]
        if missing:
            raise UserError(f"--group_by: {part} has no key {', '.join(map(repr, missing))}, expected it among those "
                            f"that were kept ({', '.join(part.keep) or 'none'}): convert with --keep "
                            f"{','.join(group_by)}, or evaluate on the text with --data_file")
        check_names_are_free(str(part), part.keep, score_key)


def _text_pairs(args, plan: ScoringPlan, notes: TrainingNotes, problems: Problems) -> Optional[TextPairs]:
    encoder, sources = _encoder(args, plan, notes, problems), None
    with problems:
        if is_read_once(args.data_file):
            raise UserError(f"--data_file: {args.data_file}: a pipe or a device, expected a file, which is read for "
                            "each checkpoint and by each process")
        keep = args.group_by or (("subset",) if args.format in BENCHMARKS else ())
        sources = open_sources([(args.data_file, None)], Path(), args.format,
                               Reading(args.columns, args.preference, keep))
    if not (encoder and sources and plan.config):
        return None
    length = plan.config.model.seq_length
    pairs = BenchmarkPairs(sources, encoder, length, benchmark=args.format) if args.format in BENCHMARKS else \
        TextPairs(sources, encoder, length)
    with problems:
        row = next(pairs.read(Counter()))
        check_names_are_free(row.place, row.values, args.score_key)
    return pairs


@dataclass(frozen=True)
class TextScoringPlan(ScoringPlan):
    """A checked run that scores texts.

    Attributes:
        encoder: the tokenizer of the training data, if it is known; template and end of texts that were asked for, or
                 that the model was trained with, or the default
    """

    encoder: TextEncoder


@dataclass(frozen=True)
class InferencePlan(TextScoringPlan):
    """A checked inference; made by `plan_inference` alone.

    Attributes:
        data_file:    rows to score, the first of them checked
        output_file:  where the rows go with their scores
        score_key:    NAME of the scores, see `read_questions`; `format_name` and `reading` likewise
        resume:       go on from OUTPUT_FILE.partial, if there is one
        skip_invalid: leave out rows that cannot be scored, instead of ending there
        invalid_file: where these go; None without `skip_invalid`
        statistics:   by which scores are normalised; None: they are not
    """

    data_file: Path
    output_file: Path
    score_key: str = "score"
    format_name: Optional[str] = None
    reading: Reading = AS_THEY_ARE
    resume: bool = False
    skip_invalid: bool = False
    invalid_file: Optional[Path] = None
    statistics: Optional[ScoreStatistics] = None


def plan_inference(args) -> InferencePlan:
    """The run that `reward_infer.py`'s arguments ask for. Reads the input's first row, unless it is a pipe.

    Raises:
        UserError: everything that is wrong with YAML, flags, input, tokenizer and checkpoint.
    """
    problems = Problems()
    plan, _, notes = _plan(args, problems)
    encoder = _encoder(args, plan, notes, problems)
    with problems:
        _check_data_file(args.data_file, args, plan.config, encoder)
    statistics = None
    if args.normalize and plan.config:
        with problems:
            path = args.distributed_ckpt_path
            files, _ = checkpoints_to_score(path, first_rank(path), plan.config.layout.semi_auto)
            statistics = read_score_statistics("--normalize", args.normalize, files[-1])
    problems.raise_all()
    output_file = args.output_file or file_of_run(plan.config.output / "scores.jsonl", notes.number)
    invalid_file = invalid_rows_path(output_file, plan.config.output) if args.skip_invalid else None
    check_outputs({"--output_file": output_file, **({"--skip_invalid": invalid_file} if invalid_file else {})}, {
        "--config": args.config, "--data_file": args.data_file, "--tokenizer": args.tokenizer,
        "--normalize": args.normalize,
        "--distributed_ckpt_path": args.distributed_ckpt_path, "data_settings.json": notes.place})
    check_score_file(output_file, args.resume)
    return InferencePlan(**vars(plan), encoder=encoder, data_file=args.data_file, output_file=output_file,
                         score_key=args.score_key, format_name=args.format, reading=Reading(args.columns),
                         resume=args.resume, skip_invalid=args.skip_invalid,
                         invalid_file=invalid_file, statistics=statistics)


def _encoder(args, plan: ScoringPlan, notes: TrainingNotes, problems: Problems) -> Optional[TextEncoder]:
    """Texts as they were asked for, or else as the model was trained. A text that is too long is scored all the same:
    like the training data if that lost the beginning of its prompts. None where a problem was found.
    """
    trained, add_eos = plan.trained, getattr(args, "add_eos", None)
    tokenizer: Optional[Tokenizer] = None
    encoder: Optional[TextEncoder] = None
    with problems:
        tokenizer = open_tokenizer(args.tokenizer)
        encoder = TextEncoder(tokenizer, args.prompt_template or trained.get("prompt_template") or PROMPT_TEMPLATE,
                              bool(trained.get("add_eos")) if add_eos is None else add_eos,
                              "cut_prompt" if trained.get("too_long") == "cut_prompt" else "cut")
        check_same_tokenizer(args.tokenizer, tokenizer.identity, trained.get("tokenizer"), notes.place)
    if tokenizer and plan.config and tokenizer.vocab_size > plan.config.model.dimensions.padded_vocab_size:
        with problems:
            raise UserError(f"{args.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, model.model_config."
                            f"padded_vocab_size is {plan.config.model.dimensions.padded_vocab_size}; expected at least "
                            "as many")
    return encoder


def _check_data_file(path: Path, args, config: Optional[RunConfig], encoder: Optional[TextEncoder]) -> None:
    """Raise `UserError` if there is no first row, or it cannot be scored. The others are checked when they are reached:
    what is before an invalid one is then kept. What comes from a pipe can be read once, and so is not looked at.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        if args.resume:
            raise UserError(f"--resume: --data_file is {path}, which has only what was not read yet; expected a file")
        if config and config.layout.processes > 1:
            raise UserError(f"--data_file: {path}: a pipe or a device, expected a file, for each of the "
                            f"{config.layout.processes} processes reads all rows")
        return
    first = next(read_questions(path, args.score_key, args.format, Reading(args.columns), encoder), None)
    if first is None:
        raise UserError(f"--data_file: {path}: no rows in it, expected at least one")
    if isinstance(first, InvalidRow) and not args.skip_invalid:
        raise first.as_error()
