"""A finished run's folder, written as a run writes it, and an evaluation's: what reports are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dcr_scale import typed_yaml
from dcr_scale.config import Config
from dcr_scale.evaluation.activation_map import ActivationMap, MappedPrompt

CLASSES = ("seemingly_toxic", "toxic", "general")
HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> {{ 7*7 }} %{x} & \u2028 \"d\""
)
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Sure. First warm the oven, then mix the flour with water."


def answers(refused: dict[str, int], count: int = 12) -> list[dict[str, Any]]:
    """Rows of a look: of each class the first so many are refused."""
    rows = []
    for label in CLASSES:
        for number in range(count):
            refuses = number < refused.get(label, 0)
            rows.append(
                {
                    "class": label,
                    "prompt": f"{label} prompt {number} {HOSTILE if number == 0 else ''}",
                    "completion": f"{REFUSAL if refuses else ANSWER} {HOSTILE if number == 1 else ''}",
                    "label": "full_refusal" if refuses else "compliance",
                    "refusal_probability": 0.98 if refuses else 0.01,
                    "opening_refuses": refuses,
                }
            )
    return rows


def finished_run(
    folder: Path, *, probe: bool = True, looks: tuple[str, ...] = ("before", "refined", "aligned")
) -> Path:
    """Both stages in six and four steps, with everything that a report can show."""
    (folder / "look").mkdir(parents=True)
    tree = typed_yaml.to_tree(Config())
    tree["data"]["system_prompt"] = HOSTILE
    (folder / "config.yaml").write_text(typed_yaml.dump(tree), encoding="utf-8")
    refused = {"before": {"toxic": 1}, "refined": {"toxic": 2}, "aligned": {"toxic": 11, "seemingly_toxic": 1}}
    for name in looks:
        write_rows(folder / "look" / f"{name}.jsonl", answers(refused[name]))
    if looks:
        _map(folder, looks)
    write_rows(folder / "metrics.jsonl", _metrics(probe))
    if probe:
        _kernels(folder)
    area = {"estimate": 0.7, "low": 0.6, "high": 0.8}
    summary = {
        "run": "toy <b>run</b>",
        "model": "/models/Toy-1B",
        "parameters": 1234,
        "world_size": 2,
        "device": "CPU (1 threads)",
        "versions": {"dcr-scale": "0.1.0", "torch": "2.13.0"},
        "python": "3.11.7",
        "audit": {
            "verdict": "shortcut audit: WARNING: mood alone tells the sides apart",
            "warnings": ["mood alone tells the sides apart"],
            "within": {"words": area, "mood": area},
            "across": {"a.jsonl": area},
            "facts": ["end in a question mark: 50% of toxic"],
        },
        "refine": {
            "updates": 6,
            "ended": "all 6 steps done",
            "heldout_before": {"cross": 0.98},
            "heldout_after": {"cross": 0.4},
        },
        "align": {"updates": 4, "examples": 64, "refusals": 16, "first_loss": 3.0, "last_loss": 2.0},
        "look": {
            name: {
                "layer": 2,
                "cosine": {"cross": 0.9 - 0.2 * i, "matched": None},
                "refusal_rate_by_opening": {label: 0.25 for label in CLASSES},
                "perplexity": 20.0 + i,
            }
            for i, name in enumerate(looks)
        },
        "seconds": {"look_before": 12.0, "refine": 100.0, "align": 3700.0},
        "memory_gib": {"look_before": 1.0, "refine": 2.5, "align": 3.5},
        "peak_memory_gib": 3.5,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def evaluation(folder: Path, model: str, suites: dict[str, list[dict[str, Any]]]) -> Path:
    """What launchers/evaluate.py leaves of a model's answers."""
    (folder / "completions").mkdir(parents=True)
    for name, rows in suites.items():
        rows = [{"id": str(i), "category": "", **row} for i, row in enumerate(rows)]
        write_rows(folder / "completions" / f"{name}.jsonl", rows)
    (folder / "summary.json").write_text(json.dumps({"model": f"/models/{model}"}), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _map(folder: Path, looks: tuple[str, ...]) -> None:
    prompts = [
        MappedPrompt(label, f"{'ab'[i % 2]}.jsonl", f"family {i}", f"{label} {i} {HOSTILE}")
        for label in CLASSES
        for i in range(6)
    ]
    drawn = ActivationMap(folder / "look" / "activations.json", prompts, layer=2, pooling="last")
    generator = torch.Generator().manual_seed(0)
    for name in looks:
        rows_ND = torch.randn(len(prompts), 8, generator=generator)
        drawn.add(name, rows_ND / rows_ND.norm(dim=1, keepdim=True))


def _metrics(probe: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, steps in (("refine", 6), ("align", 4)):
        for step in range(1, steps + 1):
            row = {
                "stage": stage,
                "step": step,
                "loss": 3.0 / step,
                "grad_norm": None if step == 2 else 1.0,
                "lr": 1e-4,
            }
            rows.append({**row, "tokens_per_second": 100.0 + step, "memory_gib": 2.0})
        for step in (0, 2, steps) if probe else ():
            curves = {f"refusal_probability/{label}": 0.1 * step for label in CLASSES}
            curves |= {f"kernel/{kind}": 0.5 for kind in ("within_seemingly_toxic", "within_toxic", "cross", "general")}
            rows.append(
                {"stage": f"{stage}/probe", "step": step, **curves, **{f"{key}_stderr": 0.02 for key in curves}}
            )
    for step in (0, 6):
        cosines = {"within_seemingly": 0.9, "within_toxic": 0.9, "cross": 0.5, "matched": None}
        rows.append({"stage": "refine/heldout", "step": step, **cosines})
    return rows


def _kernels(folder: Path) -> None:
    prompts = [{"class": label, "prompt": f"{label} {HOSTILE}"} for label in CLASSES[:2] for _ in range(3)]
    prompts += [{"class": "general"}] * 2
    matrix = [[1.0 if i == j else 0.1 * i for j in range(8)] for i in range(8)]
    matrix[3][0] = None
    stages = {stage: {"first": matrix, "last": matrix} for stage in ("refine", "align")}
    (folder / "kernel_similarity.json").write_text(json.dumps({"prompts": prompts, **stages}), encoding="utf-8")
