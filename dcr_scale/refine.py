"""Stage 1: contrastive refinement.

The trunk (embedding and first ℓ layers) is trained so that toxic and seemingly toxic prompts lie apart in the
activations that layer ℓ reads; everything above stays byte for byte as it was. Read :meth:`Refiner.run` first.

Source: Discernment via Contrastive Refinement, arXiv 2603.03323, sections 3 and 4.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dcr_scale import engine as engines
from dcr_scale.config import Config, RefineConfig
from dcr_scale.contrast_packs import ContrastPack, ContrastPacks
from dcr_scale.contrastive import contrastive_loss, pooled_rows
from dcr_scale.data.contrast import ContrastPrompt, EncodedContrast
from dcr_scale.data.packing import Pack
from dcr_scale.data.sampler import ContrastSampler, shard
from dcr_scale.early_stop import EarlyStop
from dcr_scale.errors import UserError
from dcr_scale.models import attention
from dcr_scale.models.packing_check import check_packing
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import Trunk, depth
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.profiling import traced
from dcr_scale.resume.checkpoints import StageCheckpoints
from dcr_scale.retention import Retention
from dcr_scale.runlog import RunLog
from dcr_scale.separation import Separation, pooled_activations, separation
from dcr_scale.training_probe import StageProbe, TrainingProbe
from dcr_scale.whole_model import WholeModel
from dcr_scale.world import World, seed_everything

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refined:
    """What stage 1 did: updates, why it ended, and the held-out separation at its start and end."""

    steps: int
    ended: str
    before: Separation
    after: Separation


def check_layer(layer: int, config: PretrainedConfig, folder: Path, setting: str = "refine.layer") -> None:
    """The trunk must leave at least one layer above it: the method rests on a frozen tail."""
    layers = depth(config)
    if layer >= layers:
        raise UserError(
            f"{setting}={layer} is beyond the model: {folder} has {layers} layers, and at least one must stay "
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


class Refiner:
    """Stage 1 of one run.

    Args:
        config: the run's configuration; ``config.refine`` must be set.
        model: the model to refine.
        contrast: both classes of prompts, with their held-out part.
        retained: token ids of general prompts for the retention term; empty where its weight is 0.
        prefix: how many leading tokens all prompts share.
        probe: what to measure on the whole model while its trunk trains, if anything.
        checkpoints: where the stage is saved and taken up again, if anywhere.
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
        checkpoints: StageCheckpoints | None = None,
    ):
        assert config.refine is not None
        self.checkpoints = checkpoints
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
        self.packs = ContrastPacks(
            self.train, self.sampler, self.retention,
            prefix=prefix, limit=self.settings.micro_batch_tokens, world=world,
        )  # fmt: skip
        self.whole: WholeModel | None = None
        self.probe: StageProbe | None = None
        if probe is not None:
            self.whole = WholeModel(config, model, self.changed(), world)
            self.probe = probe.stage("refine", self.settings.steps, self.whole.model, runlog)

    # --- the stage ---------------------------------------------------------------------------------------------

    def run(self) -> Refined:
        """Train until the steps are done or held-out prompts lie apart."""
        check_packing(self.activations, self.heldout.ids[:2], self.prefix, self.world.device, self.world)
        stop = EarlyStop(self.settings.stop)
        ended = f"all {self.settings.steps} steps done"
        saved = self.checkpoints.resume(self.engine) if self.checkpoints is not None else None
        if saved is None:
            done, before = 0, self.look(0)
            after = before
            self.measure(0)
        else:
            done = saved["step"]
            before, after = Separation(**saved["before"]), Separation(**saved["after"])
            stop.restore(saved["stop"])
            if self.probe is not None and saved["probe"] is not None:
                self.probe.restore(saved["probe"])
            else:
                # Where there is a probe, it is new: its curves begin here.
                self.measure(done, now=True)
        self.runlog.start()
        with traced(self.config.profile, self.config.run.folder, "refine", self.world) as traced_step:
            for step in range(done, self.settings.steps):
                self.train_step(step)
                traced_step()
                last = step + 1 == self.settings.steps
                reason = None
                if last or (step + 1) % self.settings.stop.every == 0:
                    with self.runlog.paused():
                        after = self.look(step + 1)
                    # On different GPUs the last bit may differ, and a rank that stopped alone would leave the others.
                    reason = stop.reason(self.world.gather(after.cross)[0])
                self.measure(step + 1, now=reason is not None)
                if reason is not None:
                    ended = reason
                    break
                if self.checkpoints is not None and not last:
                    with self.runlog.paused():
                        own = partial(self._own_state, step + 1, before, after, stop)
                        self.checkpoints.after_step(self.engine, step + 1, own)
        log.info("stage 1 ended after %d updates: %s", self.engine.applied, ended)
        return Refined(self.engine.applied, ended, before, after)

    def train_step(self, step: int) -> None:
        """One update over a global batch: in one pass, or where a rank's share takes several packs, in two."""
        packs = self.packs.of_step(step)
        if len(packs) == 1:
            contrastive, distance = self._one_pass(packs[0])
        else:
            contrastive, distance = self._two_passes(packs)
        total_distance, tokens = self.world.sum(distance, sum(part.batch.layout.tokens for part in packs))
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

    def _one_pass(self, part: ContrastPack) -> tuple[float, float]:
        """Gradients of the whole objective; the contrastive loss's value and this rank's summed retention distance."""
        hidden_TD = self._forward(part)
        loss = self._contrastive(self._pooled(part, hidden_TD), part.contrast)
        contrastive = float(loss.detach())
        distance = self._distance(part, hidden_TD, packs=1)
        self.engine.backward(loss + self._retention_scale(part.step) * distance)
        return contrastive, float(distance.detach())

    def _two_passes(self, parts: list[ContrastPack]) -> tuple[float, float]:
        """The same for a batch of several packs (GradCache: Gao et al., arXiv 2101.06983).

        The loss needs all prompts' pooled rows, but of the passes that make them only its gradient at those rows: a
        first pass keeps rows alone, a second one, pack by pack, takes each pack's own gradients back through the trunk,
        as ordinary accumulation.
        """
        with self.engine.forward_only(training=True):
            rows = [self._pooled(part, self._forward(part)) for part in parts]
        pooled_ND = torch.cat(rows).requires_grad_()
        loss = self._contrastive(pooled_ND, [i for part in parts for i in part.contrast])
        (gradient_ND,) = torch.autograd.grad(loss, pooled_ND)
        summed = 0.0
        for number, (part, part_gradient_ND) in enumerate(
            zip(parts, gradient_ND.split([len(part.contrast) for part in parts]), strict=True)
        ):
            hidden_TD = self._forward(part)
            objective = (self._pooled(part, hidden_TD) * part_gradient_ND).sum()
            distance = self._distance(part, hidden_TD, packs=len(parts))
            last = number + 1 == len(parts)
            self.engine.backward(objective + self._retention_scale(part.step) * distance, last=last)
            summed += float(distance.detach())
        return float(loss.detach()), summed

    # --- one pack ----------------------------------------------------------------------------------------------

    def _forward(self, part: ContrastPack) -> Tensor:
        """The trunk's output [T, D] for a pack. Dropout is a matter of the pack's name: both passes draw the same."""
        seed_everything(f"{self.config.run.seed} refine {part.step} {part.number} {self.world.rank}")
        return self.engine(part.batch)

    def _pooled(self, part: ContrastPack, hidden_TD: Tensor) -> Tensor:
        """Unit rows [n, D] of the pack's contrast prompts, which come first in it."""
        return pooled_rows(hidden_TD, part.batch.layout, len(part.contrast), self.settings.pooling)

    def _contrastive(self, pooled_ND: Tensor, contrast: list[int]) -> Tensor:
        prompts = [self.train.prompts[i] for i in contrast]
        return contrastive_loss(pooled_ND, prompts, self.settings.loss, self.world.size)

    def _distance(self, part: ContrastPack, hidden_TD: Tensor, *, packs: int) -> Tensor:
        """This pack's part of the summed retention distance; 0 where nothing is retained."""
        if self.retention is None:
            return hidden_TD.new_zeros((), dtype=torch.float32)
        prefix, starts = part.batch.layout.prefix, part.batch.layout.starts
        end = starts[len(part.contrast)]
        return self.retention.distance(hidden_TD[end:], hidden_TD[:prefix], part.retained, packs)

    def _retention_scale(self, step: int) -> float:
        if self.retention is None:
            return 0.0
        return self.settings.retention.weight * self.world.size / self.retention.tokens(step)

    # --- beside the training -----------------------------------------------------------------------------------

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

    def measure(self, step: int, *, now: bool = False) -> None:
        """The probe's measurement of the whole model, where there is a probe and it is due, or wanted ``now``."""
        if self.whole is not None and self.probe is not None and self.probe.due(step, ended=now):
            self.whole.refresh()
            self.probe.measure(step)

    def _own_state(self, done: int, before: Separation, after: Separation, stop: EarlyStop) -> dict[str, Any]:
        """What :meth:`run` must know to go on after ``done`` steps, for a checkpoint."""
        return {
            "step": done,
            "before": asdict(before),
            "after": asdict(after),
            "stop": stop.as_dict(),
            "probe": self.probe.state() if self.probe is not None else None,
        }

    def activations(self, batch: Pack) -> Tensor:
        """The trunk's output [T, D] for a pack, without gradients or dropout."""
        with self.engine.forward_only(training=False):
            return self.engine(batch)

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
        load_verified(trunk.decoder, model.checkpoint, model.tensor_map, self.world, prefix=self.prefix_of_names)
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
