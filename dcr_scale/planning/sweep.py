"""A step's time against the number of GPUs, as text and as a picture."""

from __future__ import annotations

from pathlib import Path

from dcr_scale.planning.hardware import Device
from dcr_scale.planning.stages import Cluster, Planner, StagePlan

GPUS = (8, 16, 32, 64, 128, 256, 512)


def sweep(planner: Planner, device: Device, memory: float) -> list[list[StagePlan]]:
    """The stages' plans for 8 to 512 GPUs."""
    return [planner.plan(Cluster(gpus, memory, device)) for gpus in GPUS]


def sweep_table(plans: list[list[StagePlan]]) -> str:
    """One line a size and stage."""
    lines = [f"{'GPUs':>5} {'stage':<7} {'batch':>6} {'s a step':>9} {'from':>8} {'to':>8} {'MFU':>6} {'GiB':>6}  fits"]
    for stages in plans:
        for plan in stages:
            fast, expected, slow = plan.times.step
            lines.append(
                f"{plan.cluster.gpus:>5} {plan.name:<7} {plan.work.batch:>6} {expected:>9.3g} {fast:>8.3g} "
                f"{slow:>8.3g} {plan.times.mfu[1]:>6.1%} {plan.memory.total / 2**30:>6.1f}  "
                f"{'yes' if plan.fits else 'NO'}"
            )
    return "\n".join(lines)


def draw_sweep(plans: list[list[StagePlan]], path: Path, title: str) -> None:
    """Write the picture: expected times with their spread; sizes on which a stage does not fit are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, name in enumerate(plan.name for plan in plans[0]):
        stage = [stages[number] for stages in plans]
        gpus = [plan.cluster.gpus for plan in stage]
        expected = [plan.times.step[1] for plan in stage]
        (line,) = axes.plot(gpus, expected, label={"refine": "stage 1", "align": "stage 2"}[name])
        axes.fill_between(
            gpus, [p.times.step[0] for p in stage], [p.times.step[2] for p in stage], color=line.get_color(), alpha=0.15
        )
        for fits, face in ((True, line.get_color()), (False, "white")):
            shown = [(g, t) for g, t, plan in zip(gpus, expected, stage, strict=True) if plan.fits == fits]
            if shown:
                axes.plot(*zip(*shown, strict=True), "o", color=line.get_color(), markerfacecolor=face)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set(xlabel=f"GPUs ({plans[0][0].cluster.device.name})", ylabel="seconds a step", title=title)
    axes.legend(title="hollow: does not fit")
    figure.savefig(path, dpi=130)
    plt.close(figure)
