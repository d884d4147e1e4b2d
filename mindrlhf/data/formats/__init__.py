"""The formats of preference data, in the order in which a row is asked for them: what has rare keys comes first."""
from typing import Dict, Optional

from mindrlhf.data.formats import (
    alpaca,
    answers,
    cvalues,
    explicit,
    helpsteer3,
    implicit,
    messages_explicit,
    messages_implicit,
    pku_saferlhf,
    ranked,
    reward_bench,
    reward_bench_2,
    sharegpt,
    swift,
)
from mindrlhf.data.formats.fields import Format
from mindrlhf.data.rows.row import Row

__all__ = ["FORMATS", "format_of"]

FORMATS: Dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in (
    cvalues, ranked, helpsteer3, pku_saferlhf, answers, swift, sharegpt, alpaca, reward_bench_2, reward_bench,
    messages_explicit, messages_implicit, explicit, implicit)}


def format_of(row: Row) -> Optional[str]:
    """The name of the first format that knows a row; None if there is none."""
    return next((name for name, kind in FORMATS.items() if kind.recognises(row)), None)
