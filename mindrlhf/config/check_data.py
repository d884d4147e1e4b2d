"""The data that a configuration names, and whether it was made for the model."""
from typing import Any, Iterable, Mapping

from mindrlhf.config.read import get
from mindrlhf.config.run_config import Model
from mindrlhf.data.record_set import RecordSet
from mindrlhf.errors import UserError, raise_each

__all__ = ["check_records", "open_records"]


def open_records(mapping: Mapping[str, Any], block: str) -> RecordSet:
    """The data that `train_dataset` or `eval_dataset`, which are flags too, names.

    Raises:
        UserError: no data is named; see `RecordSet.open`.
    """
    loader = get(mapping, f"{block}.data_loader")
    paths = loader.get("dataset_dir") or loader.get("dataset_files")
    if not paths:
        raise UserError(f"no data: give --{block}, or {block}.data_loader.dataset_dir in the YAML")
    return RecordSet.open(paths)


def check_records(records: RecordSet, model: Model, exact: bool) -> None:
    """Raise `UserError` unless the data was made for a model with these dimensions.

    Args:
        exact: rows have the data's length, which must be the model's; otherwise it may be smaller
    """
    raise_each(str(records.sidecar), _record_problems(records.settings, model, exact))


def _record_problems(settings: Mapping[str, Any], model: Model, exact: bool) -> Iterable[str]:
    length, pad_token_id = settings.get("seq_length"), settings.get("pad_token_id")
    if length is not None and (length > model.seq_length or (exact and length != model.seq_length)):
        yield (f"the data's seq_length is {length}, model.model_config.seq_length (or --seq_length) is "
               f"{model.seq_length}; {'they must be equal' if exact else 'it must not be larger'}")
    if pad_token_id is not None and pad_token_id != model.pad_token_id:
        yield (f"the data's pad_token_id is {pad_token_id}, model.model_config.pad_token_id is {model.pad_token_id}; "
               "they must be equal")
    vocabulary = get(settings, "tokenizer.vocab_size")
    if isinstance(vocabulary, int) and vocabulary > model.dimensions.padded_vocab_size:
        yield (f"the data's tokenizer has {vocabulary} ids, model.model_config.padded_vocab_size is "
               f"{model.dimensions.padded_vocab_size}; expected at least as many")
