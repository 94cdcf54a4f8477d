"""A loaded model asked all prompts of some suites, its answers judged: what the command and the study stand on.

>>> suites = {"xstest": load_suite("xstest"), "oktest": load_suite("oktest=oktest.jsonl")}
>>> result = evaluate_suites(model, ChatEncoder(tokenizer), suites, max_new_tokens=64)
>>> result.rates("xstest", "seemingly_toxic")["refusal"].estimate
>>> [answer.refusal_probability for answer in result.answers["oktest"]]
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig, PreTrainedModel

from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.evaluation import rates
from dcr_scale.evaluation.completions import Answer, CompletionStore, judged, spoken
from dcr_scale.evaluation.generation import Completion, completions
from dcr_scale.evaluation.intervals import Interval
from dcr_scale.evaluation.rates import Rates
from dcr_scale.evaluation.suites import Class, SuitePrompt
from dcr_scale.runlog import duration
from dcr_scale.world import World

if TYPE_CHECKING:
    from dcr_scale.baselines import Steering

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class EvaluationResult:
    """Every suite's answers in the suite's order, and what it took: prompts answered now (not kept from an earlier
    start), their tokens over all ranks, and this rank's seconds."""

    answers: Mapping[str, Sequence[Answer]]
    generated: int
    tokens: int
    seconds: float

    def rates(self, suite: str, of_class: Class) -> Rates:
        """The counts of a suite's prompts of one class; KeyError where it has none."""
        return Rates.of(rates.by_class(self.answers[suite])[of_class])

    def averages(self) -> dict[Class, Interval]:
        """Compliance over the seemingly toxic suites, defence success over the toxic ones: means over suites."""
        return rates.averages(self.answers)

    def as_dict(self) -> dict[str, Any]:
        suites = {
            suite: {
                of_class: {
                    **Rates.of(mine).as_dict(),
                    "by_category": {name: Rates.of(some).as_dict() for name, some in rates.by_category(mine).items()},
                }
                for of_class, mine in rates.by_class(answers).items()
            }
            for suite, answers in self.answers.items()
        }
        averages = {
            of_class: {"rate": rates.AVERAGED[of_class][0], **rates.rounded(interval)}
            for of_class, interval in self.averages().items()
        }
        return {"suites": suites, "averages": averages}


def evaluate_suites(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    suites: Mapping[str, Sequence[SuitePrompt]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    partitioned: bool = False,
    world: World | None = None,
    store: CompletionStore | None = None,
    steering: Steering | None = None,
) -> EvaluationResult:
    """Answer every prompt greedily, or take what ``store`` has of it, and judge it; the same on every rank.

    Args:
        model: in evaluation mode, the same on every rank or spread over them (``partitioned``).
        suites: prompts by the suite's name, which their ids begin with.
        batch_size: prompts answered at once on a rank.
        world: the ranks that share the work; None: this process alone.
        store: where completions are kept as they come; None: they are not.
        steering: applied while the model answers.

    Raises UserError where a prompt and its answer do not fit into the model's context, and whatever the store does.
    """
    world = world if world is not None else World(0, 1, 0, 1, model.device)

    def answer(encoded: Sequence[Sequence[int]]) -> Iterator[list[Completion]]:
        with steering.applied(model, encoder.tokenizer) if steering is not None else nullcontext() as hooks:
            yield from completions(
                model,
                encoder.tokenizer,
                encoded,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                partitioned=partitioned,
                world=world,
                hooks=hooks,
            )

    left = room(model.config, max_new_tokens)
    return ask(answer, encoder, suites, room=left, together=partitioned, world=world, store=store)


def ask(
    answer: Callable[[Sequence[Sequence[int]]], Iterator[list[Completion]]],
    encoder: ChatEncoder,
    suites: Mapping[str, Sequence[SuitePrompt]],
    *,
    room: int | None,
    together: bool,
    world: World,
    store: CompletionStore | None,
) -> EvaluationResult:
    """:func:`evaluate_suites` with any generator.

    Args:
        answer: gives this rank's share of the completions of encoded prompts, in batches as they are done.
        room: tokens that a prompt may have.
        together: the generator's passes are collectives, so every rank exhausts it, come what may.
    """
    prompts = {prompt.id: prompt for some in suites.values() for prompt in some}
    kept = store.kept(suites) if store is not None else {}
    asked = [prompt for prompt in prompts.values() if prompt.id not in kept]
    if kept:
        log.info("%d of %d prompts were answered before", len(prompts) - len(asked), len(prompts))
    encoded = [_encoded(prompt, encoder, room) for prompt in asked]
    began, thinks = time.perf_counter(), encoder.opens_thought
    own: dict[str, Answer] = {}
    tokens, progress = 0, _Progress(len(asked), world)
    for batch in answer(encoded):
        answers = [judged(asked[done.index], done.text, done.finished, thinks) for done in batch]
        own.update({answer.prompt.id: answer for answer in answers})
        tokens += sum(done.tokens for done in batch)
        progress.report(len(own), tokens)
        if store is not None and not store.append(answers) and not together:
            break
    if store is not None:
        store.check()
    found = {name: answer for share in world.gather(own) for name, answer in share.items()}
    found.update({name: judged(prompts[name], *completion, thinks) for name, completion in kept.items()})
    (all_tokens,) = world.sum(tokens)
    answers_of = {name: [found[prompt.id] for prompt in some] for name, some in suites.items()}
    if store is not None:
        store.finish(answers_of)
    silent = sum(bool(a.completion.strip()) and not spoken(a.completion, thinks).strip() for a in found.values())
    if silent:
        log.warning(
            "%d of %d answers end within a thought, or behind it, and count as degenerate: allow more tokens, or have "
            "the model not think (model.template)", silent, len(found),
        )  # fmt: skip
    return EvaluationResult(answers_of, len(asked), int(all_tokens), time.perf_counter() - began)


def room(config: PretrainedConfig, max_new_tokens: int) -> int | None:
    """How many tokens a prompt may have beside its answer; None where the model's context has no stated end."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - max_new_tokens


def _encoded(prompt: SuitePrompt, encoder: ChatEncoder, room: int | None) -> list[int]:
    ids = encoder.encode(prompt.text)
    if room is not None and len(ids) > room:
        raise UserError(
            f"{prompt.where}: the prompt has {len(ids)} tokens with its chat template, and the model's context leaves "
            f"{room} beside the new ones; lower --max-new-tokens, or leave it out"
        )
    return ids


class _Progress:
    """A line on the console now and then, of this rank's share."""

    def __init__(self, prompts: int, world: World):
        self.share, self.began = -(-prompts // world.size), time.perf_counter()
        self.said = self.began

    def report(self, done: int, tokens: int) -> None:
        now = time.perf_counter()
        if now - self.said < _SECONDS_BETWEEN_LINES:
            return
        self.said, seconds = now, now - self.began
        log.info(
            "%d/%d prompts  %.0f new tok/s  %s left",
            done, self.share, tokens / seconds, duration(seconds / done * max(0, self.share - done)),
        )  # fmt: skip
