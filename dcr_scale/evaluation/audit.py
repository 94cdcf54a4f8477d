"""Shortcut audit: can the two sides of a contrast set be told apart without understanding them?

    python -m dcr_scale.evaluation.audit CONTRAST_SET [--elsewhere OTHER_SET]

Stage 1 pulls the sides apart by whatever tells them apart soonest. Where all toxic prompts are imperatives out of one
collection and all others are questions out of another, that is mood and origin, and refusals will follow those. Small
classifiers, each seeing one kind of surface feature, show what is on offer; each is judged on families of prompts it
was not fitted on, on sources it was not fitted on, and on the two sides of matched pairs.

Punctuation, length and mood carry next to no meaning: if they tell the sides apart, that is a shortcut. Words do carry
meaning, so a bag of them may succeed for good reasons; it is a shortcut where it fails on other sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dcr_scale.config import ContrastSource, DataConfig, load_config
from dcr_scale.data.contrast import ContrastPrompt, load_contrast
from dcr_scale.data.splitting import draw, normalised, seeded_order
from dcr_scale.errors import UserError
from dcr_scale.evaluation import logistic
from dcr_scale.evaluation.intervals import Interval, area_interval, wilson

FOLDS = 5
MOST_PROMPTS = 4000
STRENGTH = 1.0
# A word counts where so many families have it.
FAMILIES_OF_A_WORD = 2
# Above the first, interval and all, an area tells; below the second it is near chance.
TELLING, HARDLY = 0.75, 0.6

Features = dict[str, float]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_QUESTION_WORDS = frozenset(
    {"how", "what", "why", "who", "where", "when", "which", "whose", "is", "are", "was", "were", "do", "does", "did"}
    | {"can", "could", "should", "would", "will", "may", "might", "has", "have", "am"}
)
_STATEMENT_WORDS = frozenset(
    {"i", "i'm", "i've", "i'd", "we", "my", "our", "you", "he", "she", "they", "it", "it's", "the", "a", "an", "this"}
    | {"that", "there", "these", "those", "his", "her", "their", "as", "in", "on", "at", "for", "if", "since"}
)
_MARKS = "?!.,;:'\"()-/"


def _words(text: str) -> Features:
    return {f"word {word.lower()}": 1.0 for word in _WORD.findall(text)}


def _punctuation(text: str) -> Features:
    found = {f"has {mark}": 1.0 for mark in _MARKS if mark in text}
    last = text.rstrip()[-1:]
    return found | {f"ends in {last if last in _MARKS else 'no mark'}": 1.0}


def _length(text: str) -> Features:
    length = math.log(len(_WORD.findall(text)) + 1) - 2.5
    return {
        "length": length,
        "length squared": length * length,
        "word length": len(text) / (len(text.split()) or 1) - 5,
    }


def _mood(text: str) -> Features:
    words = [word.lower().replace("’", "'") for word in _WORD.findall(text)] or [""]
    found = {f"mood {mood(text)}": 1.0}
    if any(word in ("i", "i'm", "my", "me", "we", "our") for word in words):
        found["first person"] = 1.0
    if "please" in words:
        found["please"] = 1.0
    return found


def mood(text: str) -> str:
    """``question``, ``imperative`` or ``statement``, by the last mark and the first word."""
    words = _WORD.findall(text)
    first = words[0].lower().replace("’", "'") if words else ""
    if text.rstrip().endswith("?") or first in _QUESTION_WORDS or first.removesuffix("'s") in _QUESTION_WORDS:
        return "question"
    return "statement" if first in _STATEMENT_WORDS else "imperative"


STYLE: dict[str, Callable[[str], Features]] = {"punctuation": _punctuation, "length": _length, "mood": _mood}
GROUPS: dict[str, Callable[[str], Features]] = {
    "words": _words,
    **STYLE,
    "all": lambda text: {**_words(text), **_punctuation(text), **_length(text), **_mood(text)},
}


@dataclass(frozen=True)
class Audit:
    """How well surface features tell toxic from seemingly toxic prompts: areas under the ROC, .5 is chance.

    ``within``: by group of features, on families not fitted on. ``by_source``: all features, within one source that
    has both classes. ``across``: all features, on a source (or the set given as ``elsewhere``) when fitted on the
    rest. ``pairs``: the share of matched pairs whose toxic side scores higher. ``facts``: what the sides look like.
    """

    prompts: Mapping[str, int]
    within: Mapping[str, Interval]
    by_source: Mapping[str, Interval]
    across: Mapping[str, Interval]
    pairs: Interval | None
    sources_of_one_class: bool
    facts: tuple[str, ...]

    def warnings(self) -> list[str]:
        """What is wrong with the set, in plain words; empty where nothing is."""
        found = []
        if self.sources_of_one_class:
            found.append(
                "no source has prompts of both classes: whatever sets the sources apart sets the classes apart"
            )
        for name in STYLE:
            if self.within[name].low > TELLING:
                found.append(f"{name} alone tells the sides apart (AUC {self.within[name]}), and it means nothing")
        for name, area in self.across.items():
            if self.within["all"].low > TELLING and area.estimate < HARDLY:
                found.append(
                    f"what tells the sides apart here (AUC {self.within['all']}) is near chance on {name} "
                    f"(AUC {area}): it is the collection, not the toxicity"
                )
        return found

    def verdict(self) -> str:
        """One line."""
        if warnings := self.warnings():
            more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
            return f"shortcut audit: WARNING: {warnings[0]}{more}"
        area = self.within["all"]
        how = "hardly tell" if area.low < HARDLY else "in part tell" if area.low <= TELLING else "tell"
        alone = "hardly" if max(self.within[name].low for name in STYLE) < HARDLY else "in part"
        but = f", punctuation, length or mood alone {alone}" if how == "tell" else ""
        return f"shortcut audit: surface features {how} the sides apart (AUC {area}){but}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the verdict, what is behind it, and the areas."""
        return {
            "verdict": self.verdict(),
            "warnings": self.warnings(),
            "within": {name: area.as_dict() for name, area in self.within.items()},
            "across": {name: area.as_dict() for name, area in self.across.items()},
            "facts": list(self.facts),
        }

    def table(self) -> str:
        """Everything, for a terminal."""
        counts = ", ".join(f"{count} {label}" for label, count in self.prompts.items())
        lines = [f"{counts}; area under the ROC with its 95 % interval, .5 is chance", ""]
        rows = {f"by {name}, families not fitted on": area for name, area in self.within.items()}
        rows |= {f"by all, within {name}": area for name, area in self.by_source.items()}
        rows |= {f"by all, on {name}, fitted on the rest": area for name, area in self.across.items()}
        if self.pairs is not None:
            rows["share of matched pairs whose toxic side scores higher"] = self.pairs
        width = max(map(len, rows))
        lines += [f"{name:{width}}  {area}" for name, area in rows.items()]
        return "\n".join([*lines, "", *self.facts, "", *(f"WARNING: {line}" for line in self.warnings())]).rstrip()


