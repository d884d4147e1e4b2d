"""Weights between Hugging Face and MindSpore, in both directions: the story of `scripts/convert_weight.py`.

Both directions look at names, types and shapes of everything first, and write only when all of it is right. Then they
copy bytes in chunks. Knows MindSpore only where slices of a checkpoint are merged.
"""
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from tqdm import tqdm

from mindrlhf.atomic import naming_a_full_disk, partial_file, partial_folder
from mindrlhf.checkpoints.find import checkpoint_files, list_checkpoints, newest_whole_slices
from mindrlhf.checkpoints.load import raise_left_over
from mindrlhf.checkpoints.score_statistics import read_score_statistics
from mindrlhf.checkpoints.sharded import merge_slices
from mindrlhf.checkpoints.training_notes import TrainingNotes, problems_of_model, read_training_notes
from mindrlhf.config.run_config import Model
from mindrlhf.data.template import PROMPT_TEMPLATE, read_template
from mindrlhf.data.tokenizer import GLM4_SPECIAL_TOKENS, RankTokenizer, check_same_tokenizer, open_tokenizer
from mindrlhf.data.transformers_tokenizer import TransformersTokenizer
from mindrlhf.errors import UserError, raise_each, raise_problems, some
from mindrlhf.huggingface.model_files import model_card, model_config, notes_of_config
from mindrlhf.huggingface.tokenizer_files import tokenizer_config, tokenizer_json
from mindrlhf.json_file import read_json_object
from mindrlhf.models.glm4.dimensions import (
    HEAD_NAME,
    LM_HEAD_NAME,
    TRANSFORMERS,
    Dimensions,
    Weight,
    backbone_weights,
    find_layout,
    head_weights,
    is_ignored,
    with_prefix,
)
from mindrlhf.output_paths import check_outputs, follow_link, is_stream
from mindrlhf.tables import format_table, size_text
from mindrlhf.weights.ckpt_file import check_ckpt, read_ckpt_files, write_ckpt
from mindrlhf.weights.safetensors_file import INDEX_NAME, read_safetensors_folder, write_safetensors
from mindrlhf.weights.shards import ShardName
from mindrlhf.weights.tensors import (
    FLOAT_BYTES,
    NotFiniteValues,
    OutputTensor,
    Part,
    StoredTensor,
    Writer,
    split_into_shards,
)

__all__ = ["Conversion", "MAX_SHARD_BYTES", "hf_to_ms", "ms_to_hf"]

