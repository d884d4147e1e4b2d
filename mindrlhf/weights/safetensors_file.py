"""safetensors files and the folders of them that model hubs publish.

The format: 8 bytes, the header's length; the header, JSON from name to dtype, shape and data_offsets; the data
(https://huggingface.co/docs/safetensors). Its Python package maps whole files into memory and has no bfloat16 for
NumPy; here a tensor is read in chunks, as bytes.
"""
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, Sequence, Tuple

from mindrlhf.errors import UserError, raise_problems
from mindrlhf.file_kinds import kind_of_file
from mindrlhf.json_file import LARGEST_JSON, read_json_object
from mindrlhf.weights.shards import missing_shards
from mindrlhf.weights.tensors import MOST_DIMENSIONS, InputFile, OutputTensor, Segment, StoredTensor, tensors_of_files

__all__ = ["INDEX_NAME", "read_safetensors", "read_safetensors_folder", "write_safetensors"]

INDEX_NAME = "model.safetensors.index.json"
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {name: code for code, name in _NAMES.items()}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
          "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}


def read_safetensors(path: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of one file; only its header is read.

    Raises:
        UserError: the file is absent, cut short, or something else.
    """
    try:
        source = InputFile(path)
        header, start = _read_header(source)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError:
        kind = kind_of_file(path)
        if kind:
            raise UserError(f"{path}: not a safetensors file but {kind}") from None
        raise
    header.pop("__metadata__", None)
    tensors = {name: _stored(source, name, entry, start) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].segments[0].offset, item[1].nbytes)):
        segment = tensor.segments[0]
        if segment.offset != end:
            raise UserError(f"{path}: {name} begins at byte {segment.offset}, expected {end}: damaged")
        end += segment.size
    if end != source.size:
        raise UserError(f"{path}: {source.size} bytes, its header says {end}: "
                        f"{'cut short' if source.size < end else 'damaged'}")
    return tensors


def _read_header(source: InputFile) -> Tuple[Dict[str, Any], int]:
    """(the header of a file, where the data begins)."""
    path, size = source.path, source.size
    with open(source.descriptor, "rb", closefd=False) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: {size} bytes, a header of {length} bytes does not fit in: cut short, or not a "
                            "safetensors file")
        if length > LARGEST_JSON:
            raise UserError(f"{path}: a header of {length:,} bytes, expected at most {LARGEST_JSON:,}: damaged, or not "
                            "a safetensors file")
        content = file.read(length)
    try:
        header = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its header is not JSON: damaged, or not a safetensors file") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not an object: damaged, or not a safetensors file")
    return header, 8 + length


def _stored(source: InputFile, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        right = len(shape) <= MOST_DIMENSIONS and \
            all(type(value) is int and 0 <= value < 1 << 63 for value in (*shape, begin, end)) and \
            end - begin == math.prod(shape) * _BYTES[code]
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise UserError(f"{source.path}: {name}: found {str(entry)[:120]} in the header, expected dtype, shape and "
                        "data_offsets that fit together")
    return StoredTensor(_NAMES.get(code, code), shape, (Segment(source, start + begin, end - begin),))


def read_safetensors_folder(folder: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of a model's folder: one file, or shards with or without their index.

    Raises:
        UserError: a shard is missing, a file is damaged, or index and files contradict each other.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}, expected a folder with "
                        "config.json and .safetensors files")
    index_file = folder / INDEX_NAME
    if index_file.is_file():
        return _read_indexed(folder, index_file)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = next((file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt"))), None)
        hint = f"; {pickles} is a pickle, which is not read: fetch the model's .safetensors files" if pickles else ""
        raise UserError(f"{folder}: no .safetensors file in it{hint}")
    raise_problems(str(folder), missing_shards([file.name for file in files], ".safetensors"))
    return tensors_of_files(files, read_safetensors)


def _read_indexed(folder: Path, index_file: Path) -> Dict[str, StoredTensor]:
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index_file}: found no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or len(name.encode("utf-8", "replace")) > 255]
    raise_problems(str(index_file), (f"names the file {name}, expected one in the same folder" for name in outside))
    raise_problems(str(folder), (f"{name} is missing, {INDEX_NAME} names it" for name in names
                                 if not (folder / name).is_file()))
    in_files = {name: read_safetensors(folder / name) for name in names}
    raise_problems(str(index_file), [
        *(f"says that {tensor} is in {name}, where it is not" for tensor, name in weight_map.items()
          if tensor not in in_files[name]),
        *(f"does not say that {tensor} is in {name}" for name, tensors in in_files.items() for tensor in tensors
          if weight_map.get(tensor) != name)][:4])
    return {tensor: in_files[name][tensor] for tensor, name in weight_map.items()}


def write_safetensors(path: Path, tensors: Sequence[OutputTensor], written: Callable[[], object]) -> None:
    """Write a file; `written` is called after each tensor."""
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [begin, begin + tensor.nbytes]}
        begin += tensor.nbytes
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.writelines(tensor.chunks())
            written()
