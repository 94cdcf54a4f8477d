"""What an evaluation asks: the prompts of its suites, and general instructions with held-out answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from dcr_scale.config import DataConfig
from dcr_scale.data.instructions import load_general
from dcr_scale.data.sources import read_rows
from dcr_scale.data.splitting import draw
from dcr_scale.errors import UserError
from dcr_scale.evaluation.contamination import overlap
from dcr_scale.evaluation.evaluate_settings import EvaluateConfig
from dcr_scale.evaluation.suites import SUITES, SuitePrompt, class_counts, load_suite
from dcr_scale.evaluation.training_prompts import UNKNOWN, TrainedOn

log = logging.getLogger(__name__)


def read_suites(config: EvaluateConfig) -> dict[str, list[SuitePrompt]]:
    """The prompts of every suite by its name, at most ``config.limit`` of a class. Raises UserError."""
    if not config.suite:
        raise UserError(f"give at least one --suite: {', '.join(SUITES)}, NAME=FILE, or a file of your own")
    found: dict[str, list[SuitePrompt]] = {}
    for spec in config.suite:
        prompts = load_suite(spec)
        if not prompts:
            raise UserError(f"--suite {spec}: none of its rows counts: each has a label that the suite leaves out")
        name = prompts[0].id.rpartition("/")[0]
        if name in found:
            raise UserError(f"--suite {spec}: a suite named {name} is there already; rename one of the files")
        found[name] = _limited(prompts, config)
        # Published suites repeat some; they are counted as published, so that rates compare with others'.
        if repeated := len(found[name]) - len({(prompt.text, prompt.of_class) for prompt in found[name]}):
            log.info("%s: %d of %d prompts repeat another; each counts", name, repeated, len(found[name]))
    return found


def held_out(config: EvaluateConfig, training: TrainedOn = UNKNOWN) -> list[SuitePrompt]:
    """General instructions with answers: the file's, or those of the built-in ones that a run holds out.

    Of the built-in ones, those that the run trained on for another reason (its ``data.general`` mixes them with other
    sources, which changes what it holds out) are left out, and the console says how many; a file's all stay.
    Raises UserError where none is left.
    """
    if config.perplexity.path != "builtin":
        rows = [
            SuitePrompt(f"perplexity/{i}", row.values["prompt"], "general", "", row.where, row.values["response"])
            for i, row in enumerate(read_rows(config.perplexity, kind="general"))
        ]
    else:
        data, seed, run = DataConfig(), 0, training.run
        if run is not None:
            # Under the run's own seed and share, what it held out of the built-in ones is what is held out here.
            data, seed = replace(data, heldout=run.data.heldout, heldout_limit=run.data.heldout_limit), run.run.seed
        rows = [
            SuitePrompt(f"perplexity/{i}", example.prompt, "general", "", example.where, example.response)
            for i, example in enumerate(load_general(data, seed).heldout)
        ]
        seen = overlap("perplexity", rows, training.prompts or {}).ids
        if seen:
            log.info("%d of %d built-in held-out general answers were trained on: left out", len(seen), len(rows))
            rows = [row for row in rows if row.id not in seen]
        if not rows:
            raise UserError("perplexity: the run trained on all built-in general answers; give others by --perplexity")
    return draw(rows, config.perplexity.limit, _unit, seed=config.seed, purpose="limit")


def _limited(prompts: Sequence[SuitePrompt], config: EvaluateConfig) -> list[SuitePrompt]:
    """At most ``config.limit`` of each class, in the suite's order; a larger limit keeps what a smaller one drew."""
    kept: set[str] = set()
    for of_class in class_counts(list(prompts)):
        mine = [prompt for prompt in prompts if prompt.of_class == of_class]
        kept |= {prompt.id for prompt in draw(mine, config.limit, _unit, seed=config.seed, purpose="limit")}
    return [prompt for prompt in prompts if prompt.id in kept]


def _unit(prompt: SuitePrompt) -> str:
    return f"{prompt.text}\x1f{prompt.id}"
