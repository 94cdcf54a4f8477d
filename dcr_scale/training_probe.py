"""Kernel similarity and refusal probability of fixed held-out prompts, measured through both stages.

These are the curves by which the paper explains over-refusal (arXiv 2603.03323, figures 1 and 3): safety tuning raises
the refusal probability of every class of prompts, as a step on one prompt moves another by their kernel similarity
‖K(x', x)‖_F / ‖K(x', x')‖_F, which stage 1 is to lower beforehand.

Measured are pairs (x', x) of four kinds: two seemingly toxic prompts, two toxic ones, *cross* (a seemingly toxic x'
and its matched toxic x) and *general* (a general instruction x' and a toxic x). Prompts, output probes and projections
stay the same through a run, so that two points of a curve differ by the model alone.

K counts the model's own parameters in both stages. LoRA's are left out: their part begins at zero and depends on how
they are scaled, and stage 2 would begin elsewhere than stage 1 ended, with the same model.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dcr_scale.config import Label, ProbeConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import ContrastPrompt, EncodedPrompts, telling
from dcr_scale.errors import UserError
from dcr_scale.evaluation.refusal_probability import OpeningTree, opening_masses
from dcr_scale.probe import KernelProbe, KernelSimilarity
from dcr_scale.probe.estimator import signed_root
from dcr_scale.runlog import RunLog
from dcr_scale.world import World

log = logging.getLogger(__name__)

_OWN_PARAMETERS = r"^(?!.*\.lora_)"

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]


class TrainingProbe:
    """What a run's probe measures: chosen once, the same in both stages.

    Args:
        encoder: tokenises the refusal openings.
        contrast: held-out prompts of both classes.
        general: token ids of held-out general prompts.

    Attributes:
        sequences: the prompts of all pairs in token ids, class after class; where ranks are more, further held-out ones
            to give each something to do.
        pairs: the pairs (x', x) of each kind, in token ids.
        asked: the prompts of each class whose refusal probability is measured.
        curves: by stage, the first and the last measurement.

    Raises UserError where there are fewer held-out prompts than ranks.
    """

    def __init__(
        self,
        settings: ProbeConfig,
        encoder: ChatEncoder,
        contrast: EncodedPrompts,
        general: Sequence[list[int]],
        world: World,
    ):
        self.settings, self.world = settings, world
        self.pairs = choose_pairs(contrast, general, settings.pairs)
        self.asked: dict[str, list[list[int]]] = {}
        for label in get_args(Label):
            self.asked[label] = [ids for _, ids in telling(contrast, label)[: settings.prompts]]
        self.asked["general"] = list(general[: settings.prompts])
        paired = dict.fromkeys(ids for pairs in self.pairs.values() for pair in pairs for ids in pair)
        others = (tuple(ids) for ids in [*contrast.ids, *general])
        spare = list(dict.fromkeys(ids for ids in others if ids not in paired))
        self.sequences = [*paired, *spare[: max(0, world.size - len(paired))]]
        self.described = describe_prompts(self.sequences, contrast)
        self.similarities: dict[str, dict[str, Tensor]] = {}
        self.tree = OpeningTree.of_refusals(encoder)
        self.curves: dict[str, dict[str, dict[str, Any]]] = {}
        if len(self.sequences) < world.size:
            raise UserError(
                f"the probe has {len(self.sequences)} held-out prompts, too few for {world.size} ranks; raise "
                "data.heldout or give more prompts, or set probe.every=null"
            )

    def stage(self, name: str, steps: int, model: PreTrainedModel, runlog: RunLog) -> StageProbe:
        """Make ready to measure ``model`` through a stage of at most ``steps`` steps."""
        return StageProbe(self, name, steps, model, runlog)

    def state(self) -> dict[str, Any]:
        """What all stages have measured so far, as JSON holds it."""
        return {
            name: {
                "curve": curve,
                "similarities": {end: found.tolist() for end, found in self.similarities[name].items()},
            }
            for name, curve in self.curves.items()
        }

    def take_over(self, measured: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state` gave."""
        for name, found in measured.items():
            self.curves[name] = found["curve"]
            self.similarities[name] = {
                end: torch.tensor(rows, dtype=torch.float64) for end, rows in found["similarities"].items()
            }

    def as_dict(self) -> dict[str, Any]:
        """For ``summary.json``: how many pairs and prompts there are, and each stage's first and last measurement."""
        return {
            "pairs": {kind: len(pairs) for kind, pairs in self.pairs.items()},
            "prompts": {label: len(prompts) for label, prompts in self.asked.items()},
            **self.curves,
        }

    def matrices(self) -> dict[str, Any]:
        """For ``kernel_similarity.json``: every pair's normalised similarity, x' down and x across, at the first and
        the last measurement of each stage, whose the rows are, and which pairs (row, column) are of which kind."""
        number = {ids: i for i, ids in enumerate(self.sequences)}
        return {
            "prompts": self.described,
            "pairs": {
                kind: [[number[observed], number[trained]] for observed, trained in pairs]
                for kind, pairs in self.pairs.items()
            },
            **{
                stage: {
                    end: [[float(f"{value:.4g}") for value in row] for row in found.tolist()]
                    for end, found in ends.items()
                }
                for stage, ends in self.similarities.items()
            },
        }


class StageProbe:
    """Measures one model through one stage, into ``metrics.jsonl`` as rows of the stage ``<stage>/probe``."""

    def __init__(self, run: TrainingProbe, name: str, steps: int, model: PreTrainedModel, runlog: RunLog):
        self.run, self.name, self.steps, self.model, self.runlog = run, name, steps, model, runlog
        settings = run.settings
        with _told_to_the_user():
            self.kernel = KernelProbe.configured(model, settings, parameters=_OWN_PARAMETERS)

    def due(self, step: int, *, ended: bool = False) -> bool:
        """Whether to measure after ``step`` steps: at the start, every so many, and where the stage ends."""
        assert self.run.settings.every
        return ended or step == self.steps or step % self.run.settings.every == 0

    def measure(self, step: int) -> None:
        """Measure and record. Every rank calls it, with the model in evaluation mode.

        Raises UserError where the model cannot be probed.
        """
        with self.runlog.paused():
            values = {**self._refusal_probabilities(), **self._kernel_similarities()}
        self.runlog.record(f"{self.name}/probe", step, values)
        point = {"step": step, **{key: float(f"{value:.6g}") for key, value in values.items()}}
        self.run.curves.setdefault(self.name, {"first": point})["last"] = point
        log.info(
            "%s %4d probe: refusal probability %s; kernel similarity %s",
            self.name,
            step,
            ", ".join(f"{label} {values[f'refusal_probability/{label}']:.3f}" for label in self.run.asked),
            ", ".join(f"{kind} {values[f'kernel/{kind}']:.3f}" for kind in self.run.pairs),
        )

    def state(self) -> dict[str, Any]:
        """What the stage has measured so far, for a checkpoint."""
        return self.run.state()[self.name]

    def restore(self, measured: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state` gave."""
        self.run.take_over({self.name: measured})

    def _refusal_probabilities(self) -> dict[str, float]:
        asked, world = self.run.asked, self.run.world
        encoded = [ids for prompts in asked.values() for ids in prompts]
        masses = opening_masses(
            self.model,
            # A rank without a prompt could not take part: it has one that is not counted.
            encoded + [encoded[0]] * (world.size - len(encoded)),
            self.run.tree,
            token_limit=self.run.settings.micro_batch_tokens,
            world=world,
        )
        values: dict[str, float] = {}
        for label, prompts in asked.items():
            own, masses = masses[: len(prompts)], masses[len(prompts) :]
            mean, stderr = jackknife(lambda mass: mass.mean(), torch.tensor(own, dtype=torch.float64))
            values[f"refusal_probability/{label}"] = mean
            values[f"refusal_probability/{label}_stderr"] = stderr
        return values

    def _kernel_similarities(self) -> dict[str, float]:
        with _told_to_the_user():
            found = self.kernel.measure(self.run.sequences)
        self.run.similarities.setdefault(self.name, {"first": found.normalized})["last"] = found.normalized
        number = {ids: i for i, ids in enumerate(self.run.sequences)}
        values: dict[str, float] = {}
        for kind, pairs in self.run.pairs.items():
            left = torch.tensor([number[observed] for observed, _ in pairs])
            right = torch.tensor([number[trained] for _, trained in pairs])
            for name, (mean, stderr) in mean_similarity(found, left, right).items():
                values[f"{name}/{kind}"], values[f"{name}/{kind}_stderr"] = mean, stderr
        return values


def choose_pairs(contrast: EncodedPrompts, general: Sequence[Sequence[int]], count: int) -> dict[str, list[Pair]]:
    """At most ``count`` pairs (x', x) of each kind, from different families as long as there are any.

    Where the data has no matched pairs, those of the kind ``cross`` are any two prompts of the two classes. A kind of
    which there is no pair is left out.
    """
    ids = {prompt: tuple(tokens) for prompt, tokens in zip(contrast.prompts, contrast.ids, strict=True)}
    matched: dict[str, dict[str, ContrastPrompt]] = {}
    for prompt in contrast.prompts:
        if prompt.pair is not None:
            matched.setdefault(prompt.pair, {})[prompt.label] = prompt
    cross = [(sides["seemingly_toxic"], sides["toxic"]) for sides in matched.values() if len(sides) == 2]
    if not cross:
        sides = [[p for p in contrast.prompts if p.label == label] for label in ("seemingly_toxic", "toxic")]
        seemingly, toxic = (_families_in_turn(side, lambda prompt: prompt.family) for side in sides)
        cross = list(zip(seemingly, toxic, strict=False))
    chosen = [(ids[left], ids[right]) for left, right in _families_in_turn(cross, lambda p: p[0].family)[:count]]
    observed, trained = [left for left, _ in chosen], [right for _, right in chosen]
    kinds = {
        "within_seemingly_toxic": _neighbours(observed),
        "within_toxic": _neighbours(trained),
        "cross": chosen,
        "general": [(tuple(left), right) for left, right in zip(general[:count], cycle(trained), strict=False)],
    }
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


def describe_prompts(sequences: Sequence[Ids], contrast: EncodedPrompts) -> list[dict[str, str]]:
    """Class and text of each sequence; those that are no contrast prompt are general ones, whose text is not known."""
    known = {tuple(ids): prompt for prompt, ids in zip(contrast.prompts, contrast.ids, strict=True)}
    found = [known.get(ids) for ids in sequences]
    return [{"class": p.label, "prompt": p.text} if p is not None else {"class": "general"} for p in found]


def _neighbours(ring: list[Ids]) -> list[Pair]:
    return [(left, right) for left, right in zip(ring, ring[1:] + ring[:1], strict=True) if left != right]


def _families_in_turn(items: list[Any], family: Callable[[Any], str]) -> list[Any]:
    """The first item of every family, then the second of each, and so on."""
    met: Counter[str] = Counter()
    turns = []
    for item in items:
        turns.append(met[family(item)])
        met[family(item)] += 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: turns[i])]


def mean_similarity(found: KernelSimilarity, left: Tensor, right: Tensor) -> dict[str, tuple[float, float]]:
    """Averages over the pairs (x' = left[i], x = right[i]) (int64 [n] each) of prompts measured against one another.

    ``kernel``: the root of the mean of ‖K(x', x)‖²_F / ‖K(x', x')‖²_F, over pairs where the latter's estimate is
    positive. ``kernel_norm``: the root of the mean of ‖K(x', x)‖²_F. Each with its standard error.
    """
    squares_n, deviations_Kn = found.squared[left, right], found.deviations[:, left, right]
    own_n, own_deviations_Kn = found.self_squared[left], found.self_deviations[:, left]
    relative_n = squares_n / own_n
    relative_Kn = (deviations_Kn - relative_n * own_deviations_Kn) / own_n
    usable = own_n > 0
    return {
        "kernel": root_mean(relative_n[usable], relative_Kn[:, usable]),
        "kernel_norm": root_mean(squares_n, deviations_Kn),
    }


def root_mean(squares_n: Tensor, deviations_Kn: Tensor) -> tuple[float, float]:
    """The root of a mean of n estimated squares, with its sign, and its standard error; nan where there is none.

    Two errors are added up: that of drawing n pairs (delete-one jackknife), and that of the estimates, by a root
    ``deviations_Kn`` (float64 [K, n]) of their covariance and the root's slope.
    """
    if not len(squares_n):
        return math.nan, math.nan
    value, over_pairs = jackknife(lambda squares: signed_root(squares.mean()), squares_n)
    over_estimates = float(deviations_Kn.mean(dim=1).norm()) / (2 * abs(value)) if value else math.nan
    return value, math.hypot(over_pairs, over_estimates)


def jackknife(statistic: Callable[[Tensor], Tensor], sample_n: Tensor) -> tuple[float, float]:
    """A statistic of n numbers, and its delete-one standard error; nan for a single one."""
    count, value = len(sample_n), float(statistic(sample_n))
    if count < 2:
        return value, math.nan
    without = torch.stack([statistic(sample_n[kept]) for kept in ~torch.eye(count, dtype=torch.bool)])
    return value, float(((count - 1) * without.var(correction=0)).sqrt())


@contextmanager
def _told_to_the_user() -> Iterator[None]:
    """The probe's own errors, which are the same on all ranks, as the run's."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"the probe cannot measure this model: {error}; probe.every=null turns it off") from error
