"""General ability by lm-evaluation-harness, where it is installed: an optional extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from dcr_scale.errors import UserError

# Our names to the harness's.
TASKS = {
    "mmlu": ("mmlu",),
    "arc": ("arc_easy", "arc_challenge"),
    "openbookqa": ("openbookqa",),
    "piqa": ("piqa",),
}


def check_installed() -> None:
    """Raise UserError where lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs lm-eval: pip install -e '.[harness]' in the repository, or leave it out")


def accuracies(model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int, limit: int | None) -> dict:
    """What the harness reports of each task, under its own names: accuracy and standard error.

    Args:
        model: a whole transformers causal language model, with an attention that takes padded rows.
        limit: questions a task at most.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[name for task in tasks for name in TASKS[task]],
        limit=limit,
    )
    return {
        task: {name: value for name, value in metrics.items() if name.startswith("acc")}
        for task, metrics in found["results"].items()
    }
