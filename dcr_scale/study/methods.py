"""The methods that the study compares, each as what it changes in the study's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """One way to a safe model.

    Attributes:
        title: what tables call it.
        contrast: the recipe of stage 1's prompts (:class:`dcr_scale.study.data.StudyData`); None: no stage 1.
        refine: what it changes in the configuration's ``refine``, by dotted key.
        align: the same in ``align``.
        answered: seemingly toxic prompts with answers among stage 2's examples.
        on_top: they come on top of plain safety tuning's mixture: the share of refusals is that of the other examples.
        steering: an inference-time method on the model of plain safety tuning (STL).
    """

    title: str
    contrast: str | None = None
    refine: Mapping[str, Any] = field(default_factory=dict)
    align: Mapping[str, Any] = field(default_factory=dict)
    answered: int = 0
    on_top: bool = False
    steering: Literal["surgical", "scans"] | None = None


# Linear layers of SmolLM2-135M above the study's ℓ.
_ABOVE = [
    f"model.layers.{layer}.{linear}"
    for layer in range(16, 30)
    for linear in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip

METHODS: dict[str, Method] = {
    "stl": Method("STL"),
    "stl_aug": Method("STL-aug", answered=32),
    "surgical": Method("Surgical", steering="surgical"),
    "scans": Method("SCANS", steering="scans"),
    "dcr": Method("DCR", contrast="mixed"),
    "dcr_paper": Method(
        "DCR, the paper's sets and loss",
        contrast="paper",
        refine={"loss.name": "circle", "layer": 12, "steps": 30, "optimizer.lr": 2e-5},
    ),
    "dcr_matched": Method("DCR, matched pairs alone", contrast="matched"),
    "dcr_without_general": Method("DCR, no general prompts in stage 1", contrast="without_general"),
    "dcr_circle": Method("DCR, Circle loss", contrast="mixed", refine={"loss.name": "circle"}),
    "dcr_retained": Method("DCR, retention weight 1", contrast="mixed", refine={"retention.weight": 1.0}),
    "dcr_layer_8": Method("DCR, ℓ = 8", contrast="mixed", refine={"layer": 8}),
    "dcr_layer_24": Method("DCR, ℓ = 24", contrast="mixed", refine={"layer": 24}),
    "dcr_above": Method("DCR, stage 2 above ℓ alone", contrast="mixed", align={"lora.targets": _ABOVE}),
    "dcr_long": Method("DCR, 180 steps of stage 1", contrast="mixed", refine={"steps": 180}),
    "dcr_long_above": Method(
        "DCR, 180 steps, stage 2 above ℓ alone", contrast="mixed", refine={"steps": 180}, align={"lora.targets": _ABOVE}
    ),
    "stl_above": Method("STL, the same layers alone", align={"lora.targets": _ABOVE}),
    "dcr_answered": Method("DCR, 32 answered prompts", contrast="mixed", answered=32),
    # A quarter more examples, so that the answered prompts and more refusals cost no general example.
    "dcr_answered_more": Method(
        "DCR, 32 answered prompts, 320 examples", contrast="mixed", align={"examples": 320}, answered=32
    ),
    # As many refusals as general examples where the share is a half: general answers suffer where they are fewer.
    "dcr_answered_on_top": Method(
        "DCR, 64 answered prompts on top",
        contrast="mixed",
        align={"examples": 416},
        answered=64,
        on_top=True,
    ),
    # What the shipped configurations do: retention in stage 1, and answered prompts on top in stage 2.
    "dcr_retained_on_top": Method(
        "DCR, default recipe",
        contrast="mixed",
        refine={"retention.weight": 1.0},
        align={"examples": 416},
        answered=64,
        on_top=True,
    ),
    "dcr_retained_layer_24": Method(
        "DCR, default recipe at ℓ = 24",
        contrast="mixed",
        refine={"layer": 24, "retention.weight": 1.0},
        align={"examples": 416},
        answered=64,
        on_top=True,
    ),
    "dcr_rehearsed_on_top": Method(
        "DCR, default recipe and rehearsal",
        contrast="mixed",
        refine={"retention.weight": 1.0},
        align={"examples": 416, "rehearsal.weight": 0.3},
        answered=64,
        on_top=True,
    ),
    "dcr_answered_twice": Method(
        "DCR, 64 answered prompts, 416 examples", contrast="mixed", align={"examples": 416}, answered=64
    ),
    "stl_aug_more": Method("STL-aug, 320 examples", align={"examples": 320}, answered=32),
    # The default recipe's stage 2, on a model that has had no stage 1.
    "stl_aug_on_top": Method("STL-aug, 64 answered prompts on top", align={"examples": 416}, answered=64, on_top=True),
    "stl_more": Method("STL, 320 examples", align={"examples": 320}),
    "dcr_toxic_third": Method("DCR, one toxic prompt in three", contrast="mixed", refine={"toxic_share": 1 / 3}),
}

# What the goals are asked of: stage 1 alone, with answered prompts in stage 2, and the best that was found.
CLAIMED = ("dcr", "dcr_answered_on_top", "dcr_retained_on_top")
BASELINES = ("stl", "stl_aug", "surgical", "scans")
# What shows how much of the best that was found is stage 1's.
WITHOUT_STAGE_1 = "stl_aug_on_top"
