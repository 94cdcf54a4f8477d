"""The first look at the effect: a few held-out prompts of each class, quick enough to take three times a run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dcr_scale import engine as engines
from dcr_scale.config import Config, Label
from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.data.contrast import ContrastPrompt, EncodedPrompts, telling
from dcr_scale.data.instructions import Instruction
from dcr_scale.data.packing import micro_batches, pack
from dcr_scale.errors import UserError
from dcr_scale.evaluation.activation_map import ActivationMap, MappedPrompt
from dcr_scale.evaluation.completions import Answer, judged
from dcr_scale.evaluation.generation import generate
from dcr_scale.evaluation.intervals import Interval
from dcr_scale.evaluation.rates import Rates, by_class, rounded
from dcr_scale.evaluation.suites import CLASSES, Class, SuitePrompt
from dcr_scale.models import attention
from dcr_scale.models.loading import Placement
from dcr_scale.models.response_loss import ResponseLoss
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import Trunk, depth
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.separation import Separation, pooled_activations, separation
from dcr_scale.world import World

log = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Look:
    """What a model did: cosines at ``layer``, what became of the prompts of each class, and held-out perplexity."""

    separation: Separation
    layer: int
    rates: Mapping[Class, Rates]
    perplexity: float

    def as_tree(self) -> dict[str, Any]:
        """All of it as JSON holds it, for a run that is interrupted after the look."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Look:
        """What :meth:`as_tree` gave."""
        rates = {name: Rates(**found) for name, found in tree["rates"].items()}
        return cls(Separation(**tree["separation"]), tree["layer"], rates, tree["perplexity"])

    def as_dict(self) -> dict:
        refusal = {name: rounded(found["refusal"]) for name, found in self.rates.items()}

        def shares(counted: str) -> dict[str, float]:
            return {name: round(found[counted].estimate, 4) for name, found in self.rates.items()}

        return {
            "layer": self.layer,
            "cosine": self.separation.as_dict(),
            "refusal_rate": {name: rate["estimate"] for name, rate in refusal.items()},
            "refusal_interval": {name: [rate["low"], rate["high"]] for name, rate in refusal.items()},
            "refusal_rate_by_opening": shares("string_list_refusal"),
            "degenerate_rate": shares("degenerate"),
            "prompts": {name: found.prompts for name, found in self.rates.items()},
            "perplexity": round(self.perplexity, 4),
        }


@dataclass(frozen=True)
class Question:
    """A prompt to be answered, its token ids, and where it comes from."""

    prompt: SuitePrompt
    ids: list[int]
    source: str
    family: str


