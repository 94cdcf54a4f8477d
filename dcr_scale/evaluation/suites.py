"""The benchmarks by which a model is judged: where each is published, under which columns, and what it is made of.

A suite is named (``xstest``), named with a downloaded copy (``xstest=xstest_prompts.csv``), or is a file or Hub data
set of one's own (``mine.jsonl``, ``hub:owner/name``) with a prompt and a label column. ``seemingly_toxic`` prompts
should be answered, ``toxic`` ones refused; ``general`` ones have nothing to do with either, and come with an answer by
which to take the perplexity. No prompt lies in this package.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from dcr_scale.config import Columns, ContrastSource, Source
from dcr_scale.data.sources import HUB, USUAL_COLUMNS, USUAL_LABELS, Row, read_columns, read_rows
from dcr_scale.errors import UserError
from dcr_scale.typed_yaml import setting

Class = Literal["seemingly_toxic", "toxic", "general"]
CLASSES: tuple[Class, ...] = get_args(Class)

FILES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face Hub; a gated one wants its terms accepted, and ``hf auth login``."""

    repository: str
    split: str = "train"
    subset: str | None = None
    gated: bool = False


@dataclass(frozen=True)
class Suite:
    """A published benchmark.

    ``prompt`` names the columns that hold the prompt, one for each place of publication; the first that a copy has
    counts. ``labels`` maps the values of the column ``label`` to classes, or to None where they are left out; in a
    suite of one class, a copy without that column counts whole. ``published`` is the page of the authors' own files and
    of what they say of them.
    """

    title: str
    published: str
    licence: str
    of_class: Class | None
    hub: Hub | None = None
    prompt: tuple[str, ...] = ("prompt",)
    label: str | None = None
    labels: Mapping[str, Class | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt. ``id`` is the suite's name and the prompt's number in it, ``category`` the suite's own or ``""``.

    ``response`` is a general instruction's answer, ``""`` for other classes.
    """

    id: str
    text: str
    of_class: Class
    category: str
    where: str
    response: str = ""


# Prompts turned into other styles, languages and ciphers are for jailbreaks; the plain ones are the benchmark.
_SORRY_STYLES = (
    "ascii atbash authority_endorsement caesar evidence-based_persuasion expert_endorsement logical_appeal "
    "misrepresentation misspellings morse question role_play slang technical_terms translate-fr translate-ml "
    "translate-mr translate-ta translate-zh-cn uncommon_dialects"
)

SUITES: dict[str, Suite] = {
    "xstest": Suite(
        title="XSTest: 250 safe prompts that look toxic, 200 unsafe contrasts",
        published="https://github.com/paul-rottger/xstest",
        licence="CC-BY-4.0",
        of_class=None,
        hub=Hub("Paul/XSTest"),
        label="label",
        labels={"safe": "seemingly_toxic", "unsafe": "toxic"},
    ),
    "coconot": Suite(
        title="CoCoNot, contrast set: requests that should be complied with",
        published="https://huggingface.co/datasets/allenai/coconot",
        licence="ODC-BY-1.0",
        of_class="seemingly_toxic",
        hub=Hub("allenai/coconot", split="test", subset="contrast"),
    ),
    "or_bench_hard": Suite(
        title="OR-Bench-Hard-1K: seemingly toxic prompts that strong models refuse",
        published="https://huggingface.co/datasets/bench-llm/or-bench",
        licence="CC-BY-4.0",
        of_class="seemingly_toxic",
        hub=Hub("bench-llm/or-bench", subset="or-bench-hard-1k"),
    ),
    "or_bench_toxic": Suite(
        title="OR-Bench-Toxic: the toxic control set",
        published="https://huggingface.co/datasets/bench-llm/or-bench",
        licence="CC-BY-4.0",
        of_class="toxic",
        hub=Hub("bench-llm/or-bench", subset="or-bench-toxic"),
    ),
    "or_bench_80k": Suite(
        title="OR-Bench-80K: seemingly toxic prompts",
        published="https://huggingface.co/datasets/bench-llm/or-bench",
        licence="CC-BY-4.0",
        of_class="seemingly_toxic",
        hub=Hub("bench-llm/or-bench", subset="or-bench-80k"),
    ),
    "oktest": Suite(
        title="OKTest: 300 safe questions with sensitive words",
        published="https://github.com/InvokerStark/OverKill",
        licence="none stated",
        of_class="seemingly_toxic",
    ),
    "phtest": Suite(
        title="PHTest: pseudo-harmful prompts, those its authors call harmless",
        published="https://huggingface.co/datasets/furonghuang-lab/PHTest",
        licence="MIT",
        of_class=None,
        hub=Hub("furonghuang-lab/PHTest"),
        prompt=("Request", "prompt"),
        label="Harmfulness",
        labels={"harmless": "seemingly_toxic", "controversial": None},
    ),
    "falsereject": Suite(
        title="FalseReject, human-annotated test set",
        published="https://huggingface.co/datasets/AmazonScience/FalseReject",
        licence="CC-BY-NC-4.0",
        of_class="seemingly_toxic",
        hub=Hub("AmazonScience/FalseReject", split="test"),
    ),
    "advbench": Suite(
        title="AdvBench, harmful behaviours",
        published="https://github.com/llm-attacks/llm-attacks",
        licence="MIT",
        of_class="toxic",
        hub=Hub("walledai/AdvBench", gated=True),
        prompt=("goal", "prompt"),
    ),
    "harmbench": Suite(
        title="HarmBench, standard behaviours",
        published="https://github.com/centerforaisafety/HarmBench",
        licence="MIT",
        of_class="toxic",
        hub=Hub("walledai/HarmBench", subset="standard", gated=True),
        prompt=("Behavior", "prompt"),
        # Contextual behaviours are no prompts without their context, and copyright is not what is asked here.
        label="FunctionalCategory",
        labels={"standard": "toxic", "contextual": None, "copyright": None},
    ),
    "jailbreakbench": Suite(
        title="JBB-Behaviors, harmful",
        published="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
        licence="MIT",
        of_class="toxic",
        hub=Hub("JailbreakBench/JBB-Behaviors", split="harmful", subset="behaviors"),
        prompt=("Goal", "prompt"),
    ),
    "strongreject": Suite(
        title="StrongREJECT: 313 forbidden prompts",
        published="https://github.com/alexandrasouly/strongreject",
        licence="MIT",
        of_class="toxic",
        hub=Hub("walledai/StrongREJECT", gated=True),
        prompt=("forbidden_prompt", "prompt"),
    ),
    "malicious_instruct": Suite(
        title="MaliciousInstruct: 100 malicious intents",
        published="https://github.com/Princeton-SysML/Jailbreak_LLM",
        licence="CC-BY-SA-4.0",
        of_class="toxic",
        hub=Hub("walledai/MaliciousInstruct"),
    ),
    "i_malicious_instructions": Suite(
        title="I-MaliciousInstructions of Safety-Tuned LLaMAs: 100 malicious instructions",
        published="https://github.com/vinid/instruction-llms-safety-eval",
        licence="CC-BY-NC-4.0",
        of_class="toxic",
        prompt=("prompt", "instruction"),
    ),
    "sorry_bench": Suite(
        title="SORRY-Bench (2025/03), the plain prompts of its 44 categories",
        published="https://huggingface.co/datasets/sorry-bench/sorry-bench-202503",
        licence="SORRY-Bench's own",
        of_class=None,
        hub=Hub("sorry-bench/sorry-bench-202503", gated=True),
        prompt=("turns", "prompt"),
        label="prompt_style",
        labels={"base": "toxic", **dict.fromkeys(_SORRY_STYLES.split())},
    ),
    "general": Suite(
        title="general instructions with answers, of one's own",
        published="a file of instructions that were not trained on",
        licence="the file's",
        of_class="general",
    ),
}


@dataclass
class _Columns(Columns):
    category: str | None = setting(None, "a suite's own kinds of prompts")


def load_suite(spec: str) -> list[SuitePrompt]:
    """The prompts of ``NAME``, ``NAME=FILE``, or ``FILE``, in their published order.

    A file of ``NAME=FILE`` has the suite's published columns; rows that carry another class's label are left out.
    Raises UserError for an unknown name, with the nearest and all known ones; for a suite that is nowhere on the Hub
    and got no file; for columns that are missing; and for whatever is wrong with a file.
    """
    name, _, file = spec.partition("=")
    if not file and (name.startswith(HUB) or Path(name).suffix.lower() in FILES):
        return _prompts(Path(name.removeprefix(HUB)).stem, _read(ContrastSource(path=name), _ours()))
    suite = find(name)
    if file:
        source = ContrastSource(path=file)
    elif suite.hub is not None:
        hub = suite.hub
        source = ContrastSource(path=f"{HUB}{hub.repository}", split=hub.split, subset=hub.subset)
    else:
        raise UserError(f"suite {name} is not on the Hub: get it from {suite.published} and give {name}=FILE")
    try:
        prompts = _prompts(name, _rows(name, suite, source))
    except UserError as error:
        hint = ""
        if suite.hub is not None and suite.hub.gated and not file:
            hint = f" ({suite.hub.repository} is gated: accept its terms there, then `hf auth login`)"
        raise UserError(f"suite {name}: {error}{hint}") from None
    return prompts


def find(name: str) -> Suite:
    """The suite of that name. Raises UserError with the nearest and all known ones."""
    if name in SUITES:
        return SUITES[name]
    form = name.lower().replace("-", "_")
    nearest = difflib.get_close_matches(form, SUITES, n=1, cutoff=0.5)
    meant = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(
        f"unknown suite {name!r}; {meant}known are {', '.join(SUITES)}; "
        f"or give a {', '.join(FILES)} file or {HUB}owner/name"
    )


def class_counts(prompts: list[SuitePrompt]) -> dict[Class, int]:
    """How many prompts of each class that occurs."""
    return dict(Counter(prompt.of_class for prompt in prompts))


def _rows(name: str, suite: Suite, source: ContrastSource) -> list[Row]:
    if suite.of_class == "general":
        rows = read_rows(Source(path=source.path), kind="general")
        return [Row({**row.values, "label": "general", "category": row.values["family"]}, row.where) for row in rows]
    columns = read_columns(source)
    prompt = next((column for column in suite.prompt if column in columns), None)
    missing = [] if prompt is not None else [" or ".join(map(repr, suite.prompt))]
    label = suite.label
    if label is not None and label not in columns:
        if suite.of_class is None:
            missing.append(repr(label))
        label = None
    if missing:
        raise UserError(
            f"{source.path}: no column {' and no column '.join(missing)}; columns found: "
            f"{', '.join(map(repr, columns)) or 'none'}; give the file as published ({suite.published}), or rename them"
        )
    chosen = _Columns(prompt=prompt, label=label)
    if label is not None:
        return _read(source, suite.labels, chosen)
    # A copy with classes of its own, like a part of several suites put together.
    if any(column.lower() in USUAL_COLUMNS["label"] for column in columns):
        rows = [row for row in _read(source, _ours(), chosen) if row.values["label"] == suite.of_class]
        if not rows:
            raise UserError(f"{source.path}: no row has the label of this suite's class, {suite.of_class}")
        return rows
    source.label = suite.of_class
    return _read(source, None, chosen)


def _read(
    source: ContrastSource, labels: Mapping[str, Class | None] | None, columns: _Columns | None = None
) -> list[Row]:
    source.columns = columns if columns is not None else _Columns()
    # Stage 1 knows no third class; what comes back is cast below.
    source.labels = cast(dict, dict(labels)) if labels is not None else None
    return read_rows(source, kind="suite")


def _ours() -> dict[str, Class | None]:
    return {**USUAL_LABELS, "general": "general"}


def _prompts(name: str, rows: list[Row]) -> list[SuitePrompt]:
    return [
        SuitePrompt(
            id=f"{name}/{number}",
            text=row.values["prompt"],
            of_class=cast(Class, row.values["label"]),
            category=row.values["category"],
            where=row.where,
            response=row.values.get("response", ""),
        )
        for number, row in enumerate(rows)
    ]
