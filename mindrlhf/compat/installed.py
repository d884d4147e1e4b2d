"""The one rule that depends on the release before MindFormers can be asked itself. Imports nothing of it.

A configuration is checked before MindSpore and MindFormers are imported, which takes seconds, and whether they are
there or not. So this one rule reads the installed release's number; all others ask a release by its features.
"""
import re
from importlib import metadata

__all__ = ["repeats_key_and_value"]


def repeats_key_and_value() -> bool:
    """Whether flash attention may be cut into more slices than there are key-value groups.

    GLM's layers of MindFormers 1.6 to 2.1 cut key and value into as many slices as there are groups at the most, and
    neighbouring processes have the same one (`kv_mp` in `ChatGLM2SelfAttention`). Those of 1.3 cut them like the query,
    which has more heads. Without MindFormers here the rule is the later one.
    """
    try:
        found = re.match(r"(\d+)\.(\d+)", str(metadata.version("mindformers")))
    except metadata.PackageNotFoundError:
        return True
    return found is None or tuple(map(int, found.groups())) >= (1, 6)