class Looker:
    """Takes the same look at several checkpoints of one run.

    Args:
        contrast: held-out contrast prompts; the first ``look.prompts`` of each class are answered.
        general: held-out general instructions; as many are answered and scored by perplexity.

    Attributes:
        done: looks that were taken before an interruption; the map of activations goes on with theirs.

    Raises UserError where one of the latter is too long and ``data.overlong`` says so.
    """

    def __init__(
        self,
        config: Config,
        model_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        encoder: ChatEncoder,
        contrast: EncodedPrompts,
        general: Sequence[Instruction],
        world: World,
    ):
        self.config, self.tokenizer, self.world = config, tokenizer, world
        self.contrast, self.prefix, self.thinks = contrast, encoder.prefix, encoder.opens_thought
        general = general[: config.look.prompts]
        self.asked = self._questions(encoder, general)
        self.examples = self._examples(encoder, general)
        self.dtype = engines.compute_dtype(config.engine, world.device)
        self.attention = attention.choose(config.model.attention, world.device, self.dtype)
        self.layers = depth(model_config)
        self.pooling = config.refine.pooling if config.refine is not None else "last"
        self.general = [question for question in self.asked if question.prompt.of_class == "general"]
        self.map: ActivationMap | None = None
        self.done: tuple[str, ...] = ()

    def take(self, name: str, stored: StoredModel) -> Look:
        """Look at a checkpoint on disk; its answers go to ``look/<name>.jsonl`` in the run's folder, and where its
        prompts lie to ``look/activations.json``."""
        log.info("looking at the model %s", name)
        placement = Placement.choose(
            self.config.look.partitioned,
            stored.checkpoint,
            attention=self.attention,
            dtype=self.dtype,
            settings=self.config.engine,
            world=self.world,
        )
        rows_ND = self._activations(stored, placement)
        found = separation(rows_ND[: len(self.contrast.ids)], self.contrast.prompts)
        self._draw_map(name, rows_ND)
        model = placement.load(stored, self.config.model)
        with placement.running(ResponseLoss(model)) as run:
            perplexity = self._perplexity(run)
            answers = by_class(self._answers(name, model, placement.partitioned))
        return Look(found, self.layer, {of: Rates.of(own) for of, own in answers.items()}, perplexity)

    # --- what is measured --------------------------------------------------------------------------------------

    def _activations(self, stored: StoredModel, placement: Placement) -> Tensor:
        """Pooled unit rows [N, D] of the held-out contrast prompts, then of the general ones that are asked."""

        def build() -> Trunk:
            return Trunk(
                stored.config,
                self.layer,
                attention=self.attention,
                dtype=self.dtype,
                trust_remote_code=self.config.model.trust_remote_code,
            )

        trunk = placement.build(build)
        prefix = trunk.name_prefix(stored.tensor_map)
        load_verified(trunk.decoder, stored.checkpoint, stored.tensor_map, self.world, prefix=prefix)
        with placement.running(trunk) as run:
            return pooled_activations(
                run,
                [*self.contrast.ids, *(question.ids for question in self.general)],
                prefix=self.prefix,
                pooling=self.pooling,
                token_limit=_TOKENS_AT_ONCE,
                world=self.world,
            )

    def _draw_map(self, name: str, rows_ND: Tensor) -> None:
        path = self.config.run.folder / "look" / "activations.json"
        with self.world.agreed(path):
            if self.world.first:
                if self.map is None:
                    prompts = [MappedPrompt(p.label, p.source, p.family, p.text) for p in self.contrast.prompts]
                    prompts += [
                        MappedPrompt(q.prompt.of_class, q.source, q.family, q.prompt.text) for q in self.general
                    ]
                    self.map = ActivationMap(path, prompts, self.layer, self.pooling)
                    self.map.restore(self.done)
                self.map.add(name, rows_ND)

    @torch.no_grad()
    def _perplexity(self, run: nn.Module) -> float:
        """exp of the mean −log p over the response tokens of held-out general answers."""
        # A rank without an example could not take part in ZeRO-3's collectives: it runs the first one uncounted.
        examples = self.examples + self.examples[:1] * (self.world.size - len(self.examples))
        costs = [len(example.ids) - self.prefix for example in examples]
        plan = micro_batches(costs, world_size=self.world.size, limit=_TOKENS_AT_ONCE)
        summed, tokens = 0.0, 0
        for group in plan[self.world.rank]:
            batch = pack(
                [examples[i].ids for i in group],
                prefix=self.prefix,
                response_starts=[examples[i].response_start for i in group],
                device=self.world.device,
            )
            loss = float(run(batch))
            if group[0] < len(self.examples):
                summed += loss
                tokens += sum(len(examples[i].ids) - examples[i].response_start for i in group)
        total, count = self.world.sum(summed, tokens)
        return torch.tensor(total / count, dtype=torch.float64).exp().item()

    def _answers(self, name: str, model: PreTrainedModel, partitioned: bool) -> list[Answer]:
        """The model's answers with the judge's verdicts."""
        look = self.config.look
        completions = generate(
            model,
            self.tokenizer,
            [question.ids for question in self.asked],
            max_new_tokens=look.max_new_tokens,
            batch_size=look.batch_size,
            partitioned=partitioned,
            world=self.world,
        )
        answers = [
            judged(asked.prompt, done.text, done.finished, self.thinks)
            for asked, done in zip(self.asked, completions, strict=True)
        ]
        path = self.config.run.folder / "look" / f"{name}.jsonl"
        with self.world.agreed(path):
            if self.world.first:
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = "".join(json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in answers)
                path.write_text(lines, encoding="utf-8")
        return answers

    # --- its questions -----------------------------------------------------------------------------------------

    def _questions(self, encoder: ChatEncoder, general: Sequence[Instruction]) -> list[Question]:
        """The first ``look.prompts`` of each class."""
        questions: list[Question] = []

        def ask(asked: ContrastPrompt | Instruction, of_class: Class, text: str, ids: list[int]) -> None:
            prompt = SuitePrompt(f"look/{len(questions)}", text, of_class, "", asked.where)
            questions.append(Question(prompt, ids, asked.source, asked.family))

        for label in get_args(Label):
            for prompt, ids in telling(self.contrast, label)[: self.config.look.prompts]:
                ask(prompt, label, prompt.text, ids)
        encoded = encoder.encode_prompts([example.prompt for example in general], "held-out general prompts")
        for example, fitting in zip(general, encoded, strict=True):
            if fitting is not None:
                ask(example, "general", example.prompt, fitting)
        return questions

    def _examples(self, encoder: ChatEncoder, general: Sequence[Instruction]) -> list[EncodedExample]:
        limit = self.config.align.max_tokens if self.config.align is not None else encoder.max_prompt_tokens
        encoded = [encoder.encode_example(e.prompt, e.response, max_tokens=limit) for e in general]
        examples = [example for example in encoded if example is not None]
        if not examples:
            raise UserError(f"held-out general prompts: none leaves room for an answer within {limit} tokens")
        return examples

    @property
    def layer(self) -> int:
        if self.config.look.layer is not None:
            return min(self.config.look.layer, self.layers)
        if self.config.refine is not None:
            return self.config.refine.chosen_layer
        return max(1, round(0.4 * self.layers))


def table(looks: Mapping[str, Look]) -> str:
    """The looks side by side, as text."""
    rows: list[tuple[str, list[str]]] = []

    def row(title: str, values: list[float], form: str) -> None:
        rows.append((title, ["–" if math.isnan(value) else format(value, form) for value in values]))

    found = list(looks.values())
    layer = found[0].layer
    row(f"cosine across classes, layer {layer}", [look.separation.cross for look in found], ".3f")
    row("  of matched pairs", [look.separation.matched for look in found], ".3f")
    row("  within seemingly toxic", [look.separation.within_seemingly for look in found], ".3f")
    row("  within toxic", [look.separation.within_toxic for look in found], ".3f")
    for label in CLASSES:
        own = [look.rates.get(label) for look in found]
        if own[0] is not None:
            title = f"refused, {label.replace('_', ' ')} ({own[0].prompts} prompts)"
            rows.append((title, ["–" if rate is None else _percentages(rate["refusal"]) for rate in own]))
            openings = [math.nan if rate is None else rate["string_list_refusal"].estimate for rate in own]
            row("  by how the answer opens", openings, ".0%")
    row("perplexity, general answers", [look.perplexity for look in found], ".2f")
    width = max(len(title) for title, _ in rows)
    lines = [f"{'held out, rates with 95 % intervals':<{width}}" + "".join(f"{name:>15}" for name in looks)]
    lines += [f"{title:<{width}}" + "".join(f"{value:>15}" for value in values) for title, values in rows]
    return "\n".join(lines)


def _percentages(rate: Interval) -> str:
    return f"{rate.estimate:.0%} [{100 * rate.low:.0f}–{100 * rate.high:.0f}]"
