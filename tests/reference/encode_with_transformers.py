"""Encode dialogues with an exported tokenizer, as a user of transformers would.

    python tests/reference/encode_with_transformers.py < cases.json > result.json

cases.json: an object, folder -> list of dialogues, each a list of messages. result.json: folder -> `direct`, the ids of
`apply_chat_template` each, and `by_text`, those of the text that it renders.
"""
import json
import sys

from transformers import AutoTokenizer


def main() -> None:
    result = {}
    for folder, dialogues in json.load(sys.stdin).items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in dialogues]
        direct = [tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
                  for messages in dialogues]
        result[folder] = {"direct": direct, "by_text": tokenizer(texts)["input_ids"]}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