MAX_SHARD_BYTES = 5 * 10 ** 9
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        taken, bytes_taken:     tensors of the input, and their bytes
        written, bytes_written: tensors of the output, and their bytes
        layout:                 of the input
        heads:                  what the model has besides the backbone
        dropped:                names of the input that have no place in the output
        output:                 file or folder
        files:                  names of the weight files in it
        notes:                  further lines for the user
    """

    taken: int
    bytes_taken: int
    written: int
    bytes_written: int
    layout: str
    heads: str
    dropped: Tuple[str, ...]
    output: Path
    files: Tuple[str, ...]
    notes: Tuple[str, ...] = ()

    def as_text(self) -> str:
        lines = [f"mapped {self.taken} tensors ({size_text(self.bytes_taken, 2)}) of the {self.layout} layout to "
                 f"{self.written} ({size_text(self.bytes_written, 2)}): backbone{self.heads}"]
        if self.dropped:
            lines.append(f"left out: {some(self.dropped)}")
        lines += self.notes
        files = f", {len(self.files)} files {self.files[0]} ..." if len(self.files) > 1 else ""
        return "\n".join([*lines, f"wrote {self.output}{files}"])


# --- Hugging Face to MindSpore --------------------------------------------------------------------------------------

def hf_to_ms(source: Path, output: Path, dtype: Optional[str] = None, model: Optional[Model] = None,
             max_shard_bytes: int = MAX_SHARD_BYTES) -> Conversion:
    """A published GLM-4 to a MindSpore checkpoint that `reward_train.py --load_checkpoint` takes.

    Args:
        source:          folder with config.json and .safetensors, in either published layout
        output:          NAME.ckpt, which is replaced, or a folder for shards, which must be new or empty
        dtype:           a key of `FLOAT_BYTES`; None: as each tensor is
        model:           that of a run's YAML, to compare the dimensions with; differences are in the notes
        max_shard_bytes: of a shard

    Raises:
        UserError: a weight is missing, superfluous or has another shape than config.json says; a file is damaged;
            there is no room. Nothing has been written then.
    """
    output = _check_output(output, output.suffix == ".ckpt", {"--input": source})
    stored = read_safetensors_folder(source)
    layout = find_layout(list(stored), source)
    config = read_json_object(source / "config.json")
    size = Dimensions.from_huggingface(config, layout, str(source / "config.json"))
    trained = notes_of_config(config, source / "config.json", size)
    weights, dropped = _matching_weights(stored, size, layout, source, "config.json")
    tensors = [_joined(weight, [stored[name] for name, _ in weight.sources(layout)], dtype) for weight in weights]
    one_file = output.suffix == ".ckpt"
    shards = [(output.name, tensors)] if one_file else _shards(tensors, ".ckpt", max_shard_bytes)
    # The notes are in the first shard alone: no two files of a checkpoint have a tensor of the same name.
    files = _write(source, output, shards, [partial(write_ckpt, notes=trained), *[write_ckpt] * (len(shards) - 1)],
                   one_file=one_file)
    heads = _heads(weights)
    notes = [] if HEAD_NAME in {weight.name for weight in weights} else \
        ["no value head in it: training starts from one with random weights, normal with standard deviation 0.02"]
    if model is not None:
        notes += _compare(size, model.dimensions)
    taken = [stored[name] for weight in weights for name, _ in weight.sources(layout)]
    return Conversion(len(taken), sum(tensor.nbytes for tensor in taken), len(tensors),
                      sum(tensor.nbytes for tensor in tensors), layout, heads, dropped, output, files, tuple(notes))


def _matching_weights(stored: Tensors, size: Dimensions, layout: str, place: Path,
                      where_from: str) -> Tuple[List[Weight], Tuple[str, ...]]:
    """(weights that a checkpoint has, names without a meaning), in the model's order; all problems are raised."""
    weights = backbone_weights(size)
    weights += [weight for weight in head_weights(size)
                if any(name in stored for name, _ in weight.sources(layout))]
    expected = {name: shape for weight in weights for name, shape in weight.sources(layout)}
    _raise_mismatches(stored, expected, place, where_from)
    dropped = tuple(name for name in stored if name not in expected)
    unknown = [name for name in dropped if not is_ignored(name)]
    if unknown:
        raise UserError(f"{place}: {len(unknown)} tensors have no place in the {layout} layout of "
                        f"{size.num_layers} layers: {some(unknown)}")
    return weights, dropped


def _raise_mismatches(stored: Tensors, expected: Mapping[str, Tuple[int, ...]], place: Path, where_from: str) -> None:
    """Raise `UserError` unless all expected tensors are there, of the expected shapes, with values of a float type."""
    missing = [name for name in expected if name not in stored]
    different = [f"{name} is {list(stored[name].shape)}, expected {list(shape)}" for name, shape in expected.items()
                 if name in stored and stored[name].shape != shape]
    other_type = [f"{name} is {stored[name].dtype}" for name in expected
                  if name in stored and stored[name].dtype not in FLOAT_BYTES]
    raise_problems(str(place), [
        *([f"{len(missing)} weights are missing: {some(missing)}"] if missing else []),
        *([f"{len(different)} weights have another shape than {where_from} says: {some(different, '; ')}"]
          if different else []),
        *([f"{len(other_type)} weights are not of type {', '.join(FLOAT_BYTES)}: {some(other_type)}"]
          if other_type else [])])


def _joined(weight: Weight, tensors: Sequence[StoredTensor], dtype: Optional[str]) -> OutputTensor:
    """Tensors behind one another as one weight."""
    found = {tensor.dtype for tensor in tensors}
    return OutputTensor(weight.name, dtype or (found.pop() if len(found) == 1 else "float32"), weight.shape,
                        tuple(Part(tensor, 0, tensor.values) for tensor in tensors))


def _heads(weights: Iterable[Weight]) -> str:
    names = {weight.name for weight in weights}
    return (", LM head" if LM_HEAD_NAME in names else "") + (", value head" if HEAD_NAME in names else "")


def _compare(size: Dimensions, in_yaml: Dimensions) -> List[str]:
    """What the user has to look at in the YAML."""
    differences = size.differences(in_yaml)
    if not differences:
        return ["the YAML's model.model_config has the same dimensions"]
    table = format_table([["key", "checkpoint", "YAML"], *([key, str(here), str(there)]
                                                           for key, here, there in differences)])
    hint = ["seq_length is how long a text the model was made for; the YAML's may be shorter"] \
        if in_yaml.seq_length < size.seq_length else []
    return ["the YAML's model.model_config differs; edit it before training:", table, *hint]


