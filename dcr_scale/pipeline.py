"""One run from end to end: answers, look, refine, look, align, look, and a summary.

:class:`Run` reads as the run goes. Each stage leaves a complete checkpoint, from which the next one starts.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcr_scale import engine as engines
from dcr_scale import typed_yaml
from dcr_scale.align import Aligner
from dcr_scale.config import AlignConfig, Config, RefineConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.instructions import Instruction
from dcr_scale.diagnosis import measure_layer
from dcr_scale.errors import UserError
from dcr_scale.evaluation.audit import Audit, audit
from dcr_scale.evaluation.identity import digest, weights_digest
from dcr_scale.evaluation.look import Look, Looker, table
from dcr_scale.joining import joined
from dcr_scale.model_card import model_card
from dcr_scale.models.adapter import export_adapter
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.loading import find_source, read_tokenizer
from dcr_scale.models.lora import LowRankDelta, lora_deltas
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.tensor_map import build_tensor_map
from dcr_scale.models.trunk import build_skeleton, read_config
from dcr_scale.own_answers import answered_by, write_answers
from dcr_scale.refine import Refiner, check_layer
from dcr_scale.report import write_report
from dcr_scale.resume.checkpoints import StageCheckpoints
from dcr_scale.resume.progress import Progress
from dcr_scale.resume.run_folder import RunFolder
from dcr_scale.resume.stop import StopRequest
from dcr_scale.run_data import load_data
from dcr_scale.run_sequences import encode_align, encode_refine
from dcr_scale.runlog import duration, finite
from dcr_scale.training_probe import TrainingProbe
from dcr_scale.world import World, device_name, seed_everything, versions

log = logging.getLogger(__name__)


def run(config: Config, *, fresh: bool = False, accept_changes: bool = False) -> dict[str, Any]:
    """Run both stages (those that the configuration has) and return what ``summary.json`` holds.

    A run that was interrupted goes on where its folder says it was; ``fresh`` begins anew, ``accept_changes`` goes on
    though it was begun with other settings. Every rank calls it. Raises UserError, the same on all ranks, for whatever
    the user can put right, and Preempted, on all ranks too, where the run was told to stop and has saved its state.
    """
    stop = StopRequest()
    with stop.listening(), joined(config.engine) as world:
        return Run(config, world, stop, fresh=fresh, accept_changes=accept_changes).run()


class Run:
    """The run's inputs, read and checked before anything heavy is built; :meth:`run` does the work."""

    def __init__(
        self,
        config: Config,
        world: World,
        stop: StopRequest | None = None,
        *,
        fresh: bool = False,
        accept_changes: bool = False,
    ):
        self.config, self.world, self.stop = config, world, stop or StopRequest()
        self.fresh, self.accept_changes = fresh, accept_changes
        self.folder = RunFolder(config, world, self.stop)
        # As it was asked for: refine.layer=auto gives way to a number later.
        self.asked = typed_yaml.to_tree(config)
        seed_everything(config.run.seed)
        self.source = find_source(config.model, world)
        # Nodes may have disks of their own, and one of them lack a file.
        with world.agreed():
            self.model_config = read_config(self.source, config.model)
            if config.refine is not None and config.refine.layer != "auto":
                check_layer(config.refine.chosen_layer, self.model_config, self.source)
            if config.align is not None and config.align.rehearsal.weight and config.align.rehearsal.layer is not None:
                layer = config.align.rehearsal.layer
                check_layer(layer, self.model_config, self.source, "align.rehearsal.layer")
            self.data = load_data(config)
            self.tokenizer = read_tokenizer(self.source, config.model)
        self.encoder = ChatEncoder.configured(self.tokenizer, config.data)
        self._encode()
        skeleton = build_skeleton(self.model_config, trust_remote_code=config.model.trust_remote_code)
        self.parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        self.skeleton = skeleton
        # The model's own answers, where it has been asked.
        self.own: list[Instruction] = []
        self.looks: dict[str, Look] = {}
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        with self.folder.held(
            self.asked, self._about, fresh=self.fresh, accept_changes=self.accept_changes
        ) as self.progress:
            self.runlog = self.folder.runlog
            self._take_up(self.progress)
            finished = self._finished_before()
            if finished is not None:
                return finished
            self._announce()
            model = self._open(self.source)
            if self.data.asked:
                self._answer(model)
            if self.config.refine is not None and self.config.refine.layer == "auto":
                self._choose_layer(model, self.config.refine)
            self._look("before", model)
            if self.config.refine is not None:
                model = self._refine(model, self.config.refine)
                self._look("refined", model)
            if self.config.align is not None:
                aligned = self._align(model, self.config.align)
                if aligned is not None:
                    self._look("aligned", aligned)
            return self._summarise()

    # --- the stages --------------------------------------------------------------------------------------------

    def _answer(self, model: StoredModel) -> None:
        """Have the model answer some of its prompts while it is as it came; stage 2's examples are complete then.

        Raises UserError where it answers fewer than stage 2 wants: the part is not done then, and is begun anew.
        """
        wanted = sum(not example.response for example in self.data.mixture)
        if not self.progress.done("answers"):
            began = self._begin("answers")
            self.own, asked = answered_by(model, self.questions, wanted, self.encoder, self.config, self.world)
            # Without a size of its own the mixture becomes smaller, but not by much.
            assert self.config.align is not None
            if len(self.own) < (wanted / 2 if self.config.align.examples is None else wanted):
                raise UserError(
                    f"the model answered {len(self.own)} of {asked} seemingly toxic prompts, and "
                    f"align.answered_share={self.config.align.answered_share:g} wants {wanted}; lower it or "
                    "align.examples, or raise the limit of data.answered, or give data.contrast more such prompts"
                )
            with self.world.agreed(path := self.config.run.folder / "answered.jsonl"):
                if self.world.first:
                    write_answers(path, self.own)
            self.facts["answers"] = {"asked": asked, "answered": len(self.own)}
            self._finish("answers", began)
        self.data = load_data(self.config, self.own)
        self._encode_examples()

    def _choose_layer(self, model: StoredModel, settings: RefineConfig) -> None:
        """Put a number in the place of ``refine.layer: auto``, for everything that follows."""
        began = self._begin("layer_choice")
        choice = measure_layer(self.config, model, self.contrast.heldout, self.encoder.prefix, self.world)
        # Of unlike GPUs the last bit may decide otherwise; what is written down is the first rank's.
        settings.layer = self.world.gather(choice.layer)[0]
        self._write_config()
        self.facts["layer_choice"] = choice.as_dict()
        self.runlog.record("layer_choice", 0, {"layer": choice.layer, "reason": choice.reason})
        self._finish("layer_choice", began)

    def _refine(self, model: StoredModel, settings: RefineConfig) -> StoredModel:
        if self.progress.done("refine"):
            return self._open(self.folder.path / "refined")
        began, checkpoints = time.perf_counter(), self.folder.begin_stage("refine")
        self._audit()
        log.info("stage 1: contrastive refinement of the first %d layers", settings.chosen_layer)
        refiner = Refiner(
            self.config, model, self.contrast, self.retained, self.encoder.prefix, self.runlog, self.world, self.probe,
            checkpoints,
        )  # fmt: skip
        result = refiner.run()
        self.facts["refine"] = {
            "updates": result.steps,
            "ended": result.ended,
            "heldout_before": result.before.as_dict(),
            "heldout_after": result.after.as_dict(),
        }
        refiner.close()
        folder = self._export("refined", model, refiner.changed())
        del refiner
        self._finish("refine", began, checkpoints)
        return self._open(folder)

    def _align(self, model: StoredModel, settings: AlignConfig) -> StoredModel | None:
        """The aligned model, merged; None where only its adapters are wanted."""
        merged = settings.method == "full" or settings.lora.export != "adapter"
        if self.progress.done("align"):
            return self._open(self.folder.path / "aligned") if merged else None
        began, checkpoints = time.perf_counter(), self.folder.begin_stage("align")
        refusals = sum(instruction.refusal for instruction in self.mixture)
        aligner = Aligner(
            self.config, model, self.examples, self.encoder.prefix, self.runlog, self.world, self.contrast.train,
            self.probe, checkpoints,
        )  # fmt: skip
        log.info(
            "stage 2: safety alignment on %d examples, %d of them refusals, in %d steps",
            len(self.examples), refusals, aligner.steps,
        )  # fmt: skip
        result = aligner.run()
        self.facts["align"] = {
            "updates": result.steps,
            "examples": len(self.examples),
            "refusals": refusals,
            "first_loss": round(result.first_loss, 5),
            "last_loss": round(result.last_loss, 5),
            **({"rehearsal_weight": settings.rehearsal.weight} if settings.rehearsal.weight else {}),
        }
        aligner.close()
        if settings.method == "lora" and settings.lora.export != "merged":
            self._export_adapter(aligner, settings, model.checkpoint.folder)
        if merged:
            deltas = lora_deltas(aligner.model, engines.whole) if settings.method == "lora" else None
            self._export("aligned", model, aligner.changed(), deltas)
        del aligner
        self._finish("align", began, checkpoints)
        return self._open(self.folder.path / "aligned") if merged else None

    def _look(self, name: str, model: StoredModel) -> None:
        part = f"look_{name}"
        if self.looker is None or self.progress.done(part):
            return
        began = self._begin(part)
        self.looks[name] = self.looker.take(name, model)
        self.runlog.record("look", len(self.looks) - 1, {"model": name, **self.looks[name].as_dict()})
        self._finish(part, began)

    def _audit(self) -> None:
        """Whether the contrast set can be told apart without understanding it, said before stage 1 learns to."""
        found: Audit | None = None
        with self.world.agreed():
            if self.world.first:
                found = audit(self.contrast.train.prompts)
                log.info("%s", found.verdict())
        self.facts["audit"] = self.world.gather(found.as_dict() if found is not None else None)[0]

    # --- in and out --------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """All prompts into token ids, and who looks and probes on the way."""
        config, encoder = self.config, self.encoder
        sequences = encode_refine(config, self.data, encoder, self.world)
        self.contrast, self.retained = sequences.contrast, sequences.retained
        if sequences.share is not None:
            self.folder.shares["refine"] = sequences.share
        self._encode_examples()
        self.looker: Looker | None = None
        self.probe: TrainingProbe | None = None
        if config.probe.every:
            general = [instruction.prompt for instruction in self.data.general.heldout]
            general = general[: max(config.probe.pairs, config.probe.prompts, self.world.size)]
            encoded = encoder.encode_prompts(general, "held-out general prompts")
            kept = [ids for ids in encoded if ids is not None]
            self.probe = TrainingProbe(config.probe, encoder, self.contrast.heldout, kept, self.world)
        if config.look.enabled:
            self.looker = Looker(
                config, self.model_config, self.tokenizer, encoder, self.contrast.heldout,
                self.data.general.heldout, self.world,
            )  # fmt: skip
        asked = max(len(self.questions), len(self.looker.asked) if self.looker is not None else 0)
        self.folder.answered = -(-asked // self.world.size)

    def _encode_examples(self) -> None:
        """Stage 2's, but for those that the model is yet to answer."""
        sequences = encode_align(self.config, self.data, self.contrast, self.encoder, self.world)
        self.mixture, self.examples, self.questions = sequences.mixture, sequences.examples, sequences.questions
        if sequences.share is not None:
            self.folder.shares["align"] = sequences.share

    def _take_up(self, progress: Progress) -> None:
        """Know what earlier parts found, where they are done."""
        kept = progress.kept
        self.facts, self.seconds, self.memory = (kept.get(name, {}) for name in ("facts", "seconds", "memory"))
        self.looks = {name: Look.from_tree(tree) for name, tree in kept.get("looks", {}).items()}
        self.own = [Instruction(**tree) for tree in kept.get("own_answers", [])]
        if self.looker is not None:
            self.looker.done = tuple(self.looks)
        if self.probe is not None:
            self.probe.take_over(kept.get("probe", {}))
        if self.config.refine is not None and self.config.refine.layer == "auto" and progress.done("layer_choice"):
            self.config.refine.layer = self.facts["layer_choice"]["layer"]
        self._write_config()

    def _about(self) -> dict[str, Any]:
        """What decides the run's course: its settings, its data as it is now, and its model."""
        sides = (self.data.contrast.train, self.data.contrast.heldout)
        contrast = [(prompt.label, prompt.pair, prompt.text) for side in sides for prompt in side]
        data = [contrast, self.retained, [example.ids for example in self.examples]]
        if self.data.asked:
            data.append([one.prompt for one in self.data.asked])
        source = Checkpoint.open(self.source, allow_pickle=self.config.model.allow_pickle)
        return {
            "settings": self.asked,
            "data sources' content": digest(json.dumps(data).encode()),
            "model's weights": weights_digest(source),
        }

    def _begin(self, part: str) -> float:
        """A part of the run begins. Returns the clock."""
        self.folder.begin(part)
        return time.perf_counter()

    def _finish(self, part: str, began: float, checkpoints: StageCheckpoints | None = None) -> None:
        """A part of the run is over, and its memory returned. Raises Preempted where the run has been told to stop."""
        self.memory[part] = self.runlog.memory()
        self.seconds[part] = time.perf_counter() - began
        if checkpoints is not None:
            self.seconds[part] += checkpoints.earlier_seconds
        _release_memory()
        kept = {
            "facts": self.facts,
            "looks": {name: look.as_tree() for name, look in self.looks.items()},
            "seconds": self.seconds,
            "memory": self.memory,
            "probe": self.probe.state() if self.probe is not None else {},
            "own_answers": [asdict(one) for one in self.own],
        }
        self.folder.finish(part, kept, checkpoints)

    def _write_config(self) -> None:
        """The resolved configuration into the run's folder, its model path the source folder."""
        path = self.config.run.folder / "config.yaml"
        with self.world.agreed(path):
            if self.world.first:
                tree = typed_yaml.to_tree(self.config)
                tree["model"]["path"] = str(self.source)
                path.write_text(typed_yaml.dump(tree), encoding="utf-8")

    def _open(self, folder: Path) -> StoredModel:
        with self.world.agreed():
            checkpoint = Checkpoint.open(folder, allow_pickle=self.config.model.allow_pickle)
        return StoredModel(self.model_config, checkpoint, build_tensor_map(self.skeleton, checkpoint))

    def _export(
        self,
        name: str,
        model: StoredModel,
        changed: Mapping[str, nn.Parameter],
        deltas: Mapping[nn.Parameter, LowRankDelta] | None = None,
    ) -> Path:
        folder = self.folder.path / name
        card = model_card(self.config, name, self.source, self.facts, self.looks)
        export_checkpoint(
            folder, model.checkpoint, model.tensor_map, changed, deltas=deltas, extra_files={"README.md": card},
            world=self.world, gather=engines.whole,
        )  # fmt: skip
        log.info("wrote %s", folder)
        return folder

    def _export_adapter(self, aligner: Aligner, settings: AlignConfig, base: Path) -> None:
        folder = self.folder.path / "adapter"
        card = model_card(self.config, "adapter", self.source, self.facts, self.looks)
        export_adapter(
            folder, aligner.model, settings.lora, str(base), world=self.world, gather=engines.whole,
            extra_files={"README.md": card},
        )  # fmt: skip
        log.info("wrote %s, which belongs to %s", folder, base)

    def _announce(self) -> None:
        log.info(
            "%s: %s (%s parameters, %d layers) on %d × %s, %s",
            self.config.run.name,
            self.source,
            f"{self.parameters:,}",
            self.model_config.get_text_config().num_hidden_layers,
            self.world.size,
            device_name(self.world.device),
            str(engines.compute_dtype(self.config.engine, self.world.device)).removeprefix("torch."),
        )
        if self.tokenizer.chat_template is None:
            log.info("the tokenizer has no chat template: a prompt is its text and a blank line")

    def _finished_before(self) -> dict[str, Any] | None:
        """The summary of a run that is done; None while there is something to do, or to write again."""
        if not self.progress.done("summary"):
            return None
        path, summary = self.folder.path / "summary.json", None
        with self.world.agreed():
            # On the first rank's disk alone, where ranks share none.
            if self.world.first and path.is_file():
                summary = json.loads(path.read_text(encoding="utf-8"))
        summary = self.world.gather(summary)[0]
        if summary is None:
            return None
        if self.looks:
            log.info("%s", table(self.looks))
        log.info("%s is finished: %s says what it found; --fresh runs it anew", self.config.run.name, path)
        return summary

    def _summarise(self) -> dict[str, Any]:
        self.folder.begin("summary")
        memory = max(self.runlog.memory(), *self.memory.values())
        self.runlog.close()
        summary = {
            "run": self.config.run.name,
            "model": str(self.source),
            "parameters": self.parameters,
            "world_size": self.world.size,
            "device": device_name(self.world.device),
            **versions(),
            **self.facts,
            **({"probe": self.probe.as_dict()} if self.probe is not None else {}),
            "look": {name: look.as_dict() for name, look in self.looks.items()},
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "memory_gib": {name: round(memory, 2) for name, memory in self.memory.items()},
            "peak_memory_gib": round(memory, 2),
        }
        folder = self.folder.path
        with self.world.agreed(folder / "summary.json"):
            if self.world.first:
                text = json.dumps(finite(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
                (folder / "summary.json").write_text(text, encoding="utf-8")
                if self.probe is not None:
                    text = json.dumps(finite(self.probe.matrices()), allow_nan=False) + "\n"
                    (folder / "kernel_similarity.json").write_text(text, encoding="utf-8")
                self._report()
        self.folder.progress.finish("summary", self.folder.progress.kept)
        if self.looks:
            log.info("\n%s", table(self.looks))
        log.info(
            "\n%s in %s, at most %.1f GiB a rank; everything is in %s",
            self.config.run.name, duration(sum(self.seconds.values())), memory, folder,
        )  # fmt: skip
        return summary

    def _report(self) -> None:
        """``report.html``. What cannot be drawn must not cost a run its end: the checkpoints are there."""
        try:
            write_report(self.folder.path)
        except Exception as error:
            log.warning(
                "report.html is missing (%s: %s); `python -m dcr_scale.report %s` makes it again",
                type(error).__name__, error, self.folder.path,
            )  # fmt: skip


def _release_memory() -> None:
    """Return what a finished stage held before the next one allocates."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
