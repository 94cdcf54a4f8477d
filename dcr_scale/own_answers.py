"""Seemingly toxic prompts with a model's own answers, from before it learns to refuse: what stage 2 is to keep.

DCR's default trains on some of them, and so does the baseline STL-aug.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from dcr_scale import engine as engines
from dcr_scale.config import Config
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.instructions import Instruction
from dcr_scale.evaluation.completions import spoken
from dcr_scale.evaluation.harness import evaluate_suites
from dcr_scale.evaluation.suites import SuitePrompt
from dcr_scale.models import attention
from dcr_scale.models.loading import Placement
from dcr_scale.models.stored import StoredModel
from dcr_scale.world import World

log = logging.getLogger(__name__)

# So many prompts are asked at once for each answer that is wanted: a model that refuses three of four has enough then.
_ASKED_FOR_AN_ANSWER = 4

_SENTENCE_END = re.compile(r"[.!?][\"'”’)]?(?=\s)")
_NUMBER_OF_AN_ITEM = re.compile(r"^\s*\d+\.$")


def answered_by(
    stored: StoredModel, prompts: Sequence[Instruction], wanted: int, encoder: ChatEncoder, config: Config, world: World
) -> tuple[list[Instruction], int]:
    """The prompts that a checkpoint's model answers, with its answers, and how many it was asked: in their order until
    ``wanted`` are answered, several times as many at once. Every rank calls it; the model lies as in looks
    (``look.partitioned``)."""
    dtype = engines.compute_dtype(config.engine, world.device)
    placement = Placement.choose(
        config.look.partitioned, stored.checkpoint,
        attention=attention.SDPA, dtype=dtype, settings=config.engine, world=world,
    )  # fmt: skip
    model = placement.load(stored, config.model)
    answered: list[Instruction] = []
    count = 0
    with placement.running(model):
        while count < len(prompts) and len(answered) < wanted:
            asked = prompts[count : count + _ASKED_FOR_AN_ANSWER * wanted]
            count += len(asked)
            log.info("asking the model %d seemingly toxic prompts, whose answers stage 2 is to keep", len(asked))
            rows = own_answers(
                model, encoder, [one.prompt for one in asked],
                max_new_tokens=config.data.answer_tokens, batch_size=config.look.batch_size,
                partitioned=placement.partitioned, world=world,
            )  # fmt: skip
            log.info("%d of them answered", len(rows))
            answers = {row["prompt"]: row["response"] for row in rows}
            answered += [replace(one, response=answers[one.prompt]) for one in asked if one.prompt in answers]
    return answered, count


def write_answers(path: Path, answered: Sequence[Instruction]) -> None:
    """A JSONL file to be read by people, or by another run under ``data.answered``."""
    rows = [json.dumps({"prompt": one.prompt, "response": one.response}, ensure_ascii=False) for one in answered]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def own_answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    partitioned: bool = False,
    world: World | None = None,
) -> list[dict[str, str]]:
    """``prompt`` and ``response`` of every prompt that the model, asked greedily, answers by the judge's reading; the
    same on every rank.

    An answer that the limit has cut ends with its last whole sentence; one without any is left out, and so is one that
    thinks aloud first.
    """
    suite = [SuitePrompt(f"own/{i}", text, "seemingly_toxic", "", "") for i, text in enumerate(prompts)]
    found = evaluate_suites(
        model, encoder, {"own": suite},
        max_new_tokens=max_new_tokens, batch_size=batch_size, partitioned=partitioned, world=world,
    )  # fmt: skip
    rows = []
    for answer in found.answers["own"]:
        text = answer.completion.strip() if answer.finished else whole_sentences(answer.completion)
        # A thought would be learnt as an answer; by models that think, answers are better given as a file.
        thought = spoken(answer.completion, encoder.opens_thought) != answer.completion
        if answer.label == "compliance" and text and not thought:
            rows.append({"prompt": answer.prompt.text, "response": text})
    return rows


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; nothing where there is none. The number of a list's item is
    none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(f"{text} ")]
    ends = [end for end in ends if not _NUMBER_OF_AN_ITEM.match(text[:end].rpartition("\n")[2])]
    return text[: ends[-1]].strip() if ends else ""
