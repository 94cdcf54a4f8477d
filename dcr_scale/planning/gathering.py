"""What ZeRO-3 gathers in a step and how much of it is there at once, by following its rules over the modules' order.

DeepSpeed records the order in which modules run. From then on it fetches what a module needs when it runs, what the
next ones need ahead of it up to ``stage3_prefetch_bucket_size``, and lets go of a module's parameters after it has run
unless they are needed again within ``stage3_max_reuse_distance`` elements. With gradient checkpointing that keeps part
of a layer from its recomputation to its backward pass. The rules are those of DeepSpeed 0.19's
``PartitionedParameterCoordinator``, as far as they are followed here: bytes sent and the peak are those that tests
count. But a run whose held-out evaluation is a single pass keeps the last layers from the forward to the backward pass,
and where ``engine.max_live`` is a few layers the peak can then be a fifth off.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from dcr_scale.config import EngineConfig
from dcr_scale.planning.modules import ModuleList, Parameter, Use


@dataclass(frozen=True)
class Visit:
    """A module fetches its parameters, and lets go of them when it has run, or later where ``releases`` is False.

    ``dropped``: parameters that go then too, however soon they are needed again.
    """

    parameters: tuple[Parameter, ...]
    releases: bool = True
    dropped: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Gathers:
    """Of one optimiser step on one rank.

    Attributes:
        elements: elements of its own partitions that the rank sent to every other, padding included.
        collectives: how many gathers there were.
        peak: most elements of gathered parameters alive at once, those that are kept whole not among them.
        copied: elements of the largest gather of several parameters at once, which arrive in one buffer and are copied
            out of it.
    """

    elements: int
    collectives: int
    peak: int
    copied: int

    def beside(self, other: Gathers) -> Gathers:
        """Both in one step, one after the other."""
        return Gathers(
            self.elements + other.elements,
            self.collectives + other.collectives,
            max(self.peak, other.peak),
            max(self.copied, other.copied),
        )


def persistent(modules: ModuleList, settings: EngineConfig) -> set[int]:
    """Numbers of the parameters that every rank keeps whole."""
    kept: set[int] = set()
    total = 0
    for parameter in modules.parameters:
        small = parameter.numel <= settings.persistence_threshold
        if small and total + parameter.numel <= settings.persistence_total:
            kept.add(parameter.number)
            total += parameter.numel
    return kept


def forward(modules: ModuleList) -> list[Visit]:
    return [Visit(use.parameters) for use in modules.uses]


def backward(modules: ModuleList, *, checkpointing: bool) -> list[Visit]:
    """The modules' visits in the backward pass.

    Every module of a layer has one, which is one matrix or three too many in the first layer above frozen ones.
    """
    before, layers, after = _by_layer(modules.uses)
    visits = [Visit(use.parameters) for use in reversed(after)]
    for layer in reversed(layers):
        if checkpointing:
            # The last module's backward pass begins, and finds that its input must be computed anew. That ends inside
            # the same module, as soon as its input is there.
            last = layer.pop()
            visits.append(Visit(last.parameters, releases=False))
            visits += [Visit(use.parameters) for use in layer]
            # DeepSpeed holds the module to account for the frozen parameters that its recomputation fetched.
            frozen = tuple(p for use in [*layer, last] for p in use.parameters if not p.trained)
            visits.append(Visit(last.parameters, dropped=frozen))
        visits += [Visit(use.parameters) for use in reversed(layer)]
    # transformers lets a gradient flow through the embedding's output where layers are recomputed.
    reached = [use for use in before if checkpointing or any(p.trained for p in use.parameters)]
    return visits + [Visit(use.parameters) for use in reversed(reached)]


def _by_layer(uses: Iterable[Use]) -> tuple[list[Use], list[list[Use]], list[Use]]:
    """The modules before the layers, those of each layer, and those after."""
    before: list[Use] = []
    after: list[Use] = []
    layers: dict[int, list[Use]] = {}
    for use in uses:
        if use.layer is not None:
            layers.setdefault(use.layer, []).append(use)
        else:
            (after if layers else before).append(use)
    return before, list(layers.values()), after


class Coordinator:
    """DeepSpeed's coordinator once it knows the order, through one pass after the other.

    Args:
        order: the visits of a whole pass: the forward ones, and the backward ones if there are any.
        forward: how many are forward ones. DeepSpeed 0.19 remembers what to let go of after each from a stage's first
            passes, which are forward alone, and so never keeps a parameter from there to the backward pass.
        whole: numbers of the parameters that are never partitioned.
        settings: the engine's, for what is fetched ahead and how much may be there at once.
    """

    def __init__(self, order: list[Visit], whole: set[int], settings: EngineConfig, world_size: int, *, forward: int):
        self.order, self.settings, self.world_size, self.forward = order, settings, world_size, forward
        self.whole = whole
        # Elements that the visits before each have gone through, and where each parameter is visited.
        self._passed = list(accumulate((sum(p.numel for p in visit.parameters) for visit in order), initial=0))
        self._visits: dict[int, list[int]] = {}
        for step, visit in enumerate(order):
            for p in visit.parameters:
                self._visits.setdefault(p.number, []).append(step)
        self._there: dict[int, int] = {}
        self.elements = self.collectives = self.peak = self.copied = 0

    def gathers(self) -> Gathers:
        return Gathers(self.elements, self.collectives, self.peak, self.copied)

    def run(self) -> None:
        """Go through the order once. What is gathered at its end is there at the next one's beginning."""
        queue = deque((p, step) for step, visit in enumerate(self.order) for p in _in_order(visit.parameters))
        last_fetched: dict[int, int] = {}
        counted = 0  # the limit on what is there counts from the pass's beginning
        for step, visit in enumerate(self.order):
            missing = [p for p in visit.parameters if self._absent(p)]
            counted += self._fetch(missing)
            unforeseen = {p.number for p in visit.parameters if last_fetched.get(p.number, -1) < step}
            while unforeseen and queue:
                p, used = queue.popleft()
                last_fetched[p.number] = used
                unforeseen.discard(p.number)
            limit = min(self.settings.max_live - counted, self.settings.prefetch_bucket)
            chosen: dict[int, Parameter] = {}
            while queue and sum(p.numel for p in chosen.values()) < limit:
                p, used = queue.popleft()
                last_fetched[p.number] = max(last_fetched.get(p.number, -1), used)
                if self._absent(p):
                    chosen[p.number] = p
            counted += self._fetch(list(chosen.values()))
            if visit.releases:
                for p in visit.parameters:
                    awaited = step + 1 < last_fetched[p.number] < self._known(step)
                    if p.number in self._there and not awaited and not self._used_soon(p, step):
                        counted -= self._there.pop(p.number)
                for p in visit.dropped:
                    counted -= self._there.pop(p.number, 0)

    def _absent(self, parameter: Parameter) -> bool:
        return parameter.number not in self.whole and parameter.number not in self._there

    def _fetch(self, parameters: list[Parameter]) -> int:
        if not parameters:
            return 0
        numel = sum(p.numel for p in parameters)
        self._there.update({p.number: p.numel for p in parameters})
        self.elements += sum(p.part(self.world_size) for p in parameters)
        self.collectives += 1
        self.peak = max(self.peak, sum(self._there.values()))
        if len(parameters) > 1:
            self.copied = max(self.copied, numel)
        return numel

    def _used_soon(self, parameter: Parameter, step: int) -> bool:
        """Whether a visit within the reuse distance after ``step`` needs the parameter."""
        steps = self._visits[parameter.number]
        later = bisect_right(steps, step)
        if later == len(steps) or steps[later] >= self._known(step):
            return False
        return self._passed[steps[later]] - self._passed[step + 1] < self.settings.max_live

    def _known(self, step: int) -> int:
        """Up to which visit what follows counts after this one."""
        return self.forward if step < self.forward else len(self.order)


def _in_order(parameters: tuple[Parameter, ...]) -> list[Parameter]:
    return sorted(parameters, key=lambda p: p.number)
