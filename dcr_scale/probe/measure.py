"""The probe: kernel similarity ‖K(x', x)‖_F between prompts, from sketches of their gradients."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dcr_scale.data.chat import ChatEncoder
from dcr_scale.probe.activations import leak_between
from dcr_scale.probe.agreement import agree, agreed, check_same, first_of
from dcr_scale.probe.capture import Capture, Sink
from dcr_scale.probe.estimator import Blocks, Estimate, estimate, jackknives, log_error, signed_root, student_t
from dcr_scale.probe.exact import exact_kernel
from dcr_scale.probe.guard import borrowed, check_between_updates, check_ready, unnoticed, unwrap
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import TokenLayout
from dcr_scale.probe.passes import packed_batch, padded_batch, plan_steps
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.reduction import Products, collect_rows, estimate_pairs, own_rank, own_slices, world_size
from dcr_scale.probe.sketch import SketchSink
from dcr_scale.probe.units import select, shape_of, take_inventory

log = logging.getLogger(__name__)

_SECONDS_OF_SILENCE = 30

Prompts = Sequence[str] | Sequence[Sequence[int]]
# Estimates for prompts left × right (int64 [I], [J]), or where the flag says so for the pairs (left[i], right[i]).
Pairs = Callable[[Tensor, Tensor, bool], Estimate]


class Settings(Protocol):
    """What configurations say of a probe: see :class:`KernelProbe`."""

    rank: int
    groups: int
    output_probes: int
    seed: int
    micro_batch_tokens: int


@dataclass(frozen=True)
class KernelSimilarity:
    """Kernel similarity of every prompt of set a with every prompt of set b.

    Attributes:
        squared: float64 [Na, Nb], an unbiased estimate of ‖K(a_i, b_j)‖²_F. Never clipped: it can be negative near
            zero.
        known: float64 [Na, Nb], the part of ``squared`` that the head's own gradient makes, which no draw enters; all
            of it where exact.
        deviations: float64 [K, Na, Nb], a root of the covariance of ``squared``'s errors over output probes and sketch
            groups, by the jackknife: two entries have the covariance Σ_k deviations[k] · deviations[k]. Prompts share
            probes and projections, so much of the error is common to them, and cancels in ratios. No rows where exact.
        by_layer: float64 [layers, Na, Nb], ⟨K_l, K⟩_F of each decoder layer's part K_l of the kernel. Over the layers
            they add up to ``squared`` less the part of what stands outside them (embedding, final norm, head).
        self_squared: float64 [Na], ‖K(a_i, a_i)‖²_F.
        self_deviations: float64 [K, Na], the same for ``self_squared``.
        probes: R, the number of output probes; 0 for an exact result.
        jackknives: how the rows of ``deviations`` belong together: see :func:`dcr_scale.probe.estimator.jackknives`.
    """

    squared: Tensor
    known: Tensor
    deviations: Tensor
    by_layer: Tensor
    self_squared: Tensor
    self_deviations: Tensor
    probes: int
    jackknives: tuple[int, ...]

    @property
    def stderr(self) -> Tensor:
        """float64 [Na, Nb]: the jackknife standard error of ``squared`` over output probes and sketch groups."""
        return self.deviations.square().sum(dim=0).sqrt()

    @property
    def frobenius(self) -> Tensor:
        """float64 [Na, Nb]: sign(squared) · √|squared|."""
        return signed_root(self.squared)

    @property
    def normalized(self) -> Tensor:
        """float64 [Na, Nb]: ‖K(a_i, b_j)‖_F / ‖K(a_i, a_i)‖_F; NaN where the estimate of the latter is not positive."""
        return self.frobenius / self.self_squared.clamp_min(0).sqrt().where(self.self_squared > 0, torch.nan)[:, None]

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of ``squared``, float64 [Na, Nb] each, by Student's t with R − 1 degrees of freedom.

        The jackknife is that of the logarithm of what is estimated, ``squared`` less ``known``, as a square's error
        grows with it, so the interval is not symmetric. It is where that estimate, or what is left of it without one
        probe, is not positive. Raises ValueError for a level outside (0, 1).
        """
        if self.probes == 0:
            return self.squared, self.squared
        t = student_t(level, self.probes - 1)
        estimated = self.squared - self.known
        factor = (t * log_error(estimated, self.deviations, self.jackknives)).exp()
        symmetric, margin = factor.isnan(), t * self.stderr
        lower = torch.where(symmetric, estimated - margin, estimated / factor)
        upper = torch.where(symmetric, estimated + margin, estimated * factor)
        return self.known + lower, self.known + upper


