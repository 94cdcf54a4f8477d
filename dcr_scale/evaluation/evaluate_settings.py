"""Settings of an evaluation: flags and ``key=value`` into one tree. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcr_scale import typed_yaml
from dcr_scale.config import EngineConfig, ModelConfig, Source
from dcr_scale.errors import UserError
from dcr_scale.evaluation.tasks import TASKS
from dcr_scale.typed_yaml import setting


@dataclass
class EvaluateConfig:
    """``suite`` are benchmarks: NAME, NAME=FILE, or FILE (:mod:`dcr_scale.evaluation.suites` lists the names)."""

    model: ModelConfig = setting(ModelConfig, "local folder, Hub id, or the embedded smollm2-135m-instruct")
    suite: list[str] = setting(list, "a benchmark: NAME, NAME=FILE, or a file of your own; may be given several times")
    out: str = setting("runs/evaluate", "folder for completions and summary.json; given again, the evaluation goes on")
    max_new_tokens: int = setting(256, "tokens generated for a prompt, at most", at_least=1)
    batch_size: int = setting(64, "prompts answered at once on one rank", at_least=1)
    limit: int | None = setting(None, "at most so many prompts of a suite's class, or questions of a task", at_least=1)
    seed: int = setting(0, "draws the limit's prompts", at_least=0)
    system_prompt: str | None = setting(None, "system message of every chat; null: what the template puts itself")
    run: str | None = setting(
        None,
        "folder of the run that trained the model, whose prompts are looked for in the suites; null: above the model",
    )
    perplexity: Source = setting(Source, "general instructions with held-out answers")
    steering: str | None = setting(None, "a .safetensors file of steering vectors that are applied while it answers")
    harness: str | None = setting(None, f"tasks of lm-evaluation-harness, comma between: {', '.join(TASKS)}")
    engine: Literal["transformers", "vllm"] = setting("transformers", "what generates; vllm: on GPUs, one process")
    partitioned: Literal["auto", "yes", "no"] = setting(
        "auto", "spread the model over the ranks; auto: where one device cannot hold it"
    )
    zero: EngineConfig = setting(EngineConfig, "precision, and ZeRO-3 where the model is spread")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def tasks(self) -> list[str]:
        return [name.strip() for name in self.harness.split(",")] if self.harness else []


def load_settings(overrides: list[str]) -> EvaluateConfig:
    """Type-check and cross-check settings given as ``key=value``. Raises UserError with one line."""
    config = typed_yaml.load(EvaluateConfig, None, overrides)
    if unknown := [name for name in config.tasks if name not in TASKS]:
        raise UserError(f"--harness: unknown task {unknown[0]!r}; known are {', '.join(TASKS)}")
    if config.engine == "vllm":
        clashing = {"steering": config.steering, "harness": config.harness}
        for name, value in clashing.items():
            if value is not None:
                raise UserError(f"--engine vllm cannot be combined with --{name}; leave out --engine")
    if config.model.attention != "auto":
        raise UserError(f"model.attention={config.model.attention}: answers are made by torch's SDPA; leave it out")
    if config.steering is not None and config.harness is not None:
        raise UserError("--harness cannot be combined with --steering: it asks the model without vectors; run twice")
    return config
