"""Stage 1: contrastive refinement.

The trunk (embedding and first ℓ layers) is trained so that toxic and seemingly toxic prompts lie apart in the
activations that layer ℓ reads; everything above stays byte for byte as it was. Read :meth:`Refiner.run` first.

Source: Discernment via Contrastive Refinement, arXiv 2603.03323, sections 3 and 4.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from dcr_kernels import circle_loss, pool, supcon_loss
from dcr_scale import engine as engines
from dcr_scale.config import Config, LossConfig, RefineConfig, StopConfig
from dcr_scale.data.contrast import ContrastPrompt, EncodedContrast
from dcr_scale.data.packing import Pack, pack
from dcr_scale.data.sampler import ContrastSampler, shard
from dcr_scale.errors import UserError
from dcr_scale.models import attention
from dcr_scale.models.packing_check import check_packing
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import Trunk, depth
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.retention import Retention
from dcr_scale.runlog import RunLog
from dcr_scale.separation import Separation, pooled_activations, separation
from dcr_scale.training_probe import TrainingProbe
from dcr_scale.whole_model import WholeModel
from dcr_scale.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refined:
    """What stage 1 did: updates, why it ended, and the held-out separation at its start and end."""

    steps: int
    ended: str
    before: Separation
    after: Separation


class EarlyStop:
    """Stage 1 has done its work when held-out prompts of the two classes lie apart, or draw apart no further."""

    def __init__(self, config: StopConfig):
        self.config = config
        self.best = float("inf")
        self.looks_without_progress = 0

    def reason(self, cross: float) -> str | None:
        """Why to stop after a look that found this cross-class cosine; None to go on."""
        target = self.config.cross_cosine
        if target is not None and cross <= target:
            return f"held-out cross-class cosine {cross:.3f} reached its target of {target}"
        if cross < self.best - self.config.min_delta:
            self.best = cross
            self.looks_without_progress = 0
            return None
        self.looks_without_progress += 1
        if self.config.patience and self.looks_without_progress >= self.config.patience:
            return (
                f"plateau: the held-out cross-class cosine has not fallen by {self.config.min_delta} in "
                f"{self.looks_without_progress} looks (now {cross:.3f})"
            )
        return None


def check_layer(layer: int, config: PretrainedConfig, folder: Path) -> None:
    """The trunk must leave at least one layer above it: the method rests on a frozen tail."""
    layers = depth(config)
    if layer >= layers:
        raise UserError(
            f"refine.layer={layer} is beyond the model: {folder} has {layers} layers, and at least one must stay "
            f"above the trunk; choose 1 to {layers - 1}"
        )


def contrast_sampler(
    settings: RefineConfig, prompts: Sequence[ContrastPrompt], seed: int, world: World
) -> ContrastSampler:
    """Stage 1's batches. Raises UserError where they cannot be made, or the ranks cannot share one."""
    shard(range(settings.batch_size), world.rank, world.size, setting="refine.batch_size")
    return ContrastSampler(
        prompts,
        batch_size=settings.batch_size,
        toxic_share=settings.toxic_share,
        sampling=settings.sampling,
        seed=seed,
    )


def contrastive_loss(pooled_ND: Tensor, labels_N: Tensor, config: LossConfig, counts: list[int]) -> Tensor:
    """The loss over all ranks' rows: its value is the global batch's, its gradient this rank's share times the world
    size, as an engine that averages gradients needs it."""
    if config.name == "circle":
        loss = partial(circle_loss, margin=config.margin, gamma=config.gamma)
    else:
        loss = partial(supcon_loss, temperature=config.temperature)
    group = dist.group.WORLD if len(counts) > 1 else None
    # Statistics come with the loss only where they are asked for.
    return cast(Tensor, loss(pooled_ND, labels_N, group=group, counts=counts, scale_grad_by_world_size=True))