class KernelProbe:
    """Measures ‖K(x', x)‖_F, K the empirical neural tangent kernel of the first generated token's logits.

    Works on a plain transformers causal language model and under ZeRO-3, in one process and in many: where
    torch.distributed is initialised, every rank must make the same calls and gets the same results.

    Args:
        model: the model, or the DeepSpeed engine that holds it; where it trains, the engine.
        tokenizer: encodes prompts given as text, through its chat template; None where prompts come as token ids.
        rank: p, rows of each of the two projections of a gradient. Even where ``groups`` is 1.
        groups: independent sketches. One is enough for an unbiased result; more have less variance.
        output_probes: R, Gaussian probes of the logits; at least 2. The variance falls with R, the cost grows with it.
        seed: decides all probes and projections.
        parameters: which count: ``all``, ``trainable`` (at this moment), or a regular expression found in their names.
        micro_batch_tokens: tokens of a micro-batch on one rank; a longer prompt makes its own.
        packed: prompts side by side in one row without padding; None: where the model's attention allows it and, as
            the first measurement finds out, nothing else in the model lets them see each other.

    Raises ValueError for arguments out of range, and for a parameter whose gradient no rule sketches, by its name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rank: int = 16,
        groups: int = 4,
        output_probes: int = 4,
        seed: int = 0,
        parameters: str = "all",
        *,
        micro_batch_tokens: int = 4096,
        packed: bool | None = None,
    ):
        if output_probes < 2:
            raise ValueError(f"output_probes must be at least 2; it is {output_probes}")
        if groups < 1 or rank < 1 or (groups == 1 and rank % 2):
            raise ValueError(
                f"rank and groups must be at least 1, and a single group's rank even; they are {rank} and {groups}"
            )
        if micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be at least 1; it is {micro_batch_tokens}")
        self._engine, self._model = model, unwrap(model)
        self._encoder = None if tokenizer is None else ChatEncoder(tokenizer)
        self.rank, self.groups, self.output_probes = rank, groups, output_probes
        self.seed, self.micro_batch_tokens = seed, micro_batch_tokens
        possible = getattr(self._model, "_supports_attention_backend", False)
        if packed and not possible:
            raise ValueError(f"{type(self._model).__name__}'s attention cannot take packed prompts; use packed=False")
        self.packed = possible if packed is None else packed
        self._must_pack, self._leak_is_ruled_out = bool(packed), False
        with agreed():
            self._inventory = take_inventory(self._model, select(self._model, parameters))
            self._capture = Capture(self._model, self._inventory)
        inner = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._projections = Projections(seed, rank, groups)
        text = self._model.config.get_text_config()
        self._heads = {text.num_attention_heads, getattr(text, "num_key_value_heads", None)}

    @classmethod
    def configured(
        cls,
        model: Any,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        parameters: str = "all",
    ) -> KernelProbe:
        """The probe with a configuration's ranks, groups, output probes, seed and micro-batch."""
        return cls(
            model,
            tokenizer,
            rank=settings.rank,
            groups=settings.groups,
            output_probes=settings.output_probes,
            seed=settings.seed,
            parameters=parameters,
            micro_batch_tokens=settings.micro_batch_tokens,
        )

    def measure(self, prompts_a: Prompts, prompts_b: Prompts | None = None, *, exact: bool = False) -> KernelSimilarity:
        """Compare every prompt of ``prompts_a`` with every one of ``prompts_b`` (None: with one another).

        Args:
            prompts_a, prompts_b: texts, which go through the chat template, or lists of token ids. A prompt ends where
                the first generated token would stand.
            exact: no sketches and no probes: the whole kernel, by the output's exact Jacobian. For small models and
                spot checks: it takes as many passes as the model is wide.

        Raises ValueError on all ranks alike, also where only one of them has the fault: for a prompt without tokens or
        with one that the model has not, fewer prompts than ranks, dropout that is on, reentrant checkpointing, an
        engine in the middle of an accumulation, activations that are not finite, prompts that see each other where
        they must be packed, prompts or settings that are not the same on every rank.
        """
        ranks = world_size()
        with agreed():
            sequences_a = self._encode(prompts_a, "prompts_a")
            sequences_b = sequences_a if prompts_b is None else self._encode(prompts_b, "prompts_b")
            sequences = list(dict.fromkeys(sequences_a + sequences_b))
            if len(sequences) < ranks:
                raise ValueError(f"{len(sequences)} different prompts are fewer than the {ranks} ranks")
            check_between_updates(self._engine)
            check_ready(self._model)
        asked = (sequences_a, sequences_b, exact, self.seed, self.rank, self.groups, self.output_probes)
        check_same("prompts or settings", asked)
        head = Head(self._inventory, self.seed, self.output_probes)
        agree(head.failure)
        if self.packed and not self._leak_is_ruled_out:
            self._rule_out_leak(sequences, head.dtype)
        kernel = self._exact if exact else self._sketched
        with (
            borrowed(self._model, self.packed, head.dtype),
            unnoticed(self._engine, self._model),
            self._capture.installed(),
        ):
            pairs = kernel(sequences, head)
        number = {sequence: i for i, sequence in enumerate(sequences)}
        left = torch.tensor([number[sequence] for sequence in sequences_a], device=head.device)
        right = torch.tensor([number[sequence] for sequence in sequences_b], device=head.device)
        found = pairs(left, right, False)
        if torch.equal(left, right):
            own_squared, own_deviations = found.squared.diagonal(), found.deviations.diagonal(dim1=1, dim2=2)
        else:
            own = pairs(left, left, True)
            own_squared, own_deviations = own.squared[:, 0], own.deviations[..., 0]
        return KernelSimilarity(
            found.squared.cpu(), found.known.cpu(), found.deviations.cpu(), found.by_layer.cpu(), own_squared.cpu(),
            own_deviations.cpu(),
            probes=0 if exact else self.output_probes,
            jackknives=() if exact else tuple(jackknives(self.groups, self.output_probes)),
        )  # fmt: skip

    def _rule_out_leak(self, sequences: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        """Have prompts padded, or raise ValueError where they must be packed, if packed ones see each other."""
        with borrowed(self._model, True, dtype), unnoticed(self._engine, self._model):
            leak = first_of(leak_between(self._model, sequences))
        if leak is not None and self._must_pack:
            raise ValueError(f"{leak}; use packed=False")
        self.packed, self._leak_is_ruled_out = leak is None, True

    def _encode(self, prompts: Prompts, what: str) -> list[tuple[int, ...]]:
        if isinstance(prompts, str) or not hasattr(prompts, "__len__") or not len(prompts):
            raise ValueError(f"{what} must be a list of prompts, at least one; it is {prompts!r}")
        vocabulary = shape_of(self._model.get_input_embeddings().weight)[0]
        encoded = []
        for i, prompt in enumerate(prompts):
            ids = self._ids(prompt, f"{what}[{i}]")
            if not ids:
                raise ValueError(f"{what}[{i}] has no tokens")
            wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise ValueError(f"{what}[{i}] has the token {wrong}, and the model has {vocabulary}")
            encoded.append(ids)
        return encoded

    def _ids(self, prompt: Any, name: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._encoder is None:
                raise ValueError(f"{name} is text: give the probe a tokenizer, or prompts as token ids")
            prompt = self._encoder.encode(prompt)
        try:
            return tuple(index(token) for token in prompt)
        except TypeError as error:
            raise ValueError(f"{name} is neither text nor a list of token ids: {error}") from error

    def _batch(self, sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[dict[str, Any], TokenLayout]:
        inputs, layout = (packed_batch if self.packed else padded_batch)(sequences, device, self._heads)
        if self._keeps_logits:
            # One position's logits are enough to see how the model makes them: the first prompt's last.
            inputs["logits_to_keep"] = layout.last[:1]
        return inputs, layout

    def _run(self, sink: Sink, sequences: Sequence[Sequence[int]], head: Head, *cotangents_BD: Tensor) -> Tensor:
        """One micro-batch's passes; gives the final hidden states, float32 [B, D].

        What goes wrong is the capture's failure: whoever runs passes agrees on it when all of them are done.
        """
        inputs, layout = self._batch(sequences, head.device)
        hidden_BD, logits = self._capture.run(sink, layout, inputs, *cotangents_BD)
        if self._capture.failure is None:
            last_V = logits[0, 0 if self._keeps_logits else layout.last[0]]
            self._capture.failure = head.why_not_linear(hidden_BD[0], last_V)
        return hidden_BD

    def _sketched(self, sequences: list[tuple[int, ...]], head: Head) -> Pairs:
        """Sketch all prompts; the result gives estimates for any pairs of them."""
        probes = self.output_probes
        steps = plan_steps(
            [len(sequence) for sequence in sequences], probes, world_size=world_size(), limit=self.micro_batch_tokens,
            one_backward=self._capture.one_backward,
        )[own_rank()]  # fmt: skip
        passes = [[torch.tensor(items, device=head.device) for items in step.passes] for step in steps]
        items = torch.cat([which for step in passes for which in step])
        sink = SketchSink(self._inventory, self._projections, head, len(items))
        hidden, said = [], time.monotonic()
        for done, (step, numbers) in enumerate(zip(steps, passes, strict=True)):
            if time.monotonic() - said > _SECONDS_OF_SILENCE:
                said = time.monotonic()
                log.info("probe: %d of %d micro-steps", done, len(steps))
            cotangents = (head.cotangents(which % probes) for which in numbers)
            hidden_BD = self._run(sink, [sequences[row] for row in step.rows], head, *cotangents)
            hidden += [hidden_BD] * len(numbers)
        agree(self._capture.failure)
        total = len(sequences) * probes
        products = Products(own_slices(sink.slices, items, total), self._inventory.slices, self.rank, probes)
        hidden_ND = collect_rows(torch.cat(hidden), items, total).unflatten(0, (-1, probes))[:, 0].double()
        meets = None
        if sink.meets is not None:
            meets = collect_rows(sink.meets, items, total).unflatten(0, (-1, probes)).double()
        blocks = Blocks.of(self.groups)

        def finish(sums: Tensor, left: Tensor, right: Tensor, paired: bool) -> Estimate:
            c = head.own_part(hidden_ND[left], hidden_ND[right], paired)
            cross = None
            if meets is not None:
                cross = head.cross_part(hidden_ND[left], meets[left], hidden_ND[right], meets[right], paired)
            return estimate(sums, cross, c, head.vocabulary, blocks)

        def pairs(left: Tensor, right: Tensor, paired: bool) -> Estimate:
            return estimate_pairs(products, left, right, finish, blocks, paired=paired)

        return pairs

    def _exact(self, sequences: list[tuple[int, ...]], head: Head) -> Pairs:
        return exact_kernel(self._capture, head, self._run, sequences)
