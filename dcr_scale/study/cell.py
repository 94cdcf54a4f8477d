"""One cell of the study: train (or take up what another cell has trained), ask every suite, write the record.

A record is small and holds no prompt and no completion: what the judge and the string list made of each answer, in the
suite's order, and what it cost.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dcr_scale import baselines, typed_yaml
from dcr_scale.baselines import command as baseline_command
from dcr_scale.baselines.prompts import Name
from dcr_scale.config import Config, DataConfig, Label, ModelConfig
from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.data.contrast import ContrastPrompt, load_contrast
from dcr_scale.errors import UserError
from dcr_scale.evaluation import judge
from dcr_scale.evaluation.completions import Answer, CompletionStore, judged
from dcr_scale.evaluation.harness import evaluate_suites
from dcr_scale.evaluation.identity import digest, weights_digest
from dcr_scale.evaluation.perplexity import perplexity
from dcr_scale.models.cache import build_once
from dcr_scale.models.checkpoint import Checkpoint, resolve
from dcr_scale.own_answers import own_answers
from dcr_scale.pipeline import run
from dcr_scale.study.data import Sources, StudyData
from dcr_scale.study.fingerprint import fingerprint
from dcr_scale.study.grid import Cell, measured, probed
from dcr_scale.study.heldout_kernel import at_moments, heldout_pairs
from dcr_scale.study.methods import METHODS, Method
from dcr_scale.world import World, device_name, from_environment, versions

log = logging.getLogger(__name__)

# One candidate token instead of the template's handful: the fit is the dearest part of its cells.
_FIT: dict[str, dict[str, Any]] = {"surgical": {"positions": 1}, "scans": {}}
# Steps between two measurements of the probe: some half a dozen a stage.
_PROBED_EVERY = {1: 12, 2: 8}
# One letter a verdict of the judge.
LETTERS = {"full_refusal": "F", "partial_refusal": "P", "compliance": "C", "degenerate": "D", "undetermined": "U"}


@dataclass(frozen=True)
class Study:
    """What all cells share.

    Attributes:
        base: the configuration that methods change; stage 1 of it is DCR's default.
        records: folder of the finished cells' records.
        work: folder of the checkpoints, which may be thrown away.
        max_new_tokens: of an answer; refusals show early.
        kernel_pairs: held-out matched pairs whose kernel similarity is measured.
    """

    base: Config
    data: StudyData
    records: Path
    work: Path
    max_new_tokens: int = 32
    batch_size: int = 64
    kernel_pairs: int = 64

    def record(self, cell: Cell) -> Path:
        return self.records / f"{cell.name}.json"

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's record by today's judge, None where there is none or something is not measured yet. Raises
        UserError for one that was made by other settings."""
        record = self._recorded(cell)
        if record is None or record.get("judge") != judge_digest():
            return None
        return record if "kernel" in record or not measured(cell) else None

    def _recorded(self, cell: Cell) -> dict[str, Any] | None:
        path = self.record(cell)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["made_by"] != self.made_by(cell):
            raise UserError(f"{path}: was made by other settings than the study has now; remove it, or give --records")
        return record

    def made_by(self, cell: Cell) -> str:
        """A digest of all that decides what the cell's models become, how they are asked and what is measured of them:
        settings and the content of files, not where they lie.

        What a method does not use is not in it: STL's cells stay what they are when stage 1 changes.
        """
        method, tree = METHODS[cell.method], typed_yaml.to_tree(self.config(cell, stage=2))
        used = {**self._common(), "align": tree["align"], "max_new_tokens": self.max_new_tokens}
        used["sources"] = [self.data.general, self.data.refusals]
        if method.contrast is not None:
            used["refine"] = self._stage_1(cell)
        # The probe's pairs are held-out contrast prompts.
        if method.contrast is not None or probed(cell):
            used["contrast"] = self.data.contrast[method.contrast or "mixed"]
            used["probe"] = {**tree["probe"], "every": None, "micro_batch_tokens": None}
        if measured(cell):
            used["kernel_pairs"] = self.kernel_pairs
        if method.steering is not None:
            used["contrast"] = self.data.contrast["without_general"]
            used["fit"] = _FIT[method.steering]
        if method.answered:
            used["answered"] = [method.answered, self.data.contrast["without_general"]]
        # How memory is spent and what is written besides change no model, nor does what is not rehearsed.
        used["align"]["lora"].pop("export")
        if not used["align"]["rehearsal"]["weight"]:
            used["align"].pop("rehearsal")
        return fingerprint(used)

    def _common(self) -> dict[str, Any]:
        """What decides in both stages, whatever the method."""
        data = typed_yaml.to_tree(self.base)["data"]
        read = ("heldout", "heldout_limit", "max_prompt_tokens", "overlong", "system_prompt")
        return {
            "model": self.base.model.path,
            "precision": self.base.engine.precision,
            "data": {key: data[key] for key in read},
        }

    def _stage_1(self, cell: Cell) -> dict[str, Any]:
        """``refine`` of the cell's configuration, without what changes no model."""
        tree = typed_yaml.to_tree(self.config(cell, stage=1))["refine"]
        tree.pop("micro_batch_tokens")
        return tree

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's record, from disk where it has been finished before."""
        kept = self.finished(cell)
        if kept is not None:
            return kept
        # A record that lacks something is made anew, and took what it took before besides.
        spent = (self._recorded(cell) or {}).get("seconds", {}).get("cell", 0.0)
        began = time.perf_counter()
        world = from_environment()
        kept = self._judged_anew(cell, world)
        if kept is not None:
            return self._write(cell, kept)
        method = METHODS[cell.method]
        trained, facts = self._train(cell, method)
        if method.steering is not None:
            facts["probe"] = {}  # what was measured while STL's model trained is STL's
        steering = self._steering(cell, trained)
        trained_at = time.perf_counter()
        found = self._judge(cell, trained, steering, world)
        if measured(cell):
            found["kernel"] = self._kernel(cell, trained)
        record = {
            "cell": {"method": cell.method, "share": cell.share, "seed": cell.seed},
            "made_by": self.made_by(cell),
            "judge": judge_digest(),
            **facts,
            **found,
            "seconds": {
                **facts["seconds"],
                "cell": round(spent + time.perf_counter() - began, 1),
                "judge": round(time.perf_counter() - trained_at, 1),
            },
            "device": device_name(world.device),
            "threads": torch.get_num_threads(),
            **versions(),
        }
        self._write(cell, record)
        if method.steering is None and cell.method != "stl":
            shutil.rmtree(trained.parent)  # nobody asks for it again, and checkpoints are large
        return record

    def _write(self, cell: Cell, record: dict[str, Any]) -> dict[str, Any]:
        self.records.mkdir(parents=True, exist_ok=True)
        path = self.record(cell)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.rename(path)
        return record

    def _judged_anew(self, cell: Cell, world: World) -> dict[str, Any] | None:
        """The record of an earlier judge with today's verdicts on the answers that are kept, where they all are."""
        record = self._recorded(cell)
        if record is None or "weights" not in record or (measured(cell) and "kernel" not in record):
            return None
        kept = self._store(cell, record["weights"], world).kept(self.data.suites)
        if any(prompt.id not in kept for prompts in self.data.suites.values() for prompt in prompts):
            return None
        verdicts = {
            name: _verdicts([judged(prompt, *kept[prompt.id]) for prompt in prompts])
            for name, prompts in self.data.suites.items()
        }
        return {**record, "judge": judge_digest(), "suites": verdicts}

    # --- training ----------------------------------------------------------------------------------------------

    def config(self, cell: Cell, *, stage: int) -> Config:
        """The configuration of one stage of a cell, as a run would have it."""
        method, config = METHODS[cell.method], copy.deepcopy(self.base)
        config.run.seed = cell.seed
        assert config.refine is not None and config.align is not None
        for key, value in method.refine.items():
            _assign(config.refine, key, value)
        for key, value in method.align.items():
            _assign(config.align, key, value)
        config.align.refusal_share = cell.share
        if method.on_top:
            config.align.refusal_share *= 1 - method.answered / cast(int, config.align.examples)
        # Also where stage 2 rehearses none of the contrast prompts, its toxic ones must not be stage 1's.
        recipe = self.data.contrast[method.contrast or "mixed"]
        config.data = self._data(recipe, config)
        if stage == 1:
            config.align = None
        else:
            rehearsed = config.rehearsed
            if rehearsed is not None:  # by stage 1's settings, which go
                for key in ("layer", "pooling", "loss"):
                    setattr(config.align.rehearsal, key, getattr(rehearsed, key))
            config.refine = None
        # Stage 1 serves all shares of a seed and other methods, so it is measured for whichever comes first.
        if stage == 1 or probed(cell):
            config.probe.every = _PROBED_EVERY[stage]
        return config

    def _data(self, contrast: Sources, config: Config) -> DataConfig:
        """The data part of a cell's configuration, with these contrast prompts; checked like a user's own."""
        kept = typed_yaml.to_tree(config)["data"]
        tree = {**kept, "contrast": contrast, "general": self.data.general, "refusals": self.data.refusals}
        return typed_yaml.load(Config, None, [f"data={json.dumps(tree)}"]).data

    def _train(self, cell: Cell, method: Method) -> tuple[Path, dict[str, Any]]:
        """The aligned model's folder, and what its stages took and saw."""
        # Steering is done to STL's model.
        own = replace(cell, method="stl") if method.steering else cell
        name = f"{own.name}_{self.made_by(own)}"
        folder = build_once(
            self.work / "aligned" / name, lambda partial: self._align(own, METHODS[own.method], partial)
        )
        return folder / "aligned", json.loads((folder / "facts.json").read_text(encoding="utf-8"))

    def _refine(self, cell: Cell) -> Path:
        def build(partial: Path) -> None:
            config = self.config(cell, stage=1)
            config.run.name, config.run.dir = f"stage 1, seed {cell.seed}", str(partial)
            run(config)

        # The same at all shares, and for methods that differ in stage 2.
        recipe = METHODS[cell.method].contrast or "mixed"
        made_by = fingerprint({**self._common(), "refine": self._stage_1(cell), "contrast": self.data.contrast[recipe]})
        return build_once(self.work / "refined" / f"seed{cell.seed}_{made_by}", build)

    def _align(self, cell: Cell, method: Method, partial: Path) -> None:
        config = self.config(cell, stage=2)
        config.run.name, config.run.dir = cell.name, str(partial)
        facts: dict[str, Any] = {"seconds": {}, "probe": {}}
        if method.contrast is not None:
            refined = self._refine(cell)
            summary = json.loads((refined / "summary.json").read_text(encoding="utf-8"))
            facts["refine"] = summary["refine"]
            facts["seconds"]["refine"] = summary["seconds"]["refine"]
            facts["probe"].update(_probed(refined, summary, "refine"))
            config.model.path = str(refined / "refined")
        if method.answered:
            config.data.answered = typed_yaml.load(
                Config, None, [f"data.answered=[{{path: {json.dumps(str(self._answers(cell)))}}}]"]
            ).data.answered
            assert config.align is not None
            config.align.answered_share = method.answered / cast(int, config.align.examples)
        summary = run(config)
        facts["align"], facts["seconds"]["align"] = summary["align"], summary["seconds"]["align"]
        facts["probe"].update(_probed(partial, summary, "align"))
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    def _answers(self, cell: Cell) -> Path:
        """Seemingly toxic training prompts with the untrained model's own answers, those that comply."""

        def build(partial: Path) -> None:
            mine = [prompt.text for prompt in self._contrast(cell) if prompt.label == "seemingly_toxic"]
            wanted = METHODS[cell.method].answered
            prompts = mine[: 2 * wanted]
            model, encoder = _load(resolve(self.base.model))
            rows = own_answers(model, encoder, prompts, max_new_tokens=64)[:wanted]
            if len(rows) < wanted:
                title = METHODS[cell.method].title
                raise UserError(f"only {len(rows)} of {len(prompts)} prompts are answered; {title} needs {wanted}")
            (partial / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        # The same at all shares, and for methods that differ elsewhere.
        prompts = self.data.contrast["without_general"]
        made_by = fingerprint({**self._common(), "answered": [METHODS[cell.method].answered, prompts]})
        return build_once(self.work / "answered" / f"seed{cell.seed}_{made_by}", build) / "answered.jsonl"

    def _steering(self, cell: Cell, trained: Path) -> baselines.Steering | None:
        steering = METHODS[cell.method].steering
        if steering is None:
            return None
        # The same prompts that stage 1 has.
        contrast = self._contrast(cell)

        def build(partial: Path) -> None:
            files: dict[Name, str | None] = {"harmless": self.data.general[0]["path"]}
            for label in get_args(Label):
                path = partial / f"{label}.jsonl"
                rows = [json.dumps({"prompt": p.text}) + "\n" for p in contrast if p.label == label]
                path.write_text("".join(rows), encoding="utf-8")
                files[label] = str(path)
            baseline_command.run(
                steering, ModelConfig(path=str(trained)), partial / "steering",
                files=files, data=DataConfig(), seed=cell.seed, options=_FIT[steering],
            )  # fmt: skip

        return baselines.load(
            build_once(self.work / "steering" / f"{cell.name}_{self.made_by(cell)}", build) / "steering.safetensors"
        )

    def _contrast(self, cell: Cell) -> list[ContrastPrompt]:
        """Stage 1's training prompts without its general ones, which other methods get as what they are."""
        data = self._data(self.data.contrast["without_general"], self.config(cell, stage=1))
        return list(load_contrast(data, cell.seed).train)

    def _kernel(self, cell: Cell, trained: Path) -> dict[str, list]:
        """Kernel similarity of held-out matched pairs at each moment that the cell's model goes through."""
        moments = {"untrained": resolve(self.base.model)}
        if METHODS[cell.method].contrast is not None:
            moments["refined"] = self._refine(cell) / "refined"
        moments["aligned"] = trained
        pairs = heldout_pairs(self.config(cell, stage=2).data, cell.seed, self.kernel_pairs)
        return at_moments(moments, _load, pairs, self.base.probe, self.work / "kernel")

    # --- judging -----------------------------------------------------------------------------------------------

    def _judge(self, cell: Cell, folder: Path, steering: baselines.Steering | None, world: World) -> dict[str, Any]:
        model, encoder = _load(folder)
        weights = weights_digest(Checkpoint.open(folder))
        store = self._store(cell, weights, world)
        result = evaluate_suites(
            model, encoder, self.data.suites,
            max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, steering=steering, store=store,
        )  # fmt: skip
        examples = self._examples(encoder)
        known = perplexity(model, encoder.tokenizer, examples, partitioned=False, world=world, steering=steering)
        return {
            "weights": weights,
            "suites": {name: _verdicts(answers) for name, answers in result.answers.items()},
            "perplexity": known.as_dict(),
            "generated_tokens": result.tokens,
        }

    def _store(self, cell: Cell, weights: str, world: World) -> CompletionStore:
        """The answers of a cell's model: an evaluation that was cut off goes on with those it has; they stay, to be
        looked at. ``weights``: digest of the model's; one that was trained again is another."""
        asked = digest(json.dumps(self.data.categories(), sort_keys=True).encode())
        folder = self.work / "answers" / f"{cell.name}_{self.made_by(cell)}_{weights[:8]}_{asked[:8]}"
        return CompletionStore(folder, {"weights": weights, "max_new_tokens": self.max_new_tokens}, world)

    def _examples(self, encoder: ChatEncoder) -> list[EncodedExample]:
        answered = [prompt for prompts in self.data.suites.values() for prompt in prompts if prompt.response]
        encoded = [encoder.encode_example(p.text, p.response, max_tokens=256) for p in answered]
        return [example for example in encoded if example is not None]


@cache
def judge_digest() -> str:
    """Of the judge's weights: verdicts of two judges are not compared."""
    return digest(judge.WEIGHTS.read_bytes())


def _probed(folder: Path, summary: dict[str, Any], stage: str) -> dict[str, Any]:
    """A stage's measurements by the probe, where it was on: the first and the last, all of them (``curve``), and each
    matched pair's similarity at the ends (``cross``)."""
    found = summary.get("probe", {}).get(stage)
    if found is None:
        return {}
    matrices = json.loads((folder / "kernel_similarity.json").read_text(encoding="utf-8"))
    pairs = matrices["pairs"].get("cross", [])
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    curve = [
        {key: value for key, value in row.items() if key == "step" or key.startswith(("kernel/", "refusal_"))}
        for row in rows
        if row["stage"] == f"{stage}/probe"
    ]
    cross = {end: [matrix[i][j] for i, j in pairs] for end, matrix in matrices[stage].items()}
    return {stage: {**found, "curve": curve, "cross": cross}}


def _verdicts(answers: Sequence[Answer]) -> dict[str, Any]:
    """One letter (:data:`LETTERS`) and one probability in percent an answer, and where the string list refuses."""
    return {
        "labels": "".join(LETTERS[answer.label] for answer in answers),
        "refusal_percent": [round(100 * answer.refusal_probability) for answer in answers],
        "openings": "".join("r" if answer.opening_refuses else "-" for answer in answers),
    }


def _load(folder: Path) -> tuple[PreTrainedModel, ChatEncoder]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, ChatEncoder(AutoTokenizer.from_pretrained(folder), overlong="drop")


def _assign(settings: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        settings = getattr(settings, name)
    assert hasattr(settings, last), key
    setattr(settings, last, value)
