"""Floating-point operations of a step on one rank: of the layers that run, and of no others."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from dcr_scale.planning.modules import ModuleList
from dcr_scale.planning.workload import Work


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of one rank's step. ``model``: forward and backward pass as such, what MFU counts; ``device``: what is
    computed again (checkpointing, GradCache's first pass) as well. ``passes``: how often all weights are gone through.
    """

    model: float
    device: float
    passes: int


def plan_arithmetic(modules: ModuleList, config: PretrainedConfig, work: Work, *, checkpointing: bool) -> Arithmetic:
    """Count matrix products: 2 FLOPs a weight and token forward, 2 for the input's gradient, 2 for the weight's where
    it trains (Chowdhery et al., PaLM, appendix B); in attention 4 a query, key it sees and channel, and twice that
    backward. Experts count by the share of them that a token is routed to; the head by the tokens that have a loss."""
    uses = [use for use in modules.uses if use.kind in ("linear", "experts")]
    inside = sum(use.share * p.numel for use in uses if use.layer is not None for p in use.parameters)
    inside_trained = sum(
        use.share * p.numel for use in uses if use.layer is not None for p in use.parameters if p.trained
    )
    head = sum(p.numel for use in uses if use.layer is None for p in use.parameters)
    head_trained = sum(p.numel for use in uses if use.layer is None for p in use.parameters if p.trained)
    text = config.get_text_config()
    heads = text.num_attention_heads
    channels = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    # The shared prefix is a sequence of its own; every prompt sees it whole, and half of itself.
    pairs = sum(
        work.prefix**2 / 2 + sum(length * (work.prefix + length / 2) for length in pack) for pack in work.all_packs
    )
    responses = sum(work.responses)
    attention = 4 * pairs * channels * modules.layers
    layers_forward = 2 * inside * work.tokens + attention
    head_forward = 2 * head * responses
    backward = 2 * (inside + inside_trained) * work.tokens + 2 * attention + 2 * (head + head_trained) * responses
    model = layers_forward + head_forward + backward
    again = (checkpointing + work.twice) * layers_forward
    return Arithmetic(model, model + again, (3 + checkpointing + work.twice) * len(work.packs))
