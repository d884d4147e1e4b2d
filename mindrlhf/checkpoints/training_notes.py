"""What training leaves with its checkpoints: how the data was made, and the order of its pairs."""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

from mindrlhf.atomic import partial_file
from mindrlhf.data.mindrecord_files import read_settings

__all__ = ["read_data_settings", "write_data_settings"]

DATA_SETTINGS = "data_settings.json"


def write_data_settings(folder: Path, settings: Dict[str, Any]) -> None:
    """Leave with the checkpoints below `folder` how the training data was made and read (template, tokenizer, ...)."""
    with partial_file(folder / DATA_SETTINGS, wait=True) as file:  # each rank writes it
        file.write_text(json.dumps(settings, ensure_ascii=False, allow_nan=False, indent=2) + "\n",
                        encoding="utf-8")


def read_data_settings(path: Union[str, Path]) -> Tuple[Optional[Path], Dict[str, Any]]:
    """(file, settings) that training left with the checkpoints at `path`, or (None, {}): looked for beside the
    checkpoints and one and two folders above (rank_0, checkpoint_network).

    Raises:
        UserError: see `read_settings`.
    """
    path = Path(path)
    for folder in (path, *list(path.absolute().parents)[:2]):
        file = folder / DATA_SETTINGS
        if file.is_file():
            return file, read_settings(file)
    return None, {}
