"""The table, in Markdown, of what was measured."""
from statistics import median
from typing import Any, Dict, List, Sequence

from runner import model_text
from settings import ANSWER_TOKENS, ANSWERS, OURS, PARTS, PROMPT_TOKENS, SEQ, SGEMM_SIZE, THREADS, TRL


def report(results: Dict[str, Any]) -> List[str]:
    """The lines of benchmark.md."""
    where, amounts = results["machine"], results["settings"]["amounts"]
    found = ", ".join(f"{name} {release}" for name, release in where["versions"].items())
    lines = [f"{where['date'][:16].replace('T', ' ')}, {where['cores']} cores ({where['processor']}), of "
             f"whose time other processes took {max(where['share_of_others'], 0):.0%}; {found}. "
             f"Pairs: {results['data']['name']}. Rounds, in which all take their turn: {amounts['rounds']}; "
             "figures are medians."
             + (" --quick: these figures mean little." if results["settings"]["quick"] else "")]
    if "conversion" in results:
        lines += ["", "Conversion, pairs/s:", "", *conversion_table(results["conversion"])]
    model = model_text(results["settings"]["dimensions"])
    for part in PARTS:
        if part in results and part.startswith("training"):
            here = results[part]
            lines += ["", f"Training ({model_text(here['dimensions'])}, {here['pairs_a_step']} pairs a step, sequence "
                      f"length {SEQ}, {amounts['training'][part]} pairs):", "", *training_table(results, part)]
        elif part in results and part.startswith("scoring"):
            asked = f"both answers of {results[part]['questions']} questions" if part == "scoring" else (
                f"{ANSWERS} answers of {ANSWER_TOKENS} tokens to each of {results[part]['questions']} prompts of "
                f"{PROMPT_TOKENS}")
            lines += ["", f"Scoring ({model}; {asked}):", "", *scoring_table(results, part)]
    if "sgemm" in results:
        lines += ["", *ceiling_lines(results)]
    if "start-up" in results:
        rows = [[f"`{entry}`", *(f"{median(times):.2f} s" for times in kinds.values())]
                for entry, kinds in results["start-up"].items()]
        lines += ["", "Start-up:", "", *markdown([["script", "`--help`", "an argument error"], *rows])]
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows, the first one the heading, as a table."""
    heading, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (heading, ["---"] + ["---:"] * (len(heading) - 1), *body)]


def conversion_table(rounds: Dict[str, List[Dict[str, Any]]]) -> List[str]:
    """A row a sequence length."""
    rows = [["sequence length", "`cvalues_comparison.py`", "bare MindRecord writer", "slow path (ChatGLM4Tokenizer)",
             "to the writer", "to the slow path"]]
    for length, found in rounds.items():
        ours, bare, slow = (median(one[way] for one in found) for way in ("converter", "bare writer", "slow path"))
        rows.append([length, *(f"{rate:,.0f}" for rate in (ours, bare, slow)), f"{ours / bare:.0%}",
                     f"{ours / slow:.1f}x"])
    return markdown(rows)


def training_table(results: Dict[str, Any], name: str) -> List[str]:
    """A row a way of batching, and TRL's."""
    part = results[name]
    rates = {way: median(one["pairs"] / one["seconds"] for one in found) for way, found in part["rounds"].items()}
    allowed, text_tokens = allowed_tokens(results, name), part["text_tokens"] * 2 / part["texts"]
    rows = [["", "pairs/s", "real tokens/s", "padding", "computed a real token", "pairs a step", "peak memory",
             "of sgemm", *(["to TRL"] if TRL in rates else [])]]
    for way, found in part["rounds"].items():
        one, tokens = found[0], rates[way] * text_tokens
        computed = one["computed_tokens"] / one["pairs"]
        real = text_tokens if way in ("padded", TRL) else part["tokens_with_prompts_once"] * 2 / part["texts"]
        rows.append([f"{TRL}, `group_by_length`" if way == TRL else f"`batching: {way}`", f"{rates[way]:.2f}",
                     f"{tokens:,.0f}", f"{1 - real / computed:.0%}", f"{computed / text_tokens:.2f}",
                     f"{one['pairs'] / one['steps_an_epoch']:.1f}", memory(found), f"{tokens / allowed:.0%}",
                     *([f"{rates[way] / rates[TRL]:.2f}x"] if TRL in rates else [])])
    return markdown(rows)


def scoring_table(results: Dict[str, Any], name: str) -> List[str]:
    """A row for this project, and those of transformers."""
    part = results[name]
    seconds = {way: median(one["seconds"] for one in found) for way, found in part["rounds"].items()}
    allowed = allowed_tokens(results, name)
    best = min((taken for way, taken in seconds.items() if way != OURS), default=None)
    rows = [["", "texts/s", "real tokens/s", "padding", "computed a real token", "peak memory", "of sgemm",
             *(["to transformers' best"] if best else [])]]
    for way, found in part["rounds"].items():
        tokens, computed = part["text_tokens"] / seconds[way], found[0]["computed_tokens"]
        real = part["tokens_with_prompts_once"] if way == OURS else part["text_tokens"]
        rows.append([way, f"{part['texts'] / seconds[way]:.1f}", f"{tokens:,.0f}", f"{1 - real / computed:.0%}",
                     f"{computed / part['text_tokens']:.2f}", memory(found), f"{tokens / allowed:.0%}",
                     *([f"{best / seconds[way]:.2f}x"] if best else [])])
    return markdown(rows)


def memory(found: Sequence[Dict[str, Any]]) -> str:
    """The peak, for the table."""
    return f"{median(one['peak_mb'] for one in found):,.0f} MB"


def sgemm_rates(results: Dict[str, Any]) -> Dict[str, float]:
    """Library -> median GFLOP/s over all rounds, each with the median of its repeats."""
    return {library: median(median(found[library]) for found in results["sgemm"])
            for library in ("numpy", "mindspore", "torch") if library in results["sgemm"][0]}


def allowed_tokens(results: Dict[str, Any], part: str) -> float:
    """Real tokens/s if all were matrix products at the rate of the fastest library; backward costs twice forward."""
    times = 3 if part.startswith("training") else 1
    return max(sgemm_rates(results).values()) * 1e9 / (times * results[part]["flop_a_token"])


def ceiling_lines(results: Dict[str, Any]) -> List[str]:
    """What the machine's matrix products would allow, and whether both sides computed the same."""
    rates = sgemm_rates(results)
    text = ["Real tokens are those of all texts, each with its prompt. Padding is what is no text among the computed "
            "tokens, of which fewer are computed than are real where answers share their prompt."]
    text += [f"sgemm of {SGEMM_SIZE} x {SGEMM_SIZE} on {THREADS} threads, GFLOP/s: "
            + ", ".join(f"{library} {rate:.0f}" for library, rate in rates.items()) + "."]
    for part in PARTS:
        times = 3 if part.startswith("training") else 1
        if part in results and part.startswith(("training", "scoring")):
            text.append(f"At the highest of these, {part} could do {allowed_tokens(results, part):,.0f} real tokens/s "
                        f"({times * results[part]['flop_a_token'] / 1e6:.1f} MFLOP each, without embedding, optimizer "
                        "and padding).")
    for part in ("scoring", "scoring-8"):
        if part in results and len(results[part]["rounds"]) > 1:
            text.append(f"Largest difference between the scores of both sides in {part}: "
                        f"{results[part]['largest_difference_of_scores']:.1e}; they range over "
                        f"{results[part]['spread_of_scores']:.2f}.")
    return [" ".join(text)]
