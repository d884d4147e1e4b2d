"""Score texts with an exported model, as a user of transformers and of TRL would.

    python tests/reference/score_with_transformers.py FOLDER < texts.json > result.json

texts.json: a list of [prompt, answer]. result.json: `texts` as the chat template renders them, `ids`, `scores` one by
one, `batched` scores, and `trl`: those of the scorer of TRL's trainers, or null where TRL is absent.
"""
import importlib.util
import json
import os
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@torch.no_grad()
def main() -> None:
    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt},
                                            {"role": "assistant", "content": answer}], tokenize=False)
             for prompt, answer in json.load(sys.stdin)]
    ids = tokenizer(texts)["input_ids"]
    scores = [model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in ids]
    batched = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].tolist()
    trl = None
    if importlib.util.find_spec("trl"):
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.utils import get_reward
        rows = (torch.tensor([[*row, tokenizer.pad_token_id]]) for row in ids)
        trl = [get_reward(model, row, tokenizer.pad_token_id, 0)[1].item() for row in rows]
    json.dump({"class": type(model).__name__, "texts": texts, "ids": ids, "scores": scores, "batched": batched,
               "trl": trl}, sys.stdout)


if __name__ == "__main__":
    main()
