"""The whole model beside the trunk that stage 1 trains, for what a trunk alone cannot show: logits and their kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from dcr_scale import engine as engines
from dcr_scale.config import Config
from dcr_scale.models import attention
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import build_model
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.models.weights import own_part
from dcr_scale.world import World
from dcr_scale.zero3 import release


class WholeModel:
    """A frozen copy of a model whose trained part follows the training; spread over the ranks as that is.

    It takes the model's 16-bit (or float32) weights once more, divided by the number of ranks. Optimiser and masters
    are the trunk's alone.

    Args:
        trained: the parameters that train, by the names they have in the whole model.

    Attributes:
        model: in evaluation mode; without gradients. Its trained part is that of the last :meth:`refresh`, before the
            first the checkpoint's.
    """

    def __init__(self, config: Config, stored: StoredModel, trained: Mapping[str, nn.Parameter], world: World):
        # A small parameter that ranks keep whole would not see what is written into its partition.
        settings = replace(config.engine, persistence_threshold=0)
        dtype = engines.compute_dtype(settings, world.device)

        def build() -> PreTrainedModel:
            return build_model(
                stored.config,
                attention=attention.choose(config.model.attention, world.device, dtype),
                dtype=dtype,
                trust_remote_code=config.model.trust_remote_code,
            )

        if world.size > 1:
            with engines.partitioned(settings, dtype, world.device):
                self.model = build()
        else:
            self.model = build().to(world.device)
        load_verified(self.model, stored.checkpoint, stored.tensor_map, world)
        self.model.requires_grad_(False)
        self.model.eval()
        if config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        own = dict(self.model.named_parameters())
        self._copies = [(own[name], parameter) for name, parameter in trained.items()]
        self._engine = engines.inference_engine(self.model, settings, world) if world.size > 1 else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the trained parameters as they are. Each rank copies its own part: nothing is sent."""
        for mine, trained in self._copies:
            target, source = own_part(mine), own_part(trained)
            assert target.start == source.start, "one world size cuts a parameter in one way"
            target.values.copy_(source.values)

    def close(self) -> None:
        """Release what ZeRO-3 holds of the model."""
        if self._engine is not None:
            release(self._engine)
