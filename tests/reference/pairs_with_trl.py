"""Encode conversational pairs with an exported tokenizer, as TRL prepares them.

    python tests/reference/pairs_with_trl.py < cases.json > result.json

cases.json: an object, folder -> list of rows with chosen and rejected, and prompt or none. result.json: folder -> the
ids of the chosen and the rejected text of each row, of the row as it is and with its prompt extracted; null where TRL
is absent.
"""
import importlib.util
import json
import sys

from transformers import AutoTokenizer


def main() -> None:
    if not importlib.util.find_spec("trl"):
        json.dump(None, sys.stdout)
        return
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    result = {}
    for folder, rows in json.load(sys.stdin).items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result[folder] = {"as they are": [], "extracted": []}
        for row in rows:
            for way, example in (("as they are", row), ("extracted", maybe_extract_prompt(row))):
                text = maybe_apply_chat_template(example, tokenizer)
                result[folder][way].append(tokenizer([text.get("prompt", "") + text[side]
                                                      for side in ("chosen", "rejected")])["input_ids"])
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
