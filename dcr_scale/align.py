"""Stage 2: supervised safety alignment.

Ordinary SFT on general instructions and a share of (toxic prompt, refusal) pairs, after the Safety-Tuned LLaMAs recipe
(arXiv 2309.07875). DCR as published leaves it unchanged; without stage 1 before it, it is the baseline STL. Where
``align.rehearsal`` says so, stage 1's loss is kept up beside it (:mod:`dcr_scale.rehearsal`). Read :meth:`Aligner.run`
first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dcr_scale import engine as engines
from dcr_scale.config import AlignConfig, Config
from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.data.contrast import EncodedPrompts
from dcr_scale.data.instructions import Instruction
from dcr_scale.data.packing import Pack, micro_batches, pack
from dcr_scale.data.sampler import ShuffledSampler
from dcr_scale.errors import UserError
from dcr_scale.models import attention
from dcr_scale.models.lora import adapter_config
from dcr_scale.models.packing_check import check_packing
from dcr_scale.models.response_loss import ResponseLoss
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import build_model
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.profiling import traced
from dcr_scale.rehearsal import Rehearsal
from dcr_scale.resume.checkpoints import StageCheckpoints
from dcr_scale.runlog import RunLog
from dcr_scale.training_probe import TrainingProbe
from dcr_scale.world import World, seed_everything

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aligned:
    """What stage 2 did: updates, and the mean loss per response token over its first and last tenth."""

    steps: int
    first_loss: float
    last_loss: float


def encode_mixture(
    mixture: list[Instruction], encoder: ChatEncoder, settings: AlignConfig, world_size: int
) -> tuple[list[Instruction], list[EncodedExample]]:
    """The mixture without the prompts that are too long, where those are dropped, and without those that the model is
    yet to answer; and the same in token ids.

    Raises UserError where one is too long and ``data.overlong`` says so, and where a batch cannot give every rank an
    example.
    """
    mixture = [example for example in mixture if example.response]
    fits = encoder.encode_prompts([example.prompt for example in mixture], "stage 2's prompts")
    kept, examples = [], []
    for instruction, ids in zip(mixture, fits, strict=True):
        if ids is None:
            continue
        encoded = encoder.encode_example(instruction.prompt, instruction.response, max_tokens=settings.max_tokens)
        if encoded is not None:
            kept.append(instruction)
            examples.append(encoded)
    if settings.batch_size < world_size or len(examples) < world_size:
        raise UserError(
            f"align.batch_size={settings.batch_size} over {len(examples)} examples leaves some of the {world_size} "
            f"ranks without one; at least {world_size} of both are needed"
        )
    return kept, examples


class Aligner:
    """Stage 2 of one run.

    Args:
        config: the run's configuration; ``config.align`` must be set.
        model: the model to align: stage 1's export, or the source for plain STL.
        examples: what :func:`encode_mixture` made of general instructions and refusals.
        prefix: how many leading tokens all examples share.
        contrast: the contrast prompts that are rehearsed, where any are.
        probe: what to measure on the model while it trains, if anything.
        checkpoints: where the stage is saved and taken up again, if anywhere.
    """

    def __init__(
        self,
        config: Config,
        model: StoredModel,
        examples: list[EncodedExample],
        prefix: int,
        runlog: RunLog,
        world: World,
        contrast: EncodedPrompts | None = None,
        probe: TrainingProbe | None = None,
        checkpoints: StageCheckpoints | None = None,
    ):
        assert config.align is not None
        self.checkpoints = checkpoints
        self.config, self.settings, self.world, self.runlog = config, config.align, world, runlog
        self.examples, self.prefix = examples, prefix
        self.sampler = ShuffledSampler(
            len(self.examples), min(self.settings.batch_size, len(self.examples)), config.run.seed, "stage 2"
        )
        self.steps = max(1, math.ceil(self.settings.epochs * self.sampler.steps_per_epoch))
        self.model = self._build_model(model)
        self.parameters = dict(self.model.named_parameters())
        if self.settings.method == "lora":
            self._add_adapters()
        self.rehearsal: Rehearsal | None = None
        if config.rehearsed is not None:
            assert contrast is not None, "there is nothing to rehearse"
            self.rehearsal = Rehearsal(
                config.rehearsed, contrast, self.model, prefix=prefix, seed=config.run.seed, world=world
            )
        self.engine = engines.Engine(
            ResponseLoss(self.model), config.engine, self.settings.optimizer, self.steps, world
        )
        self.probe = None if probe is None else probe.stage("align", self.steps, self.model, runlog)

    # --- the stage ---------------------------------------------------------------------------------------------

    def run(self) -> Aligned:
        # Of one example its own neighbour is made.
        two = [example.ids for example in (self.examples * 2)[:2]]
        check_packing(self._check_logits, two, self.prefix, self.world.device, self.world)
        saved = self.checkpoints.resume(self.engine) if self.checkpoints is not None else None
        losses: list[float] = [] if saved is None else saved["losses"]
        if saved is None:
            self.measure(0)
        elif self.probe is not None and saved["probe"] is not None:
            self.probe.restore(saved["probe"])
        else:
            # Where there is a probe, it is new: its curves begin here.
            self.measure(len(losses), now=True)
        self.runlog.start()
        with traced(self.config.profile, self.config.run.folder, "align", self.world) as traced_step:
            for step in range(len(losses), self.steps):
                losses.append(self.train_step(step))
                traced_step()
                self.measure(step + 1)
                if self.checkpoints is not None and step + 1 < self.steps:
                    with self.runlog.paused():
                        self.checkpoints.after_step(self.engine, step + 1, partial(self._own_state, losses))
        tenth = max(1, len(losses) // 10)
        log.info("stage 2 ended after %d updates", self.engine.applied)
        return Aligned(self.engine.applied, sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)

    def train_step(self, step: int) -> float:
        """One update over a global batch; returns the mean loss per response token of all ranks."""
        drawn = self.sampler.batch(step)
        response_tokens = sum(len(self.examples[i].ids) - self.examples[i].response_start for i in drawn)
        costs = [len(self.examples[i].ids) - self.prefix for i in drawn]
        rehearsed, beside = self.rehearsal.of_step(step) if self.rehearsal is not None else ([], 0)
        limit = self.settings.micro_batch_tokens
        own = micro_batches(costs, world_size=self.world.size, limit=limit, beside=beside)[self.world.rank]
        summed, contrastive, tokens = 0.0, 0.0, 0
        for number, group in enumerate(own):
            # LoRA's dropout: by the pack's name, so that no generator's state need be saved.
            seed_everything(f"{self.config.run.seed} align {step} {number} {self.world.rank}")
            batch = self._pack([self.examples[drawn[i]] for i in group], rehearsed if number == 0 else [])
            tokens += batch.layout.tokens
            # The number of response tokens is the global one, so no rank's and no micro-batch's tokens weigh more.
            scale = self.world.size / response_tokens
            if number == 0 and self.rehearsal is not None:
                with self.rehearsal.watched():
                    loss = self.engine(batch)
                term = self.rehearsal.loss(rehearsed, batch.layout)
                objective = loss * scale + self.settings.rehearsal.weight * term
                contrastive = float(term.detach())
            else:
                loss = self.engine(batch)
                objective = loss * scale
            self.engine.backward(objective, last=number + 1 == len(own))
            summed += float(loss.detach())
        total, all_tokens = self.world.sum(summed, tokens)
        mean = total / response_tokens
        update = self.engine.step(mean + self.settings.rehearsal.weight * contrastive)
        self.runlog.step(
            "align",
            step + 1,
            self.steps,
            tokens=int(all_tokens),
            device_memory=self.runlog.memory(),
            loss=mean,
            **({"rehearsal": contrastive} if self.rehearsal is not None else {}),
            grad_norm=update.grad_norm,
            lr=update.lr,
        )
        return mean

    def _own_state(self, losses: list[float]) -> dict[str, Any]:
        """What :meth:`run` must know to go on after the steps that had these losses, for a checkpoint."""
        return {"losses": losses, "probe": self.probe.state() if self.probe is not None else None}

    def measure(self, step: int, *, now: bool = False) -> None:
        """The probe's measurement, where there is a probe and it is due, or wanted ``now``."""
        if self.probe is not None and self.probe.due(step, ended=now):
            with self.engine.aside():
                self.probe.measure(step)

    def changed(self) -> Mapping[str, nn.Parameter]:
        """Parameters whose values on disk must change, by name: the trained ones, or those with an adapter."""
        if self.settings.method == "full":
            return {name: p for name, p in self.parameters.items() if p.requires_grad}
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        adapted = {id(layer.get_base_layer().weight) for layer in layers}
        return {name: p for name, p in self.parameters.items() if id(p) in adapted}

    def close(self) -> None:
        self.engine.close()

    # --- its parts ---------------------------------------------------------------------------------------------

    def _pack(self, examples: list[EncodedExample], rehearsed: list[int]) -> Pack:
        """Contrast prompts, of which no token is to be predicted, and examples behind them."""
        asked = [self.rehearsal.prompts.ids[i] for i in rehearsed] if self.rehearsal is not None else []
        return pack(
            [*asked, *(example.ids for example in examples)],
            prefix=self.prefix,
            response_starts=[*map(len, asked), *(example.response_start for example in examples)],
            device=self.world.device,
        )

    def _build_model(self, stored: StoredModel) -> PreTrainedModel:
        dtype = engines.compute_dtype(self.config.engine, self.world.device)
        with engines.partitioned(self.config.engine, dtype, self.world.device):
            model = build_model(
                stored.config,
                attention=attention.choose(self.config.model.attention, self.world.device, dtype),
                dtype=dtype,
                trust_remote_code=self.config.model.trust_remote_code,
            )
        load_verified(model, stored.checkpoint, stored.tensor_map, self.world)
        if self.config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _add_adapters(self) -> None:
        seed_everything(self.config.run.seed)  # every rank must draw the same initial adapters
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        inject_adapter_in_model(adapter_config(self.settings.lora, self.model), self.model)

    def _check_logits(self, batch: Pack) -> Tensor:
        """Logits [T, V] of a (short) pack, without gradients or dropout."""
        with self.engine.forward_only(training=False):
            return self.engine(batch, torch.arange(batch.layout.tokens, device=self.world.device))
