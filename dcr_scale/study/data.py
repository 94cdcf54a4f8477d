"""What the study trains on and judges by: public research data where it lies beside the repository, else our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dcr_scale import typed_yaml
from dcr_scale.config import Config, DataConfig, Label
from dcr_scale.data.contrast import ContrastPrompt, load_contrast
from dcr_scale.data.instructions import Instruction, load_general, load_refusals
from dcr_scale.data.splitting import draw, normalised
from dcr_scale.evaluation.identity import digest
from dcr_scale.evaluation.suites import SuitePrompt, load_suite

Sources = list[dict[str, Any]]

# Prompts a class from each source of stage 1: one that has far more than the others would drown them.
_A_SOURCE = 200
# One split for all seeds: the built-in prompts held out here are the suites where nothing else is at hand.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class StudyData:
    """Sources by what they are for, as a run's configuration has them.

    ``contrast``: by recipe (:mod:`dcr_scale.study.methods`). ``suites``: what models are judged by, by name;
    ``published`` says whether they are published benchmarks or only our own held-out prompts.
    """

    contrast: Mapping[str, Sources]
    general: Sources
    refusals: Sources
    suites: Mapping[str, Sequence[SuitePrompt]]
    published: bool

    def categories(self) -> dict[str, Any]:
        """Each suite's prompts by id, class, category and a digest, without their text."""
        return {
            name: {
                "class": prompts[0].of_class,
                "digest": digest("\n".join(prompt.text for prompt in prompts).encode()),
                "ids": [prompt.id for prompt in prompts],
                "categories": [prompt.category for prompt in prompts],
            }
            for name, prompts in self.suites.items()
        }


def research_data(folder: Path, prompts: int, *, beyond: int = 0) -> StudyData:
    """The data sets in ``folder``, at most ``prompts`` prompts of a suite.

    ``beyond``: leave out the prompts that so many a suite consist of; suites without any other are left out too, and
    AdvBench, on which no method was compared, comes in.
    """

    def path(name: str) -> str:
        return str(folder / name)

    xstest = {"path": path("xstest_prompts.csv"), "labels": {"safe": "seemingly_toxic", "unsafe": "toxic"}}
    toxic = {"path": path("stl_toxic_stage1.jsonl")}
    general = {"path": path("alpaca.jsonl")}
    pairs = {"path": "builtin", "limit": 2 * _A_SOURCE}
    some_toxic = {**toxic, "limit": _A_SOURCE}
    safe = {**general, "label": "seemingly_toxic", "limit": _A_SOURCE}
    contrast: dict[str, Sources] = {
        "mixed": [pairs, xstest, some_toxic, safe],
        "without_general": [pairs, xstest, some_toxic],
        "matched": [{"path": "builtin"}],
        "paper": [{**xstest, "labels": {"safe": "seemingly_toxic", "unsafe": None}}, toxic],
    }
    names = {
        "or_bench_hard": "or_bench_dev.jsonl",
        "oktest": "oktest_dev.jsonl",
        "coconot": "coconot_dev.jsonl",
        "or_bench_toxic": "or_bench_dev.jsonl",
        "harmbench": "harmbench_dev.jsonl",
        "i_malicious_instructions": "i_malicious.jsonl",
        "jailbreakbench": "jailbreakbench.jsonl",
        "general": "alpaca_heldout.jsonl",
    }
    suites = {name: load_suite(f"{name}={folder / file}") for name, file in names.items()}
    if beyond:
        # By their text: one prompt may be in several suites.
        seen = {normalised(prompt.text) for suite in suites.values() for prompt in _some(suite, beyond)}
        suites["advbench"] = load_suite(f"advbench={folder / 'advbench.jsonl'}")
        suites = {
            name: [prompt for prompt in suite if normalised(prompt.text) not in seen] for name, suite in suites.items()
        }
    suites = {name: _some(suite, prompts) for name, suite in suites.items() if suite}
    return StudyData(contrast, [general], [{"path": path("stl_refusals_stage2.jsonl")}], suites, published=True)


def builtin_data(work: Path, prompts: int) -> StudyData:
    """The built-in prompts alone: three in four train, the rest are the suites. Its files go to ``work``."""
    data = DataConfig(heldout=0.25)
    contrast = load_contrast(data, _SPLIT_SEED)
    general, refusals = load_general(data, _SPLIT_SEED), load_refusals(data, _SPLIT_SEED)
    work.mkdir(parents=True, exist_ok=True)
    train = _write(work / "contrast.jsonl", [_row(prompt) for prompt in contrast.train])
    taught = _write(work / "general.jsonl", [_instruction(one) for one in general.train])
    refused = _write(work / "refusals.jsonl", [_instruction(one) for one in refusals.train])
    safe = {"path": taught, "label": "seemingly_toxic", "limit": _A_SOURCE}
    recipes: dict[str, Sources] = {
        "mixed": [{"path": train}, safe],
        "without_general": [{"path": train}],
        "matched": [{"path": train}],
    }
    suites = {
        f"builtin_{label}": _some(
            [
                SuitePrompt(f"builtin_{label}/{number}", prompt.text, label, prompt.family, prompt.where)
                for number, prompt in enumerate(one for one in contrast.heldout if one.label == label)
            ],
            prompts,
        )
        for label in get_args(Label)
    }
    suites["builtin_general"] = [
        SuitePrompt(f"builtin_general/{number}", one.prompt, "general", "", "", one.response)
        for number, one in enumerate(general.heldout[:prompts])
    ]
    return StudyData(recipes, [{"path": taught}], [{"path": refused}], suites, published=False)


def trained_on(data: StudyData) -> dict[str, list[str]]:
    """The prompts that a cell's training may draw from, by what they are for."""
    trees: dict[str, dict[str, Sources]] = {recipe: {"contrast": sources} for recipe, sources in data.contrast.items()}
    trees["stage 2"] = {"general": data.general, "refusals": data.refusals}
    found: dict[str, list[str]] = {}
    for name, tree in trees.items():
        # whole sources: which of their rows are drawn depends on the seed
        whole = {kind: [{**source, "limit": None} for source in sources] for kind, sources in tree.items()}
        part = typed_yaml.load(Config, None, [f"data={json.dumps(whole)}"]).data
        if name == "stage 2":
            sets = load_general(part, _SPLIT_SEED), load_refusals(part, _SPLIT_SEED)
            found[name] = [one.prompt for side in sets for one in (*side.train, *side.heldout)]
        else:
            side = load_contrast(part, _SPLIT_SEED)
            found[f"stage 1, {name}"] = [one.text for one in (*side.train, *side.heldout)]
    return found


def _some(prompts: Sequence[SuitePrompt], limit: int) -> list[SuitePrompt]:
    return draw(prompts, limit, lambda prompt: prompt.id, seed=0, purpose="study")


def _row(prompt: ContrastPrompt) -> dict[str, Any]:
    return {"prompt": prompt.text, "label": prompt.label, "family": prompt.family, "pair": prompt.pair}


def _instruction(one: Instruction) -> dict[str, Any]:
    return {"prompt": one.prompt, "response": one.response}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
