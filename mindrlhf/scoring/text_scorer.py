"""Scores of answers to prompts: template, tokenizer and network together."""
from collections import deque
from typing import Deque, Iterable, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from mindrlhf.data.dialogue import Dialogue
from mindrlhf.data.template import as_dialogue
from mindrlhf.errors import UserError
from mindrlhf.processes import meet, sum_over_processes
from mindrlhf.scoring.plan import TextScoringPlan
from mindrlhf.scoring.scorer import Scorer, warn_of_end, warn_of_template
from mindrlhf.set_up import set_up_mindspore

__all__ = ["ScoredText", "TextScorer"]


Text = Union[str, Dialogue]  # a prompt or an answer: a message of the user or the assistant, or several messages


class ScoredText(NamedTuple):
    """An answer in the prompt template, not cut; whether it was cut to be scored; and its score."""

    text: str
    cut: bool
    score: float


class TextScorer:
    """Sets up the device, loads the plan's last checkpoint, and scores answers.

    Args:
        plan:    what is scored with
        verbose: see `set_up_mindspore`

    Attributes:
        rank:       of this process; all of them must score the same questions, and all know all scores
        checkpoint: that was loaded
        shapes:     (rows, length) of the batches
        window:     questions that are scored together
        texts:      scored so far
        cut:        how many of them were longer than the sequence length, and were cut

    Raises:
        UserError: the checkpoint is damaged or does not fit the model.
    """

    def __init__(self, plan: TextScoringPlan, verbose: bool = False):
        run = set_up_mindspore(plan.config, verbose)
        warn_of_template(plan.encoder.noted, plan.trained.get("prompt_template"), "--prompt_template")
        warn_of_end({"prompt_template": plan.encoder.noted, "add_eos": plan.encoder.add_eos}, plan.trained, "this run")
        self._plan, self._scorer = plan, Scorer(plan.config, run)
        checkpoint = self._scorer.checkpoints(plan.checkpoint)[-1]
        self._scorer.load(checkpoint)
        self.checkpoint, self.shapes, self.window = checkpoint.path, self._scorer.shapes, self._scorer.window
        self.rank, self.texts, self.cut = self._scorer.rank, 0, 0

    def said_by_first(self, number: int) -> int:
        """The number that the first process gives (a whole one, below 2 ** 24); all of them wait for it, and the others
        give 0.
        """
        return int(sum_over_processes(np.array([number], np.float32))[0]) if self._scorer.processes > 1 else number

    def meet(self) -> None:
        """Wait until all processes have come here; each of them must call it, and may end then."""
        if self._scorer.processes > 1:
            meet()

    def score(self, prompt: Text, answers: Sequence[Text]) -> List[float]:
        """The score of each answer; the better the answer, the higher. Only differences between answers to the same
        prompt mean something. NaN or infinite where the network overflows.

        Raises:
            UserError: a text has no token, or the template has none for such a dialogue.
        """
        texts, = self.score_all([(prompt, answers)])
        return [text.score for text in texts]

    def score_all(self, questions: Iterable[Tuple[Text, Sequence[Text]]]) -> Iterator[List[ScoredText]]:
        """The same of many (prompt, answers), in their order; they are read as they are needed."""
        waiting: Deque[List[Tuple[str, bool]]] = deque()  # read, and not yet scored
        encoder, length = self._plan.encoder, self._plan.config.model.seq_length

        def encoded():
            for prompt, answers in questions:
                question, all_answers = as_dialogue(prompt), [as_dialogue(answer, "assistant") for answer in answers]
                try:
                    fitted = encoder.fit(question, all_answers, length)
                except UserError as error:
                    raise UserError(f"{error} (prompt {prompt!r})") from None
                if not all(fitted.ids):
                    raise UserError(f"a text without a token cannot be scored: prompt {prompt!r}, answers "
                                    f"{list(answers)!r}, template {encoder.noted!r}")
                self.texts += len(fitted.ids)
                cut = [fitted.cut_prompt or is_cut for is_cut in fitted.cut_answers]
                self.cut += sum(cut)
                waiting.append([(encoder.text(question + answer), is_cut)
                                for answer, is_cut in zip(all_answers, cut)])
                yield fitted.ids

        for scores in self._scorer.score(encoded()):
            yield [ScoredText(*text, score) for text, score in zip(waiting.popleft(), scores)]
