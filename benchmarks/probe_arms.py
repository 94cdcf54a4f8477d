"""The arms of benchmarks/probe.py: ways to the Gram matrix of prompts' gradients, over one model and its prompts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dcr_scale.models import smollm2
from dcr_scale.probe.capture import Capture, Sink
from dcr_scale.probe.guard import borrowed
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.passes import packed_batch, padded_batch
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.sketch import SketchSink
from dcr_scale.probe.units import Unit, select, take_inventory

RANK = 16
TOKENS = 24
# Linears of the body in Llama's naming: what bergson and dattri can sketch.
LINEARS = r"_proj\.weight$"
PEERS = {
    "bergson": "pip install --no-deps bergson==2.5.1 simple-parsing docstring-parser ml-dtypes petname jaxtyping",
    "dattri": "pip install --no-deps dattri==0.3.0",
}

Arm = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Case:
    """A model and how many prompts of :data:`TOKENS` random tokens go through it in one micro-batch."""

    name: str
    prompts: int
    build: Callable[[], PreTrainedModel]


def _toy() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def _smollm2() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2.embedded_folder(), dtype=torch.float32)


CASES = {
    "toy": Case("Llama, 4 layers × 256", 64, _toy),
    # Eight full gradients of it take 4 GiB.
    "smollm2": Case("SmolLM2-135M", 8, _smollm2),
}


class Bench:
    """A model, its prompts, and the arms over them. An arm is made once a round and called once to warm up."""

    def __init__(self, case: Case):
        self.case, self.model = case, case.build().eval()
        drawn = torch.randint(
            self.model.config.vocab_size, (case.prompts, TOKENS), generator=torch.Generator().manual_seed(0)
        )
        self.prompts = [tuple(row) for row in drawn.tolist()]
        self.linears = [name.removesuffix(".weight") for name, _ in self.model.named_parameters() if "_proj." in name]
        inventory = take_inventory(self.model, select(self.model, "all"))
        self.cotangents = Head(inventory, 0, 1).cotangents(torch.zeros(case.prompts, dtype=torch.long))

    def batch(self, packed: bool) -> tuple[dict[str, Any], TokenLayout]:
        inputs, layout = (packed_batch if packed else padded_batch)(self.prompts, torch.device("cpu"))
        return {**inputs, "logits_to_keep": 1}, layout

    def _passes(self, inputs: dict[str, Any], layout: TokenLayout, reduction: str = "sum") -> None:
        """Forward and backward; ``mean`` over prompts is what dattri undoes in its scaling."""
        seen: list[Tensor] = []
        table, decoder = self.model.get_input_embeddings(), self.model.get_decoder()
        hooks = [
            table.register_forward_hook(lambda module, args, output: output.detach().requires_grad_()),
            decoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state)),
        ]
        try:
            self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        scale = 1 / len(self.prompts) if reduction == "mean" else 1
        seen[0].reshape(-1, seen[0].shape[-1])[layout.last].backward(self.cotangents * scale)

    # --- arms: each yields a call that returns the Gram matrix [N, N], or None ----------------------------------

    @contextmanager
    def plain(self, seed: int, packed: bool = False) -> Iterator[Arm]:
        inputs, layout = self.batch(packed)
        with borrowed(self.model, packed, torch.float32):
            yield lambda: self._passes(inputs, layout)

    @contextmanager
    def _captured(self, parameters: str, packed: bool) -> Iterator[tuple[Capture, Callable[[Any], None]]]:
        capture = Capture(self.model, take_inventory(self.model, select(self.model, parameters)))
        inputs, layout = self.batch(packed)
        with borrowed(self.model, packed, torch.float32), capture.installed():
            yield capture, lambda sink: capture.run(sink, layout, inputs, self.cotangents)

    @contextmanager
    def probe(self, seed: int, packed: bool = False, parameters: str = "all") -> Iterator[Arm]:
        with self._captured(parameters, packed) as (capture, run):
            head, projections = Head(capture.inventory, seed, 1), Projections(seed, RANK, 1)

            def call() -> Tensor:
                sink = SketchSink(capture.inventory, projections, head, len(self.prompts))
                run(sink)
                return gram(x.flatten(1) for x in sink.slices)

            yield call

    @contextmanager
    def ghost(self, seed: int, packed: bool = False, parameters: str = "all") -> Iterator[Arm]:
        with self._captured(parameters, packed) as (_, run):

            def call() -> Tensor:
                sink = GhostGram(len(self.prompts))
                run(sink)
                return sink.gram_NN

            yield call

    @contextmanager
    def loop(self, seed: int, packed: bool = False) -> Iterator[Arm]:
        """Full gradients, one prompt after another, all of them held for the exact Gram."""
        body = [p for p in self.model.get_decoder().parameters() if p.requires_grad]

        def call() -> Tensor:
            rows = []
            for prompt, cotangent in zip(self.prompts, self.cotangents, strict=True):
                output = self.model.get_decoder()(input_ids=torch.tensor([prompt]), use_cache=False)
                rows.append(torch.autograd.grad(output.last_hidden_state[0, -1], body, cotangent))
            return gram(torch.stack([g.flatten() for g in grads]) for grads in zip(*rows, strict=True))

        yield call

    @contextmanager
    def bergson(self, seed: int, packed: bool = False) -> Iterator[Arm]:
        from bergson import GradientProcessor
        from bergson.collector.gradient_collectors import StreamingGradientCollector

        inputs, layout = self.batch(packed)
        processor = GradientProcessor(projection_dim=RANK, projection_seed=seed)
        collector = StreamingGradientCollector(
            model=self.model, processor=processor, target_modules=set(self.linears), dtype=torch.float32
        )

        def call() -> Tensor:
            self._passes(inputs, layout)
            return gram(collector.mod_grads[name] for name in self.linears)

        with borrowed(self.model, packed, torch.float32), collector.with_batch(None):
            yield call

    @contextmanager
    def dattri(self, seed: int, packed: bool = False) -> Iterator[Arm]:
        # LoGra is these two projections; its attributor adds a data loader and an inverse Hessian around them.
        from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
        from dattri.algorithm.block_projected_if.core.hook import HookManager

        inputs, layout = self.batch(packed)
        options = {"device": "cpu", "proj_max_batch_size": 64}
        with borrowed(self.model, packed, torch.float32), torch.compiler.set_stance("force_eager"):
            compressors = setup_model_compressors(
                self.model,
                self.linears,
                sparsifier_kwargs={**options, "proj_dim": RANK, "proj_type": "normal", "proj_seed": 2**20 * seed},
                projector_kwargs={**options, "proj_dim": -1, "proj_type": "identity"},
                sample_inputs={"input_ids": inputs["input_ids"]},
            )
            manager = HookManager(self.model, self.linears)
            manager.set_compressors(compressors)

            def call() -> Tensor:
                self._passes(inputs, layout, reduction="mean")
                return gram(manager.get_compressed_grads())

            yield call
            manager.remove_hooks()

    def arms(self) -> dict[str, Callable[[int], AbstractContextManager[Arm]]]:
        arms: dict[str, Callable[[int], AbstractContextManager[Arm]]] = {
            "plain": self.plain,
            "probe": self.probe,
            "probe, linears": lambda seed: self.probe(seed, parameters=LINEARS),
            "plain, packed": lambda seed: self.plain(seed, packed=True),
            "probe, packed": lambda seed: self.probe(seed, packed=True),
            "exact loop": self.loop,
            "ghost": self.ghost,
        }
        for peer in installed_peers():
            arms[peer] = getattr(self, peer)
        return arms


class GhostGram(Sink):
    """A sink that adds up the exact Gram matrix: ⟨Σ_t δ aᵀ, Σ_s δ' a'ᵀ⟩ = Σ_ts (δ_t·δ'_s)(a_t·a'_s)."""

    def __init__(self, prompts: int):
        self.gram_NN = torch.zeros(prompts, prompts)

    def enter(self, units: Sequence[Unit], inputs_MD: Tensor, routing: Routing | None) -> list[Tensor]:
        return [inputs_MD] * len(units)

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None) -> None:
        self._add(kept @ kept.T, delta_MD)

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor) -> None:
        self._add((ids_T[:, None] == ids_T[None, :]).float(), delta_TD)

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        self.gram_NN += gradient_BD @ gradient_BD.T

    def _add(self, meet_TT: Tensor, delta_TD: Tensor) -> None:
        prompts = len(self.gram_NN)
        products = meet_TT.mul_(delta_TD @ delta_TD.T)
        self.gram_NN += products.view(prompts, TOKENS, prompts, TOKENS).sum(dim=(1, 3))


def gram(parts: Iterable[Tensor]) -> Tensor:
    """Σ x xᵀ over matrices [N, …]."""
    return sum(x.flatten(1) @ x.flatten(1).T for x in parts)


def installed_peers() -> list[str]:
    return [peer for peer in PEERS if importlib.util.find_spec(peer) is not None]