class Refiner:
    """Stage 1 of one run.

    Args:
        config: the run's configuration; ``config.refine`` must be set.
        model: the model to refine.
        contrast: both classes of prompts, with their held-out part.
        retained: token ids of general prompts for the retention term; empty where its weight is 0.
        prefix: how many leading tokens all prompts share.
        probe: what to measure on the whole model while its trunk trains, if anything.
    """

    def __init__(
        self,
        config: Config,
        model: StoredModel,
        contrast: EncodedContrast,
        retained: list[list[int]],
        prefix: int,
        runlog: RunLog,
        world: World,
        probe: TrainingProbe | None = None,
    ):
        assert config.refine is not None
        self.config, self.settings, self.world, self.runlog = config, config.refine, world, runlog
        self.train, self.heldout, self.prefix = contrast.train, contrast.heldout, prefix
        self.sampler = contrast_sampler(self.settings, self.train.prompts, config.run.seed, world)
        log.info(
            "%d contrast prompts to train on, drawn %s; %d held out",
            len(self.train.ids),
            "in matched pairs" if self.sampler.matched else "independently",
            len(self.heldout.ids),
        )
        self.token_limit = self._tokens_of_a_pack()
        self.trunk = self._build_trunk(model)
        self.engine = engines.Engine(self.trunk, config.engine, self.settings.optimizer, self.settings.steps, world)
        self.retention = self._retain(retained, model.config) if self.settings.retention.weight else None
        self.whole: WholeModel | None = None
        if probe is not None:
            self.whole = WholeModel(config, model, self.changed(), world)
            self.probe = probe.stage("refine", self.settings.steps, self.whole.model, runlog)

    # --- the stage ---------------------------------------------------------------------------------------------

    def run(self) -> Refined:
        """Train until the steps are done or held-out prompts lie apart."""
        check_packing(self.activations, self.heldout.ids[:2], self.prefix, self.world.device)
        before = after = self.look(0)
        stop = EarlyStop(self.settings.stop)
        ended = f"all {self.settings.steps} steps done"
        self.measure(0)
        self.runlog.start()
        for step in range(self.settings.steps):
            self.train_step(step)
            last = step + 1 == self.settings.steps
            reason = None
            if last or (step + 1) % self.settings.stop.every == 0:
                with self.runlog.paused():
                    after = self.look(step + 1)
                reason = stop.reason(after.cross)
            self.measure(step + 1, ended=reason is not None)
            if reason is not None:
                ended = reason
                break
        log.info("stage 1 ended after %d updates: %s", self.engine.applied, ended)
        return Refined(self.engine.applied, ended, before, after)

    def train_step(self, step: int) -> None:
        contrast = shard(self.sampler.batch(step), self.world.rank, self.world.size)
        retained: list[int] = []
        kept: list[Sequence[int]] = []
        if self.retention is not None:
            retained = self.retention.batch(step)
            kept = [self.retention.encoded[i] for i in retained]
        batch = pack(
            [self.train.ids[i] for i in contrast] + kept,
            prefix=self.prefix,
            device=self.world.device,
        )
        loss, contrastive, distance = self.forward(batch, contrast, retained, step)
        self.engine.backward(loss)
        total_distance, tokens = self.world.sum(distance, batch.layout.tokens)
        retention = total_distance / self.retention.tokens(step) if self.retention is not None else 0.0
        objective = contrastive + self.settings.retention.weight * retention
        update = self.engine.step(objective)
        self.runlog.step(
            "refine",
            step + 1,
            self.settings.steps,
            tokens=int(tokens),
            device_memory=self.runlog.memory(),
            loss=contrastive,
            **({"retention": retention} if self.retention is not None else {}),
            grad_norm=update.grad_norm,
            lr=update.lr,
        )

    def forward(self, batch: Pack, contrast: list[int], retained: list[int], step: int) -> tuple[Tensor, float, float]:
        """The loss to differentiate, the contrastive loss's value, and this rank's summed retention distance.

        The pack holds the shared prefix, then the contrast prompts, then the retained ones.
        """
        hidden_TD = self.engine(batch)
        prefix, starts = batch.layout.prefix, batch.layout.starts
        end = starts[len(contrast)]
        pooled_ND = pool(
            hidden_TD[prefix:end],
            batch.layout.cu_seqlens[: len(contrast) + 1],
            mode=self.settings.pooling,
        )
        labels_N = torch.tensor(
            [int(self.train.prompts[i].label == "toxic") for i in contrast], device=hidden_TD.device
        )
        loss = contrastive_loss(pooled_ND, labels_N, self.settings.loss, [len(contrast)] * self.world.size)
        contrastive = float(loss.detach())
        if self.retention is None:
            return loss, contrastive, 0.0
        distance = self.retention.distance(hidden_TD[end:], hidden_TD[:prefix], retained)
        scale = self.settings.retention.weight * self.world.size / self.retention.tokens(step)
        return loss + scale * distance, contrastive, float(distance.detach())

    def look(self, step: int) -> Separation:
        """Held-out cosines within and across the classes, into metrics and onto the console."""
        rows_ND = pooled_activations(
            self.activations,
            self.heldout.ids,
            prefix=self.prefix,
            pooling=self.settings.pooling,
            token_limit=self.token_limit,
            world=self.world,
        )
        found = separation(rows_ND, self.heldout.prompts)
        self.runlog.record("refine/heldout", step, found.as_dict())
        log.info(
            "refine %4d held out: cosine across %.3f (matched pairs %.3f), within seemingly toxic %.3f, toxic %.3f",
            step,
            found.cross,
            found.matched,
            found.within_seemingly,
            found.within_toxic,
        )
        return found

    def measure(self, step: int, *, ended: bool = False) -> None:
        """The probe's measurement of the whole model, where there is a probe and it is due."""
        if self.whole is not None and self.probe.due(step, ended=ended):
            self.whole.refresh()
            self.probe.measure(step)

    def activations(self, batch: Pack) -> Tensor:
        """The trunk's output [T, D] for a pack, without gradients or dropout."""
        self.engine.train(False)
        with torch.no_grad():
            hidden_TD = self.engine(batch)
        self.engine.train(True)
        return hidden_TD

    def changed(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that were trained, by the names they have in the whole model."""
        return {
            self.prefix_of_names + name: parameter
            for name, parameter in self.trunk.decoder.named_parameters()
            if parameter.requires_grad
        }

    def close(self) -> None:
        self.engine.close()
        if self.whole is not None:
            self.whole.close()

    # --- its parts ---------------------------------------------------------------------------------------------

    def _tokens_of_a_pack(self) -> int:
        """Tokens of this rank's usual training pack: looks at held-out prompts then need no more memory than that."""
        mean = sum(len(ids) - self.prefix for ids in self.train.ids) / len(self.train.ids)
        return max(64, round(mean * self.settings.batch_size / self.world.size))

    def _build_trunk(self, model: StoredModel) -> Trunk:
        check_layer(self.settings.chosen_layer, model.config, model.checkpoint.folder)
        dtype = engines.compute_dtype(self.config.engine, self.world.device)
        with engines.partitioned(self.config.engine, dtype, self.world.device):
            trunk = Trunk(
                model.config,
                self.settings.chosen_layer,
                attention=attention.choose(self.config.model.attention, self.world.device, dtype),
                dtype=dtype,
                trust_remote_code=self.config.model.trust_remote_code,
            )
        self.prefix_of_names = trunk.name_prefix(model.tensor_map)
        load_verified(
            trunk.decoder, model.checkpoint, model.tensor_map, self.world, prefix=self.prefix_of_names
        )
        if not trains_embeddings(self.settings, model.config):
            for parameter in trunk.embedding_parameters():
                parameter.requires_grad_(False)
        if self.config.model.gradient_checkpointing:
            trunk.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        return trunk

    def _retain(self, retained: list[list[int]], model_config: PretrainedConfig) -> Retention:
        settings = self.settings.retention
        retention = Retention(
            retained,
            prefix=self.prefix,
            batch_size=settings.batch_size,
            seed=self.config.run.seed,
            world=self.world,
        )
        retention.remember(
            self.activations,
            width=model_config.get_text_config().hidden_size,
            token_limit=self.token_limit,
            memory_gib=settings.memory_gib,
            spill=self.config.run.folder / f"retention-{self.world.rank}.bin",
        )
        return retention


def trains_embeddings(settings: RefineConfig, model_config: PretrainedConfig) -> bool:
    """Whether stage 1 trains the input embedding: only on request, and never where it is the head as well.

    A tied embedding *is* the head, so training it would move the tail that the method needs frozen.
    """
    if settings.train_embeddings and model_config.get_text_config().tie_word_embeddings:
        raise UserError(
            "refine.train_embeddings=true, but this model's embedding is tied to its head, which must stay frozen; "
            "set it to false"
        )
    return settings.train_embeddings
