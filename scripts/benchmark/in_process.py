"""What is measured inside a process that `Bench.call` has started."""
import json
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Dict, Iterator

import numpy as np
from settings import PREPARED_ROWS, WRITE_ROWS

from mindrlhf.config.check import load_config
from mindrlhf.data.encode import FIELDS, encode_pair
from mindrlhf.data.preference import read_preferences
from mindrlhf.data.template import PROMPT_TEMPLATE, render
from mindrlhf.data.tokenizer import open_tokenizer


def work_model(yaml: str, checkpoint: str, folder: str, tokenizer: str) -> Dict[str, Any]:
    """Save random weights for both sides."""
    import shutil

    import mindspore as ms
    from mindformers.models.glm2.glm2_config import ChatGLM2Config

    from mindrlhf.huggingface.convert import ms_to_hf
    from mindrlhf.models.glm4.glm_reward import Glm4RewardModel
    config = load_config(yaml)
    ms.set_seed(0)
    ms.save_checkpoint(Glm4RewardModel(ChatGLM2Config(**config.mapping["model"]["model_config"])), checkpoint)
    shutil.rmtree(folder, ignore_errors=True)
    ms_to_hf(checkpoint, config.model, Path(folder), tokenizer_path=tokenizer)
    return {}


def work_sgemm(size: int, repeats: int, threads: int) -> Dict[str, Any]:
    """GFLOP/s of NumPy and of MindSpore, each repeat."""
    import mindspore as ms
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", runtime_num_threads=threads)
    multiply, random = ms.ops.MatMul(), np.random.default_rng(0)
    a, b = random.random((size, size), np.float32), random.random((size, size), np.float32)
    tensors = ms.Tensor(a), ms.Tensor(b)
    rates: Dict[str, Any] = {"numpy": [], "mindspore": []}
    for _ in range(repeats + 1):
        for library, product in (("numpy", lambda: a @ b), ("mindspore", lambda: multiply(*tensors).asnumpy())):
            begin = time.perf_counter()
            product()
            rates[library].append(2 * size ** 3 / (time.perf_counter() - begin) / 1e9)
    return {library: values[1:] for library, values in rates.items()}


def work_conversion(source: str, tokenizer: str, seq_length: int, slow_pairs: int, folder: str) -> Dict[str, Any]:
    """Pairs/s of the converter, of MindRecord's writer with rows that are ready, and of the slow path."""
    from mindformers.models.glm2.glm4_tokenizer import ChatGLM4Tokenizer

    from mindrlhf.data.conversion_plan import ConversionPlan
    from mindrlhf.data.convert import convert_preferences
    from mindrlhf.data.text_encoder import TextEncoder
    output = Path(folder) / "conversion.mindrecord"
    opened, theirs = open_tokenizer(tokenizer), ChatGLM4Tokenizer(tokenizer)
    rates = {}

    begin = time.perf_counter()
    plan = ConversionPlan([(Path(source), None)], output, TextEncoder(opened, PROMPT_TEMPLATE), seq_length)
    pairs = convert_preferences(plan).lengths.count
    rates["converter"] = pairs / (time.perf_counter() - begin)
    remove(output)

    def encoded(encode, count):
        for row in islice(read_preferences(source), count):
            prompt, *answers = (messages[0].content for messages in (row.prompt, row.chosen, row.rejected))
            texts = [prompt.strip(), *(render(PROMPT_TEMPLATE, prompt, answer) for answer in answers)]
            _, *ids = encode(texts)  # the prompt alone as well: the converter's table has its length
            yield encode_pair(*ids, seq_length, opened.pad_token_id)

    ready = list(encoded(opened.encode_batch, PREPARED_ROWS))
    slow = encoded(lambda texts: [theirs(text, add_special_tokens=False)["input_ids"] for text in texts], slow_pairs)
    for way, rows, count in (("bare writer", islice(cycle(ready), pairs), pairs), ("slow path", slow, slow_pairs)):
        begin = time.perf_counter()
        write_rows(output, rows)
        rates[way] = count / (time.perf_counter() - begin)
        remove(output)
    return {**rates, "pairs": pairs, "slow_pairs": slow_pairs}


def write_rows(output: Path, rows: Iterator[Dict[str, np.ndarray]]) -> None:
    """Write samples with MindRecord's own writer, many at once."""
    from mindspore.mindrecord import FileWriter
    writer = FileWriter(str(output), shard_num=1, overwrite=True)
    writer.add_schema({name: {"type": np.dtype(kind).name, **({} if name == "end_ind" else {"shape": [-1]})}
                       for name, kind in FIELDS.items()}, "preference pairs")
    for chunk in iter(lambda: [{**row, "end_ind": int(row["end_ind"])} for row in islice(rows, WRITE_ROWS)], []):
        writer.write_raw_data(chunk)
    writer.commit()


def remove(record: Path) -> None:
    """Remove a MindRecord file with its index and sidecar."""
    for file in record.parent.glob(f"{record.name}*"):
        file.unlink()


def work_score(yaml: str, checkpoint: str, questions: str, folder: str) -> Dict[str, Any]:
    """Seconds of a pass over all questions after one that compiles; the scores of their texts, one after the other."""
    config = load_config(yaml, {"run_mode": "eval", "output_dir": folder})
    from mindrlhf.set_up import set_up_mindspore
    run = set_up_mindspore(config)
    from mindrlhf.scoring.scorer import Checkpoint, Scorer

    class CountingScorer(Scorer):
        """Notes how many tokens are computed."""

        computed = 0

        def _tensors(self, rows, length):
            self.computed += len(rows) * length
            return super()._tensors(rows, length)

    questions = [[np.array(text, np.int32) for text in texts] for texts in json.loads(Path(questions).read_text())]
    scorer = CountingScorer(config, run)
    scorer.load(Checkpoint(Path(checkpoint)))
    list(scorer.score(questions))
    scorer.computed = 0
    begin = time.perf_counter()
    scores = [score for texts in scorer.score(questions) for score in texts]
    return {"seconds": time.perf_counter() - begin, "computed_tokens": scorer.computed, "scores": scores}


WORK = {"model": work_model, "sgemm": work_sgemm, "conversion": work_conversion, "score": work_score}


def work() -> int:
    """`python scripts/benchmark PART SPEC.json`: a measurement that `Bench.call` has started."""
    spec = json.loads(Path(sys.argv[2]).read_text())
    result = Path(spec.pop("result"))
    result.write_text(json.dumps(WORK[sys.argv[1]](**spec)))
    return 0
