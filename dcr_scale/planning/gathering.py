"""What ZeRO-3 gathers in a step and how much of it is there at once, by following its rules over the modules' order.

DeepSpeed records the order in which modules run. From then on it fetches what a module needs when it runs, what the
next ones need ahead of it up to ``stage3_prefetch_bucket_size``, and lets go of a module's parameters after it has run
unless they are needed again within ``stage3_max_reuse_distance`` elements. With gradient checkpointing that keeps part
of a layer from its recomputation to its backward pass. The rules are those of DeepSpeed 0.19's
``PartitionedParameterCoordinator``, as far as they are followed here: bytes sent and the peak are those that tests
count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, replace
from itertools import accumulate

from dcr_scale.config import EngineConfig
from dcr_scale.planning.modules import Call, ModuleList, Parameter


@dataclass(frozen=True)
class Visit:
    """A module fetches ``parameters`` as it begins.

    ``released``: what is let go of when it has run, unless it is needed again soon: its own, and those of modules
    around it that end with it. ``dropped``: what goes then however soon it is needed again. ``within``: parameters of
    the module and of all it calls. ``leaf``: it is gathered whole, and how soon its parameters are needed again counts
    all that the visits after it hold within. ``above``: it comes after the last layer's forward pass and before its
    backward pass.
    """

    parameters: tuple[Parameter, ...] = ()
    released: tuple[Parameter, ...] = ()
    dropped: tuple[Parameter, ...] = ()
    within: tuple[Parameter, ...] = ()
    leaf: bool = False
    above: bool = False


@dataclass(frozen=True)
class Gathers:
    """Of one optimiser step on one rank.

    Attributes:
        elements: elements of its own partitions that the rank sent to every other, padding included.
        collectives: how many gathers there were.
        peak: most elements of gathered parameters alive at once, those that are kept whole not among them.
        layers: most elements in the layers' passes and below, with the buffers that several of them arrived in
            together and have been copied out of.
        above: likewise between the last layer's forward pass and its backward pass.
    """

    elements: int
    collectives: int
    peak: int
    layers: int
    above: int

    def beside(self, other: Gathers) -> Gathers:
        """Both in one step, one after the other."""
        return Gathers(
            self.elements + other.elements,
            self.collectives + other.collectives,
            max(self.peak, other.peak),
            max(self.layers, other.layers),
            max(self.above, other.above),
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
    """The modules' visits in the forward pass; the first is the one around the model, which the stage adds."""
    pairs = _visits(modules.root, backward=False)
    last = max(place for place, (call, _) in enumerate(pairs) if call.layer is not None)
    visits = [replace(visit, above=place > last) for place, (_, visit) in enumerate(pairs)]
    return [Visit(within=modules.root.within), *visits]


def backward(modules: ModuleList, *, checkpointing: bool) -> list[Visit]:
    """The modules' visits in the backward pass.

    Every module of a layer has one, which is one matrix or three too many in the first layer above frozen ones.
    """
    around, layers, below = _by_layer(_visits(modules.root, backward=True))
    visits = [Visit(within=modules.root.within, above=True), *(replace(visit, above=True) for _, visit in around)]
    for layer in layers:
        if checkpointing:
            # The last module's backward pass begins, and finds that its input must be computed anew. That ends inside
            # the same module, as soon as its input is there.
            first = next(i for i, (call, _) in enumerate(layer) if not call.calls)
            last = layer[first][1]
            visits += [visit for _, visit in layer[:first]]
            visits.append(replace(last, released=()))
            again = [visit for _, visit in _visits(layer[0][0], backward=False)][1:]
            # DeepSpeed holds that module to account for the frozen parameters that its recomputation fetched.
            frozen = tuple(p for visit in again for p in visit.parameters if not p.trained)
            visits += [replace(visit, released=_without(visit.released, frozen)) for visit in again[:-1]]
            visits.append(replace(last, dropped=frozen))
            layer = layer[first + 1 :]
        visits += [visit for _, visit in layer]
    # transformers lets a gradient flow through the embedding's output where layers are recomputed.
    return visits + [visit for call, visit in below if any(checkpointing or p.trained for p in call.parameters)]


def _visits(call: Call, *, backward: bool) -> list[tuple[Call, Visit]]:
    """A call and all within it, each with its visit, in the order they begin."""
    if not call.calls:
        return [(call, Visit(call.parameters, call.parameters, within=call.within, leaf=call.leaf))]
    inside = [pair for child in call.calls[:: -1 if backward else 1] for pair in _visits(child, backward=backward)]
    if call.parameters:
        # In use until the last call within has returned, also those that a call within fetches by itself.
        held = [replace(visit, released=_without(visit.released, call.parameters)) for _, visit in inside]
        held[-1] = replace(held[-1], released=held[-1].released + call.parameters)
        inside = [(inner, visit) for (inner, _), visit in zip(inside, held, strict=True)]
    return [(call, Visit(call.parameters, within=call.within)), *inside]