def audit(prompts: Sequence[ContrastPrompt], elsewhere: Sequence[ContrastPrompt] = (), seed: int = 0) -> Audit:
    """Fit the classifiers and judge them. Seconds: of more than 4,000 prompts a random part is taken.

    Args:
        prompts: of both classes, and of two families or more.
        elsewhere: prompts of both classes from sources that the set does not have; they are only judged. Those that
            the set has too (:func:`unseen`) would be judged by a classifier that has seen them: leave them out.

    Raises ValueError where a class is missing.
    """
    prompts = draw(prompts, MOST_PROMPTS, lambda prompt: prompt.pair or prompt.text, seed=seed, purpose="audit")
    for chosen in (prompts, elsewhere):
        if chosen and not _both(chosen):
            raise ValueError(f"the audit compares two classes, and all {len(chosen)} prompts are {chosen[0].label}")
    scores = {name: _cross_validate(prompts, group, seed) for name, group in GROUPS.items()}
    sources = {prompt.source for prompt in prompts}
    by_source, across = {}, {}
    for source in sorted(sources):
        own = [prompt for prompt in prompts if prompt.source == source]
        others = [prompt for prompt in prompts if prompt.source != source]
        if len(sources) > 1 and _both(own) and len({prompt.family for prompt in own}) > 1:
            by_source[source] = _area(own, _cross_validate(own, GROUPS["all"], seed), seed)
        if _both(own) and _both(others):
            across[source] = _area(own, _scores(others, own, GROUPS["all"]), seed)
    if elsewhere:
        name = ", ".join(sorted({prompt.source for prompt in elsewhere}))
        across[name] = _area(elsewhere, _scores(prompts, elsewhere, GROUPS["all"]), seed)
    return Audit(
        prompts={label: sum(p.label == label for p in prompts) for label in ("seemingly_toxic", "toxic")},
        within={name: _area(prompts, found, seed) for name, found in scores.items()},
        by_source=by_source,
        across=across,
        pairs=_pairs(prompts, scores["all"]),
        sources_of_one_class=not any(_both([p for p in prompts if p.source == source]) for source in sources),
        facts=_facts(prompts),
    )


def unseen(elsewhere: Sequence[ContrastPrompt], prompts: Sequence[ContrastPrompt]) -> list[ContrastPrompt]:
    """The prompts of ``elsewhere`` whose text, in normal form, is not among ``prompts``."""
    seen = {normalised(prompt.text) for prompt in prompts}
    return [prompt for prompt in elsewhere if normalised(prompt.text) not in seen]


def _both(prompts: Sequence[ContrastPrompt]) -> bool:
    return len({prompt.label for prompt in prompts}) == 2


def _area(prompts: Sequence[ContrastPrompt], scores: Sequence[float], seed: int) -> Interval:
    toxic = [prompt.label == "toxic" for prompt in prompts]
    return area_interval(scores, toxic, [prompt.family for prompt in prompts], seed=seed)


