"""An evaluation from end to end: read the suites, load the model, answer, judge, count, write."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dcr_scale import engine as engines
from dcr_scale import typed_yaml
from dcr_scale.command_line import written
from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.errors import UserError
from dcr_scale.evaluation import tasks
from dcr_scale.evaluation.completions import CompletionStore
from dcr_scale.evaluation.contamination import overlap
from dcr_scale.evaluation.evaluate_prompts import held_out, read_suites
from dcr_scale.evaluation.evaluate_settings import EvaluateConfig
from dcr_scale.evaluation.evaluate_table import table
from dcr_scale.evaluation.generation import dense_attention
from dcr_scale.evaluation.harness import EvaluationResult, ask, evaluate_suites, room
from dcr_scale.evaluation.identity import digest, weights_digest
from dcr_scale.evaluation.perplexity import Perplexity, perplexity
from dcr_scale.evaluation.suites import class_counts
from dcr_scale.evaluation.training_prompts import trained_on
from dcr_scale.evaluation.vllm_engine import VllmEngine, check_usable
from dcr_scale.joining import joined
from dcr_scale.models import attention
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.loading import Placement, find_source, open_source, read_tokenizer
from dcr_scale.models.trunk import read_config
from dcr_scale.runlog import duration, finite
from dcr_scale.world import World, device_name, peak_memory_gib, versions

log = logging.getLogger(__name__)

# Of an instruction with its answer; a longer answer is cut there.
_ANSWER_TOKENS = 512
# What decides answers beside the weights: sizes, tokens that end an answer, and what tokens stand for.
_READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, write everything to ``config.out``, and return what ``summary.json`` holds.

    Every rank calls it. Raises UserError, the same on all ranks, for whatever the user can put right.
    """
    helps = [f"--batch-size {max(1, config.batch_size // 2)}", f"--max-new-tokens {max(1, config.max_new_tokens // 2)}"]
    with joined(config.zero, group_of_one=False, helps=["--partitioned yes", *helps]) as world:
        return Evaluation(config, world).run()


@dataclass(frozen=True)
class Asked:
    """What came of it."""

    result: EvaluationResult
    perplexity: Perplexity
    tasks: dict[str, Any] | None
    partitioned: bool