def _without(parameters: tuple[Parameter, ...], others: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    return tuple(p for p in parameters if p not in others)


_Visits = list[tuple[Call, Visit]]


def _by_layer(visits: _Visits) -> tuple[_Visits, list[_Visits], _Visits]:
    """Those of a backward pass: around and above the layers, of each layer, and below them."""
    layers: dict[int, _Visits] = {}
    around: _Visits = []
    below: _Visits = []
    for call, visit in visits:
        if call.layer is not None:
            layers.setdefault(call.layer, []).append((call, visit))
        else:
            (below if layers else around).append((call, visit))
    return around, list(layers.values()), below


@dataclass
class Buffer:
    """Where several parameters arrive together: ``awaited`` are those that no visit has waited for yet, and the last of
    them to be waited for lets go of it; ``copied``: the parameters are in memory of their own beside it."""

    numel: int
    awaited: set[int]
    copied: bool = False


class Coordinator:
    """DeepSpeed's coordinator once it knows the order, through one pass after the other.

    Args:
        order: the visits of a whole pass: the forward ones, and the backward ones if there are any.
        whole: numbers of the parameters that are never partitioned.
        settings: the engine's, for what is fetched ahead and how much may be there at once.
    """

    def __init__(self, order: list[Visit], whole: set[int], settings: EngineConfig, world_size: int):
        self.order, self.settings, self.world_size = order, settings, world_size
        self.whole = whole
        # Elements that the visits before each have gone through, and where each parameter is visited.
        # No leaf's count: DeepSpeed looks inside those for other leaves alone.
        own = (0 if visit.leaf else sum(p.numel for p in visit.parameters) for visit in order)
        self._passed = list(accumulate(own, initial=0))
        self._visits: dict[int, list[int]] = {}
        for step, visit in enumerate(order):
            for p in visit.parameters:
                self._visits.setdefault(p.number, []).append(step)
        self._there: dict[int, int] = {}
        self._buffers: list[Buffer] = []
        self.elements = self.collectives = self.peak = 0
        self.held = {False: 0, True: 0}  # by whether it is above the layers

    def gathers(self) -> Gathers:
        return Gathers(self.elements, self.collectives, self.peak, layers=self.held[False], above=self.held[True])

    def run(self) -> None:
        """Go through the order once. What is gathered at its end is there at the next one's beginning."""
        queue = deque((p, step) for step, visit in enumerate(self.order) for p in _in_order(visit.parameters))
        last_fetched: dict[int, int] = {}
        counted = 0  # the limit on what is there counts from the pass's beginning
        for step, visit in enumerate(self.order):
            missing = [p for p in visit.parameters if self._absent(p)]
            counted += self._fetch(missing)
            self._copy_out(visit)
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
            self._note(visit)
            for p in visit.released:
                awaited = last_fetched[p.number] > step + 1
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
            self._buffers.append(Buffer(numel, {p.number for p in parameters}))
        return numel

    def _copy_out(self, visit: Visit) -> None:
        """Copy what the visit waits for out of the buffers it arrived in, each with all that it holds."""
        needed = {p.number for p in visit.parameters}
        for buffer in self._buffers:
            buffer.copied = buffer.copied or not buffer.awaited.isdisjoint(needed)
            buffer.awaited -= needed
        self._note(visit)
        self._buffers = [buffer for buffer in self._buffers if buffer.awaited]

    def _note(self, visit: Visit) -> None:
        held = sum(self._there.values()) + sum(buffer.numel for buffer in self._buffers if buffer.copied)
        self.held[visit.above] = max(self.held[visit.above], held)

    def _used_soon(self, parameter: Parameter, step: int) -> bool:
        """Whether a visit within the reuse distance after ``step`` needs the parameter."""
        if self.order[step].leaf:
            passed = 0
            for visit in self.order[step + 1 :]:
                if passed >= self.settings.max_live or parameter in visit.within:
                    return passed < self.settings.max_live
                passed += sum(p.numel for p in visit.within)
            return False
        steps = self._visits[parameter.number]
        later = bisect_right(steps, step)
        if later == len(steps):
            return False
        return self._passed[steps[later]] - self._passed[step + 1] < self.settings.max_live


def _in_order(parameters: tuple[Parameter, ...]) -> list[Parameter]:
    return sorted(parameters, key=lambda p: p.number)