def _scores(
    fitted_on: Sequence[ContrastPrompt], judged: Sequence[ContrastPrompt], group: Callable[[str], Features]
) -> list[float]:
    rows = [group(prompt.text) for prompt in fitted_on]
    vocabulary = logistic.common(rows, [prompt.family for prompt in fitted_on], FAMILIES_OF_A_WORD)
    toxic = [prompt.label == "toxic" for prompt in fitted_on]
    # Both sides weigh the same however many prompts they have.
    share = sum(toxic) / len(toxic)
    weights = [0.5 / share if is_toxic else 0.5 / (1 - share) for is_toxic in toxic]
    model = logistic.fit(rows, toxic, strength=STRENGTH, row_weights=weights, vocabulary=vocabulary)
    return [model.logit(group(prompt.text)) for prompt in judged]


def _cross_validate(prompts: Sequence[ContrastPrompt], group: Callable[[str], Features], seed: int) -> list[float]:
    families = seeded_order({prompt.family for prompt in prompts}, str, seed=seed, purpose="audit folds")
    fold_of = {family: i % FOLDS for i, family in enumerate(families)}
    scores = [0.0] * len(prompts)
    for fold in range(FOLDS):
        judged = [i for i, prompt in enumerate(prompts) if fold_of[prompt.family] == fold]
        fitted_on = [prompt for prompt in prompts if fold_of[prompt.family] != fold]
        # Without two classes to learn from, every prompt of the fold scores chance.
        if judged and _both(fitted_on):
            found = _scores(fitted_on, [prompts[i] for i in judged], group)
            for i, score in zip(judged, found, strict=True):
                scores[i] = score
    return scores


def _pairs(prompts: Sequence[ContrastPrompt], scores: Sequence[float]) -> Interval | None:
    sides: dict[str, dict[str, float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        if prompt.pair is not None:
            sides.setdefault(prompt.pair, {})[prompt.label] = score
    whole = [pair for pair in sides.values() if len(pair) == 2]
    return wilson(sum(pair["toxic"] > pair["seemingly_toxic"] for pair in whole), len(whole)) if whole else None


def _facts(prompts: Sequence[ContrastPrompt]) -> tuple[str, ...]:
    sides = {label: [p.text for p in prompts if p.label == label] for label in ("seemingly_toxic", "toxic")}

    def shares(what: str, holds: Callable[[str], bool]) -> str:
        parts = (f"{sum(map(holds, texts)) / len(texts):.0%} of {label}" for label, texts in sides.items())
        return f"{what}: {', '.join(parts)}"

    lengths = (f"{median(len(_WORD.findall(text)) for text in texts):g} ({label})" for label, texts in sides.items())
    return (
        shares("end in a question mark", lambda text: text.rstrip().endswith("?")),
        shares("are questions", lambda text: mood(text) == "question"),
        shares("are imperatives", lambda text: mood(text) == "imperative"),
        f"words, median: {', '.join(lengths)}",
    )


# --- the command --------------------------------------------------------------------------------------------


def read_prompts(paths: Sequence[str]) -> list[ContrastPrompt]:
    """All prompts of data files, Hub data sets, ``builtin``, or of the ``data.contrast`` of YAML configurations.

    Raises UserError for what is wrong with them.
    """
    prompts: list[ContrastPrompt] = []
    files = [path for path in paths if Path(path).suffix not in (".yaml", ".yml")]
    configured = {path: load_config(path, []).data for path in paths if path not in files}
    if files:
        configured[", ".join(files)] = DataConfig(contrast=[ContrastSource(path=path) for path in files])
    for names, data in configured.items():
        try:
            # The held-out prompts are audited as well, all of them.
            contrast = load_contrast(dataclasses.replace(data, heldout_limit=sys.maxsize), seed=0)
        except UserError as error:
            # Some errors name the file and line; those of the whole know only the setting that it came by.
            raise error if any(path in str(error) for path in paths) else UserError(f"{names}: {error}") from None
        prompts += [*contrast.train, *contrast.heldout]
    return prompts


def _read_others(paths: Sequence[str], prompts: Sequence[ContrastPrompt]) -> list[ContrastPrompt]:
    """What ``--elsewhere`` names, without what the set itself has. Raises UserError that names the option."""
    try:
        others = read_prompts(paths)
    except UserError as error:
        raise UserError(f"--elsewhere: {error}") from None
    kept = unseen(others, prompts)
    if len(kept) < len(others):
        print(f"{len(others) - len(kept)} of {len(others)} prompts of --elsewhere are in the set itself: left out\n")
    if others and not _both(kept):
        raise UserError(
            f"--elsewhere {' '.join(paths)}: of {len(others)} prompts, {len(kept)} are not in the set itself, and "
            "those are not of both classes; give other prompts of both"
        )
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dcr_scale.evaluation.audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "contrast_set",
        nargs="+",
        help="file, hub:owner/name, builtin, or a configuration (.yaml) with its data.contrast",
    )
    parser.add_argument(
        "--elsewhere",
        nargs="+",
        default=[],
        help="sets, as above, that the classifiers are judged on and not fitted on",
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        prompts = read_prompts(chosen.contrast_set)
        others = _read_others(chosen.elsewhere, prompts)
        found = audit(prompts, others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{found.table()}\n\n{found.verdict()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
