"""A plan as text, and as a tree for JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dcr_scale.planning.hardware import GIB
from dcr_scale.planning.stages import RESERVE, StagePlan
from dcr_scale.runlog import size

_TITLES = {"refine": "stage 1 (refine)", "align": "stage 2 (align)"}
_PARTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "buckets": "buckets",
    "gathered": "gathered layers",
    "activations": "activations",
    "workspace": "workspace",
    "probe": "whole model, for the probe",
}


def table(plans: Sequence[StagePlan], notes: Sequence[str]) -> str:
    """One column a stage. Spreads are of the three views of the hardware, the expected one in the middle."""
    cluster = plans[0].cluster
    rows: list[tuple[str, list[str]]] = [("", [_TITLES[plan.name] for plan in plans])]

    def row(name: str, text: Callable[[StagePlan], str]) -> None:
        rows.append((name, [text(plan) for plan in plans]))

    row("parameters, of them trained", lambda p: f"{p.modules.held / 1e9:.3g} B, {p.modules.trained / 1e9:.3g} B")
    row("layers that run", lambda p: f"{p.modules.layers}")
    row("tokens a step: a rank, all", lambda p: f"{p.work.tokens:,}, {p.work.tokens * cluster.gpus:,}")
    row("packs a step and rank", lambda p: f"{len(p.work.packs)}{' (two passes)' if p.work.twice else ''}")
    row("steps, at most", lambda p: f"{p.work.steps:,}")
    rows.append(("memory of a GPU", []))
    for part, title in _PARTS.items():
        if part == "probe" and not any(plan.memory.probe for plan in plans):
            continue
        row(f"  {title}", lambda p, part=part: _gib(p.memory.parts[part]))  # type: ignore[misc]
    row("  outside tensors, reserved", lambda p: _gib(RESERVE))
    row("  in all", lambda p: _gib(p.memory.total + RESERVE))
    row(f"  fits {cluster.memory / GIB:g} GiB", lambda p: "yes" if p.fits else "NO")
    if any(plan.memory.host for plan in plans):
        row("host memory a rank", lambda p: _gib(p.memory.host))
    if any(plan.memory.nvme for plan in plans):
        row("local disk a rank", lambda p: _gib(p.memory.nvme))
    rows.append(("sent by a rank a step", []))
    row("  parameters", lambda p: size(p.traffic.parameters))
    row("  gradients", lambda p: size(p.traffic.gradients))
    row("  pooled rows", lambda p: size(p.traffic.rows))
    rows.append(("disk, all ranks", []))
    row("  read", lambda p: size(p.disk.read))
    row("  written", lambda p: size(p.disk.written))
    row("  a state of training", lambda p: size(p.disk.state))
    row("  states at once, at most", lambda p: size(p.disk.state * p.disk.states))
    rows.append((f"time on {cluster.gpus} × {cluster.device.name}", []))
    row("  a step", lambda p: _spread(p.times.step, _seconds))
    row("  the stage", lambda p: _spread(p.times.stage, _seconds))
    row("  MFU (layers that run)", lambda p: _spread(p.times.mfu, lambda share: f"{share:.1%}"))
    row("  GPU-hours", lambda p: _spread(p.times.gpu_hours(cluster.gpus), lambda hours: f"{hours:.3g}"))
    lines = _aligned(rows)
    remarks = [*notes, *(plan.work.note for plan in plans if plan.work.note)]
    return "\n".join([*lines, "", *remarks])


def as_tree(plans: Sequence[StagePlan], notes: Sequence[str]) -> dict[str, Any]:
    """All numbers, plain; sizes in bytes, times in seconds."""
    cluster = plans[0].cluster
    return {
        "gpus": cluster.gpus,
        "gpu_memory": cluster.memory,
        "device": cluster.device.name,
        "notes": list(notes),
        "stages": {
            plan.name: {
                "fits": plan.fits,
                "layers": plan.modules.layers,
                "parameters": plan.modules.held,
                "trained": plan.modules.trained,
                "tokens": plan.work.tokens,
                "packs": len(plan.work.packs),
                "batch": plan.work.batch,
                "steps": plan.work.steps,
                "memory": {**asdict(plan.memory), "reserve": RESERVE, "total": plan.memory.total + RESERVE},
                "sent": asdict(plan.traffic),
                "disk": asdict(plan.disk),
                "flops": asdict(plan.arithmetic),
                "seconds_a_step": plan.times.step,
                "seconds": plan.times.stage,
                "mfu": plan.times.mfu,
                "gpu_hours": plan.times.gpu_hours(cluster.gpus),
            }
            for plan in plans
        },
    }


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    return [f"{name:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells) for name, cells in rows]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    low, middle, high = sorted(values)
    return f"{text(middle)} ({text(low)} – {text(high)})"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