# --- MindSpore to Hugging Face --------------------------------------------------------------------------------------

def ms_to_hf(source: str, model: Model, output: Path, dtype: Optional[str] = None,
             tokenizer_path: Optional[str] = None, template: Optional[str] = None, src_strategy: Optional[str] = None,
             language_model: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES,
             add_eos: Optional[bool] = None, score_statistics: Optional[Path] = None) -> Conversion:
    """A trained reward model to a folder that transformers loads as `GlmForSequenceClassification`.

    Args:
        source:          a .ckpt file, a folder of shards, or checkpoint_network with its rank folders
        model:           that of the run's YAML
        output:          a new or empty folder
        dtype:           a key of `FLOAT_BYTES`; None: as each tensor is
        tokenizer_path:  GLM-4's rank file or tokenizer.json; None: no tokenizer files
        template:        the prompt template, as it is noted; None: that of the training data, or the default where it
                         is not known
        src_strategy:    strategy file or folder, where the checkpoint is sliced over ranks
        language_model:  write `GlmForCausalLM` from a checkpoint with an LM head
        max_shard_bytes: of a shard
        add_eos:         whether texts end with `<|endoftext|>`; None: as those of the training data
        score_statistics: eval.json, whose entry of the checkpoint has the scores' mean and std; None: not written

    Raises:
        UserError: the checkpoint is not that of the YAML, is sliced without a strategy, lacks the head, or the
            tokenizer is not that of training; there is no room. Nothing has been written then.
    """
    output = _check_output(output, False, {"--input": source, "--tokenizer": tokenizer_path,
                                           "--src_strategy": src_strategy, "--score_statistics": score_statistics})
    size, pad_token_id = model.dimensions, model.pad_token_id
    trained = read_training_notes(source, "input")
    settings = trained.values
    raise_each("--config", problems_of_model(trained, size))
    size = replace(size, seq_length=settings.get("seq_length") or size.seq_length)  # --seq_length of the training run
    asked, template = template, template or settings.get("prompt_template") or PROMPT_TEMPLATE
    written, end = read_template(template), bool(settings.get("add_eos")) if add_eos is None else add_eos
    tokenizer = _open_rank_file(tokenizer_path, pad_token_id, size, settings, trained.place)
    eos_token_id = pad_token_id
    if end and pad_token_id == (tokenizer.first_special if tokenizer else pad_token_id):
        pad_token_id += 1  # [MASK]: transformers reads the score in front of the first pad token
    head = LM_HEAD_NAME if language_model else HEAD_NAME
    weights = [*backbone_weights(size), *(weight for weight in head_weights(size) if weight.name == head)]
    with ExitStack() as stack:
        checkpoint, stored = _read_source(source, weights, output, src_strategy, stack)
        statistics = score_statistics and read_score_statistics("--score_statistics", score_statistics, checkpoint)
        _check_head(stored, language_model, checkpoint)
        expected = {weight.name: weight.shape for weight in weights}
        _raise_mismatches(stored, expected, checkpoint, "the YAML")
        raise_left_over(checkpoint, stored, expected)
        tensors = [tensor for weight in weights for tensor in _split(weight, stored[weight.name], dtype)]
        main_dtype = max({tensor.dtype for tensor in tensors},
                         key=lambda name: sum(tensor.nbytes for tensor in tensors if tensor.dtype == name))
        texts = {"config.json": _as_json(model_config(size, main_dtype, pad_token_id, not language_model, settings,
                                                      eos_token_id, statistics)),
                 "README.md": model_card(size, main_dtype, checkpoint.name, not language_model, template, settings,
                                         tokenizer and tokenizer.path.name, end)}
        if tokenizer:
            texts["tokenizer.json"] = json.dumps(tokenizer_json(tokenizer, end or not written.splits_tokens),
                                                 ensure_ascii=False, allow_nan=False)
            texts["tokenizer_config.json"] = _as_json(
                tokenizer_config(tokenizer, pad_token_id, size.seq_length, written, end))
        shards = _shards(tensors, ".safetensors", max_shard_bytes)
        if len(shards) > 1:
            texts[INDEX_NAME] = _as_json({
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                "weight_map": {tensor.name: name for name, group in shards for tensor in group}})
        files = _write(checkpoint, output, shards, [write_safetensors] * len(shards), texts)
        taken = [stored[weight.name] for weight in weights]
        dropped = tuple(name for name in stored if name not in expected)
    notes = [f"checkpoint: {checkpoint}",
             f"architecture: {'GlmForCausalLM' if language_model else 'GlmForSequenceClassification, one label'}"]
    if statistics:
        notes.append(f"scores: mean {statistics.mean:.4f}, std {statistics.std:.4f}, from {score_statistics}")
    notes += _doubts(trained, asked, end)
    if not tokenizer:
        notes.append("no tokenizer files: --tokenizer tokenizer.model adds them")
    return Conversion(len(taken), sum(tensor.nbytes for tensor in taken), len(tensors),
                      sum(tensor.nbytes for tensor in tensors), "MindSpore", _heads(weights), dropped, output, files,
                      tuple(notes))


