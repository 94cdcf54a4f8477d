"""STL-aug's data: seemingly toxic prompts with a model's own answers, from before it learns to refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedModel

from dcr_scale.data.chat import ChatEncoder
from dcr_scale.evaluation.harness import evaluate_suites
from dcr_scale.evaluation.suites import SuitePrompt

_SENTENCE_END = re.compile(r"[.!?][\"'”’)]?(?=\s)")


def own_answers(
    model: PreTrainedModel, encoder: ChatEncoder, prompts: Sequence[str], *, max_new_tokens: int
) -> list[dict[str, str]]:
    """``prompt`` and ``response`` of every prompt that the model, asked greedily, answers by the judge's reading.

    An answer that the limit has cut ends with its last whole sentence; one without any is left out.
    """
    suite = [SuitePrompt(f"own/{i}", text, "seemingly_toxic", "", "") for i, text in enumerate(prompts)]
    found = evaluate_suites(model, encoder, {"own": suite}, max_new_tokens=max_new_tokens)
    rows = []
    for answer in found.answers["own"]:
        text = answer.completion.strip() if answer.finished else whole_sentences(answer.completion)
        if answer.label == "compliance" and text:
            rows.append({"prompt": answer.prompt.text, "response": text})
    return rows


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; nothing where there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(f"{text} ")]
    return text[: ends[-1]].strip() if ends else ""
