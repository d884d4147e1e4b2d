"""The half of the benchmark that runs in the environment of PyTorch: transformers, TRL, and PyTorch's matrix product.

    python peers.py PART SPEC.json

runner.py starts it. SPEC.json holds the part's arguments and, under `result`, the file for what it found.
"""
import json
import sys
import time
from pathlib import Path

import torch


def train(model, pairs, batch_size, epochs, threads, folder, optimizer):
    """TRL's `RewardTrainer`. Returns a row a step, named as those of metrics.csv.

    Pairs of like length are together, in the order that transformers' `group_by_length` gives a data set of 800 pairs
    or more. It sorts pieces of 50 batches there, and of fewer in a smaller set, which would leave more padding.
    """
    torch.set_num_threads(threads)
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    pairs = json.loads(Path(pairs).read_text())
    torch.manual_seed(0)
    order = get_length_grouped_indices([max(map(len, pair)) for pair in pairs], batch_size, mega_batch_mult=50)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    batches, steps = [], []

    class Collator(DataCollatorForPreference):
        """TRL's own, which also notes what a batch holds; batches are made in the order of the steps."""

        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batches.append({"pairs": len(examples), "text_tokens": int(batch["attention_mask"].sum()),
                            "computed_tokens": batch["input_ids"].numel()})
            return batch

    class Clock(TrainerCallback):
        """Times a step from its batch being there to the weights being new, as `RewardMonitor` does."""

        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append((time.perf_counter() - self.begin) * 1000)

    RewardTrainer(
        model=network,
        args=RewardConfig(
            output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=epochs, max_length=None,
            train_sampling_strategy="sequential", gradient_checkpointing=False, bf16=False, use_cpu=True,
            dataloader_drop_last=True, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, seed=0, **optimizer),
        train_dataset=Dataset.from_dict({side: [pairs[place][number] for place in order]
                                         for number, side in enumerate(("chosen_ids", "rejected_ids"))}),
        processing_class=tokenizer, data_collator=Collator(pad_token_id=tokenizer.pad_token_id), callbacks=[Clock()],
    ).train()
    return {"steps": [{"step_ms": step_ms, **batch} for step_ms, batch in zip(steps, batches)],
            "attention": network.config._attn_implementation, "checkpointing": network.is_gradient_checkpointing}


@torch.no_grad()
def score(model, texts, threads, batch_size):
    """Seconds of transformers over all texts: one by one, and sorted by length in padded batches; and the scores."""
    torch.set_num_threads(threads)
    from transformers import AutoModelForSequenceClassification
    texts = json.loads(Path(texts).read_text())
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    ways = {"one by one": 1, f"batches of {batch_size} sorted by length": batch_size}
    result = {}
    for way, size in ways.items():
        order = range(len(texts)) if size == 1 else sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        scores, computed = [0.0] * len(texts), 0

        def run(places, size=size, scores=scores):
            rows = [torch.tensor(texts[place]) for place in places]
            inputs = {"input_ids": torch.nn.utils.rnn.pad_sequence(rows, True, network.config.pad_token_id)}
            if size > 1:
                inputs["attention_mask"] = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
            for place, value in zip(places, network(**inputs, use_cache=False).logits[:, 0].tolist()):
                scores[place] = value
            return inputs["input_ids"].numel()

        run(order[:size])
        begin = time.perf_counter()
        for first in range(0, len(order), size):
            computed += run(order[first:first + size])
        result[way] = {"seconds": time.perf_counter() - begin, "computed_tokens": computed, "scores": scores}
    return {"ways": result}


def sgemm(size, repeats, threads):
    """GFLOP/s of PyTorch's product of two square float32 matrices, each repeat; and the releases."""
    torch.set_num_threads(threads)
    import transformers
    import trl
    a, b = torch.rand(size, size), torch.rand(size, size)
    rates = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        a @ b
        rates.append(2 * size ** 3 / (time.perf_counter() - begin) / 1e9)
    return {"torch": rates[1:], "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                                             "trl": trl.__version__}}


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[2]).read_text())
    target = Path(spec.pop("result"))
    target.write_text(json.dumps({"train": train, "score": score, "sgemm": sgemm}[sys.argv[1]](**spec)))
