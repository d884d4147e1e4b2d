#!/usr/bin/env python3
"""Write the bundled tokenizer.model: a small byte-level BPE in GLM-4's own format, trained on train.jsonl.

    python make_tokenizer.py [FOLDER]

Text is cut with GLM-4's split pattern; then the most frequent pair of neighbouring tokens is merged, again and again
(ties: the pair that sorts first), until there are RANKS tokens. The special tokens follow them, as in GLM-4's file, so
that <|endoftext|>, the pad token, has the id RANKS. The same text always gives the same bytes.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import regex

from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import GLM4_PATTERN, write_rank_file

RANKS = 996


def sample_texts(path: Path) -> list:
    """Both texts of every pair, as the model will see them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [render(PROMPT_TEMPLATE, row["prompt"], row[side]) for row in rows for side in ("pos_resp", "neg_resp")]


def train_bpe(texts: list, ranks: int) -> list:
    """The tokens in the order of their ranks: the 256 bytes, then what was merged."""
    tokens = [bytes([value]) for value in range(256)]
    counts = Counter(piece for text in texts for piece in regex.findall(GLM4_PATTERN, text))
    words = [([bytes([value]) for value in piece.encode("utf-8")], count) for piece, count in counts.items()]
    while len(tokens) < ranks:
        pairs = Counter()
        for word, count in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(left + right)
        words = [(_merge(word, left, right), count) for word, count in words]
    return tokens


def _merge(word: list, left: bytes, right: bytes) -> list:
    merged, position = [], 0
    while position < len(word):
        if word[position:position + 2] == [left, right]:
            merged.append(left + right)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return merged


def main() -> None:
    """Train on FOLDER/train.jsonl, write FOLDER/tokenizer.model."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    tokens = train_bpe(sample_texts(folder / "train.jsonl"), RANKS)
    write_rank_file(folder / "tokenizer.model", tokens)
    sys.stdout.write(f"tokenizer.model: {len(tokens)} ranks\n")


if __name__ == "__main__":
    main()