def _doubts(trained: TrainingNotes, template: Optional[str], add_eos: bool) -> Iterator[str]:
    """What to warn of, a line each."""
    if trained.doubt:
        yield f"WARNING: {trained.doubt}"
    noted = trained.values.get("prompt_template")
    if template and noted and template != noted:
        yield (f"WARNING: --prompt_template is {template!r}, the model was trained with {noted!r} ({trained.place}): "
               "with the template that is written, its scores mean little")
    if noted and bool(trained.values.get("add_eos")) != add_eos:
        yield (f"WARNING: --add_eos is {add_eos}, the model was trained with {not add_eos} ({trained.place}): its "
               "scores, which are read at a text's last token, mean little")


def _open_rank_file(path: Optional[str], pad_token_id: int, size: Dimensions, settings: Mapping[str, Any],
                    settings_file: Optional[Path]) -> Optional[RankTokenizer]:
    """The tokenizer to export, of a rank file or of one that became a tokenizer.json: that of training, whose ids the
    model has and one of which is the pad. From another tokenizer.json nothing would keep a user's text free of control
    tokens as a template's marks do.
    """
    if path is None:
        return None
    tokenizer = open_tokenizer(path)
    if isinstance(tokenizer, TransformersTokenizer) and tokenizer.rank_file is not None:
        tokenizer = RankTokenizer(tokenizer.path, tokenizer.rank_file)
    if not isinstance(tokenizer, RankTokenizer):
        kind = "a tokenizer.json that is not GLM-4's" if isinstance(tokenizer, TransformersTokenizer) else \
            "a SentencePiece model"
        raise UserError(f"--tokenizer: {tokenizer.path}: found {kind}, expected GLM-4's rank file (lines of "
                        "`base64-token rank`) or tokenizer.json")
    check_same_tokenizer("--tokenizer", tokenizer.identity, settings.get("tokenizer"), settings_file)
    if tokenizer.vocab_size > size.padded_vocab_size:
        raise UserError(f"--tokenizer: {tokenizer.path}: {tokenizer.vocab_size} ids, model.model_config."
                        f"padded_vocab_size is {size.padded_vocab_size}; expected at least as many")
    special = range(tokenizer.first_special, tokenizer.first_special + len(GLM4_SPECIAL_TOKENS))
    if pad_token_id not in special:
        raise UserError(f"model.model_config.pad_token_id is {pad_token_id}, expected a special token of "
                        f"{tokenizer.path} ({special[0]} to {special[-1]}): transformers finds a text's end by it")
    return tokenizer


def _read_source(source: str, weights: Sequence[Weight], output: Path, src_strategy: Optional[str],
                 stack: ExitStack) -> Tuple[Path, Dict[str, StoredTensor]]:
    """(checkpoint, its tensors under MindFormers' names); slices are merged into a folder that `stack` removes."""
    checkpoint = list_checkpoints(source, 0, flag="input")[-1]
    stored = _read_named(checkpoint)
    expected = {weight.name: weight.shape for weight in weights}
    sliced = [name for name, shape in expected.items() if name in stored and stored[name].shape != shape]
    ranks = sorted(path for path in Path(source).glob("rank_*") if path.is_dir())
    if src_strategy is None:
        if sliced and len(ranks) > 1:
            name = sliced[0]
            raise UserError(
                f"{source}: sliced over {len(ranks)} ranks ({name} of rank_0 is {list(stored[name].shape)}, the whole "
                f"one {list(expected[name])}): give --src_strategy, the folder output/strategy or the strategy file "
                "that the run wrote; without it, start the run once more with only_save_strategy: True in the YAML")
        for file in checkpoint_files(checkpoint):
            check_ckpt(file)
        return checkpoint, stored
    if len(ranks) < 2:
        raise UserError(f"--src_strategy is {src_strategy!r}, but {source} has no folders rank_0, rank_1, ... of a "
                        "sliced checkpoint; expected none")
    slices = newest_whole_slices(Path(source), "input")
    folder = stack.enter_context(partial_folder(output.with_name(f"{output.name}.merged")))
    with naming_a_full_disk(output):
        return slices[0], _read_named(merge_slices(slices, src_strategy, folder))