class Evaluation:
    """What is asked, read and checked before the model is loaded; :meth:`run` does the work."""

    def __init__(self, config: EvaluateConfig, world: World):
        self.config, self.world = config, world
        if config.engine == "vllm":
            check_usable(world)
        if config.tasks:
            _check_tasks(world)
        with world.agreed():
            self.suites = read_suites(config)
        self.source = find_source(config.model, world)
        self.model_config = read_config(self.source, config.model)
        self.tokenizer = read_tokenizer(self.source, config.model)
        self.encoder = ChatEncoder(self.tokenizer, system_prompt=config.system_prompt)
        self.dtype = engines.compute_dtype(config.zero, world.device)
        self.checkpoint = Checkpoint.open(self.source, allow_pickle=config.model.allow_pickle)
        with world.agreed():
            training = trained_on(config.run, self.source)
            self.general = held_out(config, training)
        if training.run is not None and training.run.model.template != config.model.template:
            log.warning(
                "the model was trained with model.template=%s, and is asked with %s",
                training.run.model.template, config.model.template,
            )  # fmt: skip
        asked = {**self.suites, "perplexity": self.general}
        self.overlaps = (
            [overlap(name, prompts, training.prompts) for name, prompts in asked.items()]
            if training.prompts is not None
            else None
        )
        self.examples = self._examples()
        self.steering = self._steering()
        self.identity = self._identity()
        self.store = CompletionStore(config.folder, self.identity, world)

    def run(self) -> dict[str, Any]:
        self._announce()
        began = time.perf_counter()
        asked = self._by_vllm() if self.config.engine == "vllm" else self._by_transformers()
        seconds = time.perf_counter() - began
        (memory,) = self.world.max(peak_memory_gib(self.world.device))
        summary = self._summary(asked, seconds, memory)
        path = self.config.folder / "summary.json"
        with self.world.agreed(), written(path):
            if self.world.first:
                text = json.dumps(finite(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
                path.write_text(text, encoding="utf-8")
        log.info("\n%s", table(asked.result, asked.perplexity, asked.tasks))
        for found in self.overlaps or []:
            if (warning := found.warning()) is not None:
                log.warning("contaminated: %s", warning)
        log.info(
            "\nevaluated in %s, at most %.1f GiB a rank; everything is in %s",
            duration(seconds), memory, self.config.folder,
        )  # fmt: skip
        return summary

    # --- the model answers -------------------------------------------------------------------------------------

    def _by_transformers(self) -> Asked:
        config, world = self.config, self.world
        model, partitioned = self._load()
        result = evaluate_suites(
            model,
            self.encoder,
            self.suites,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            partitioned=partitioned,
            world=world,
            store=self.store,
            steering=self.steering,
        )
        found = perplexity(
            model, self.tokenizer, self.examples, partitioned=partitioned, world=world, steering=self.steering
        )
        accuracies = None
        if config.tasks:
            with dense_attention(model):
                accuracies = tasks.accuracies(
                    model, self.tokenizer, config.tasks, batch_size=config.batch_size, limit=config.limit
                )
        return Asked(result, found, accuracies, partitioned)

    def _by_vllm(self) -> Asked:
        config = self.config
        name = str(self.dtype).removeprefix("torch.")
        engine = VllmEngine(self.source, dtype=name, trust_remote_code=config.model.trust_remote_code)
        result = ask(
            partial(engine.completions, max_new_tokens=config.max_new_tokens),
            self.encoder,
            self.suites,
            room=room(self.model_config, config.max_new_tokens),
            together=False,
            world=self.world,
            store=self.store,
        )
        return Asked(result, engine.perplexity(self.examples), None, False)

    def _load(self) -> tuple[PreTrainedModel, bool]:
        config, world = self.config, self.world
        stored = open_source(self.source, self.model_config, config.model)
        placement = Placement.choose(
            config.partitioned,
            stored.checkpoint,
            attention=attention.SDPA,
            dtype=self.dtype,
            settings=config.zero,
            world=world,
        )
        model = placement.load(stored, config.model)
        # The engine's hooks gather for the module's own passes.
        placement.runnable(model)
        return model, placement.partitioned

    # --- what is asked -----------------------------------------------------------------------------------------

    def _examples(self) -> list[EncodedExample]:
        limit = min(room(self.model_config, 0) or _ANSWER_TOKENS, _ANSWER_TOKENS)
        encoder = ChatEncoder(
            self.tokenizer, system_prompt=self.config.system_prompt, max_prompt_tokens=limit - 1, overlong="drop"
        )
        encoded = [encoder.encode_example(p.text, p.response, max_tokens=limit) for p in self.general]
        examples = [example for example in encoded if example is not None]
        if not examples:
            raise UserError(f"--perplexity: no prompt leaves room for an answer within {limit} tokens")
        return examples

    def _steering(self) -> Any:
        if self.config.steering is None:
            return None
        from dcr_scale import baselines

        return baselines.load(self.config.steering)

    def _identity(self) -> dict[str, Any]:
        """What a completion depends on, but for rounding: completions of two evaluations mix only where it agrees."""
        config, read = self.config, (self.source / name for name in _READ)
        return {
            # By what is in the folder, not by its path: a model that was moved is the same.
            "weights": weights_digest(self.checkpoint),
            "configuration": digest(b"".join(path.read_bytes() for path in read if path.exists())),
            "engine": config.engine,
            "precision": str(self.dtype).removeprefix("torch."),
            "max_new_tokens": config.max_new_tokens,
            "chat_template": digest((self.tokenizer.chat_template or "").encode()),
            "system_prompt": config.system_prompt,
            "steering": None if config.steering is None else digest(Path(config.steering).read_bytes()),
        }

    def _announce(self) -> None:
        prompts = sum(map(len, self.suites.values()))
        log.info("%s: %d prompts on %d × %s", self.source, prompts, self.world.size, device_name(self.world.device))
        if self.tokenizer.chat_template is None:
            log.info("the tokenizer has no chat template: a prompt is its text and a blank line")

    def _summary(self, asked: Asked, seconds: float, memory: float) -> dict[str, Any]:
        result = asked.result
        return {
            "model": str(self.source),
            **result.as_dict(),
            "perplexity": asked.perplexity.as_dict(),
            **({"tasks": asked.tasks} if asked.tasks is not None else {}),
            "contamination": None if self.overlaps is None else [found.as_dict() for found in self.overlaps],
            "settings": typed_yaml.to_tree(self.config),
            "identity": self.identity,
            "partitioned": asked.partitioned,
            "world_size": self.world.size,
            "device": device_name(self.world.device),
            **versions(),
            "generated": {
                "prompts": result.generated,
                "tokens": result.tokens,
                "seconds": round(result.seconds, 1),
                "tokens_per_second": round(result.tokens / result.seconds, 1),
            },
            "seconds": round(seconds, 1),
            "peak_memory_gib": round(memory, 2),
        }


def describe(config: EvaluateConfig) -> str:
    """What an evaluation with these settings would do, from its prompts alone: no model is read."""
    lines = []
    for name, prompts in read_suites(config).items():
        counts = ", ".join(f"{count} {label.replace('_', ' ')}" for label, count in class_counts(prompts).items())
        lines.append(f"{name}: {counts}")
    lines.append(f"perplexity: {len(held_out(config))} held-out general answers")
    lines += [f"lm-evaluation-harness: {', '.join(config.tasks)}"] if config.tasks else []
    return "\n".join([*lines, f"{config.model.path}, at most {config.max_new_tokens} new tokens -> {config.folder}"])


def _check_tasks(world: World) -> None:
    tasks.check_installed()
    if world.size > 1:
        raise UserError(
            f"--harness runs in one process, and {world.size} were started; start it with python launchers/evaluate.py"
        )