def _read_named(checkpoint: Path) -> Dict[str, StoredTensor]:
    return {with_prefix(name): tensor for name, tensor in read_ckpt_files(checkpoint_files(checkpoint)).items()}


def _check_head(stored: Tensors, language_model: bool, checkpoint: Path) -> None:
    if language_model and LM_HEAD_NAME not in stored:
        raise UserError(f"{checkpoint}: no {LM_HEAD_NAME} in it, expected one with --language_model")
    if not language_model and HEAD_NAME not in stored:
        hint = "; --language_model writes it as GlmForCausalLM" if LM_HEAD_NAME in stored else ""
        raise UserError(f"{checkpoint}: no value head ({HEAD_NAME}) in it, expected a trained reward model{hint}")


def _split(weight: Weight, stored: StoredTensor, dtype: Optional[str]) -> Iterator[OutputTensor]:
    """A weight as the tensors that transformers has for it."""
    row = 0
    for name, shape in weight.sources(TRANSFORMERS):
        yield OutputTensor(name, dtype or stored.dtype, shape, (Part.rows(stored, row, row + shape[0]),))
        row += shape[0]


def _as_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


# --- writing --------------------------------------------------------------------------------------------------------

def _check_output(output: Path, one_file: bool, inputs: Mapping[str, Any]) -> Path:
    """Where a link leads to that is the output; all others are their own place."""
    check_outputs({"--output": output}, inputs)
    place = follow_link(output)
    if one_file and place.is_dir():
        raise UserError(f"--output: {output}: a folder, expected a file name")
    if not one_file and place.exists() and not (place.is_dir() and not os.listdir(place)):
        raise UserError(f"--output: {output}: {'not empty' if place.is_dir() else 'a file'}, expected a new or empty "
                        "folder")
    return place


def _shards(tensors: Sequence[OutputTensor], suffix: str, limit: int) -> List[Tuple[str, List[OutputTensor]]]:
    """(file name, its tensors): one file, or numbered ones of at most `limit` bytes."""
    groups = split_into_shards(tensors, limit)
    if len(groups) == 1:
        return [(f"model{suffix}", groups[0])]
    return [(str(ShardName("model", number, len(groups), suffix)), group)
            for number, group in enumerate(groups, start=1)]


def _write(source: Path, output: Path, shards: Sequence[Tuple[str, Sequence[OutputTensor]]], writers: Sequence[Writer],
           texts: Optional[Mapping[str, str]] = None, one_file: bool = False) -> Tuple[str, ...]:
    """Write a folder of shards, each by its writer, and text files, or the one shard as a file.

    The output appears under its name when all of it is there.

    Returns:
        the names of the shards

    Raises:
        UserError: there is no room; or weights have values that are NaN or infinite (all of them are named).
    """
    names = tuple(name for name, _ in shards)
    count = sum(len(group) for _, group in shards)
    try:
        with partial_file(output) if one_file else partial_folder(output) as place, \
                tqdm(desc=f"write {output.name}", total=count, unit=" tensors") as bar:
            if one_file:
                if not is_stream(place):
                    _check_space(output, place.parent, shards)
                writers[0](place, shards[0][1], bar.update)
            else:
                _check_space(output, place, shards)
                whole = place / output.name
                whole.mkdir()
                for (name, group), writer in zip(shards, writers):
                    writer(whole / name, group, bar.update)
                for name, text in (texts or {}).items():
                    (whole / name).write_text(text, encoding="utf-8")
                os.replace(whole, output)
    except NotFiniteValues:
        names = [tensor.name for _, group in shards for tensor in group
                 if not all(part.are_finite() for part in tensor.parts)]
        raise UserError(f"{source}: NaN or infinity in {len(names)} of the {count} weights, expected finite values: "
                        f"{some(names)}") from None
    except OSError as error:
        raise UserError(f"--output: {output}: cannot be written: {error.strerror or error}") from None
    return names


def _check_space(output: Path, folder: Path, shards: Sequence[Tuple[str, Sequence[OutputTensor]]]) -> None:
    need, free = sum(tensor.nbytes for _, group in shards for tensor in group), shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"--output: {output}: needs {size_text(need, 2)}, but {size_text(free, 2)} are free on the "
                        "disk")
