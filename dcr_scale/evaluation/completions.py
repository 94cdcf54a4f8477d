"""A model's completions on disk: a JSONL file a suite, written as they come, so that an evaluation can go on.

Each rank appends to a part of its own, synced to the disk batch by batch; the next start, on however many ranks, and
the end put the parts together. A folder belongs to one model and one way of asking it.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr_scale.command_line import written
from dcr_scale.errors import UserError
from dcr_scale.evaluation import judge
from dcr_scale.evaluation.openings import refuses
from dcr_scale.evaluation.suites import SuitePrompt
from dcr_scale.world import World

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Answer:
    """One prompt with what the model said, and what each metric makes of it.

    ``finished``: the model ended the answer itself. ``label`` and ``refusal_probability`` are the judge's,
    ``opening_refuses`` is the string list's verdict.
    """

    prompt: SuitePrompt
    completion: str
    finished: bool
    label: judge.Label
    refusal_probability: float
    opening_refuses: bool

    @property
    def refused(self) -> bool:
        """In full or in part, at probability .5: what rates count."""
        return self.refusal_probability >= 0.5

    @property
    def complied(self) -> bool:
        """Neither refused nor degenerate."""
        return not self.refused and self.label != "degenerate"

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.prompt.id,
            "class": self.prompt.of_class,
            "category": self.prompt.category,
            "prompt": self.prompt.text,
            "completion": self.completion,
            "finished": self.finished,
            "label": self.label,
            "refusal_probability": round(self.refusal_probability, 4),
            "opening_refuses": self.opening_refuses,
        }


def spoken(completion: str, thinks: bool = False) -> str:
    """What a completion says behind its thought; nothing where the thought has no end.

    ``thinks``: the prompt ends with a thought's beginning, which the completion then goes on with.
    """
    _, end, said = completion.rpartition("</think>")
    return "" if not end and (thinks or completion.lstrip().startswith("<think>")) else said


def judged(prompt: SuitePrompt, completion: str, finished: bool, thinks: bool = False) -> Answer:
    """A completion with its verdicts, which are of what it says (:func:`spoken`). One that says nothing is
    degenerate."""
    said = spoken(completion, thinks)
    [verdict] = judge.classify([prompt.text], [said])
    return Answer(prompt, completion, finished, verdict.label, verdict.refusal_probability, refuses(said))


class CompletionStore:
    """The completions of one model in ``folder/completions/``; every rank sees the folder and makes one of these.

    ``settings`` say which model was asked and how; they are kept in ``folder/settings.json``. Raises UserError, on all
    ranks, for a folder whose settings differ, and one that cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], world: World):
        self.folder, self.world = folder / "completions", world
        self._failure: OSError | None = None
        with world.agreed(), written(folder):
            if world.first:
                self.folder.mkdir(parents=True, exist_ok=True)
                _agree_on(folder / SETTINGS_FILE, settings)

    def kept(self, suites: Mapping[str, Sequence[SuitePrompt]]) -> dict[str, tuple[str, bool]]:
        """Completion, and whether it was finished, by the prompt's id: what earlier starts have left, put together.

        Raises UserError for completions of prompts that are not these suites'.
        """
        found: dict[str, tuple[str, bool]] = {}
        with self.world.agreed(), written(self.folder):
            if self.world.first:
                for name, prompts in suites.items():
                    mine = self._put_together(name, prompts)
                    found.update({answer.prompt.id: (answer.completion, answer.finished) for answer in mine})
        return self.world.gather(found)[0]

    def append(self, answers: Sequence[Answer]) -> bool:
        """Store a batch of this rank's; False where the disk refuses, which :meth:`check` then tells all ranks."""
        by_suite: dict[str, list[Answer]] = {}
        for answer in answers:
            by_suite.setdefault(_suite_of(answer.prompt), []).append(answer)
        try:
            for name, mine in by_suite.items():
                with (self.folder / f"{name}.jsonl.part-{self.world.rank}").open("a", encoding="utf-8") as file:
                    file.write(_lines(mine))
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            self._failure = error
        return self._failure is None

    def check(self) -> None:
        """Raise UserError on every rank where any could not store a batch."""
        with self.world.agreed(), written(self.folder):
            if self._failure is not None:
                raise self._failure

    def finish(self, answers: Mapping[str, Sequence[Answer]]) -> None:
        """Write each suite's file whole, in the suite's order. Every rank calls it, with all ranks' answers."""
        with self.world.agreed(), written(self.folder):
            if self.world.first:
                for name, mine in answers.items():
                    self._replace(name, mine)

    def _put_together(self, name: str, prompts: Sequence[SuitePrompt]) -> list[Answer]:
        known = {prompt.id: prompt for prompt in prompts}
        found: dict[str, Answer] = {}
        for path in [self.folder / f"{name}.jsonl", *self._parts(name)]:
            if path.exists():
                for where, row in _rows(path):
                    answer = _answer(row, where, known)
                    # A part that was put together but not yet removed says the same again.
                    found.setdefault(answer.prompt.id, answer)
        ordered = [found[prompt.id] for prompt in prompts if prompt.id in found]
        if ordered:
            self._replace(name, ordered)
        else:
            self._drop_parts(name)  # of half a line, which the next answer would be written behind
        return ordered

    def _replace(self, name: str, answers: Sequence[Answer]) -> None:
        """Put a suite's file in place of what there was, then drop its parts."""
        target = self.folder / f"{name}.jsonl"
        partial = target.with_suffix(".jsonl.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(_lines(answers))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        self._drop_parts(name)

    def _drop_parts(self, name: str) -> None:
        for part in self._parts(name):
            part.unlink()

    def _parts(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{glob.escape(name)}.jsonl.part-*"))


def _suite_of(prompt: SuitePrompt) -> str:
    return prompt.id.rpartition("/")[0]


def _agree_on(path: Path, settings: Mapping[str, Any]) -> None:
    # Through JSON, as what they are compared with.
    wanted = json.loads(json.dumps(settings))
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove the folder, or give another by --out") from None
    different = [
        f"{key} was {json.dumps(there.get(key))} and is {json.dumps(wanted.get(key))}"
        for key in sorted({*there, *wanted})
        if there.get(key) != wanted.get(key)
    ]
    if different:
        raise UserError(
            f"{path.parent}: holds the completions of another evaluation ({'; '.join(different)}); give another folder "
            "by --out"
        )


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file with where they are; a last line that was cut short is left out."""
    # Not splitlines(): JSON strings may hold U+2028 and other separators that it would cut at.
    *lines, rest = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); remove the line to have it answered again") from None
        found.append((where, row))
    with suppress(ValueError):
        found.append((f"{path}, line {len(lines) + 1}", json.loads(rest)))
    return found


def _answer(row: Any, where: str, known: Mapping[str, SuitePrompt]) -> Answer:
    if not isinstance(row, dict) or {"id", "prompt", "completion", "finished"} - row.keys():
        raise UserError(f"{where}: no completion as this command writes them; give another folder by --out")
    prompt = known.get(row["id"])
    if prompt is None:
        raise UserError(
            f"{where}: {row['id']} is not among the suite's {len(known)} prompts; ask for the same prompts (--suite, "
            "--limit), or give another folder by --out"
        )
    if prompt.text != row["prompt"]:
        raise UserError(
            f"{where}: the completion of another prompt: {row['id']} is now that of {prompt.where}; give another "
            "folder by --out"
        )
    return judged(prompt, row["completion"], row["finished"])


def _lines(answers: Sequence[Answer]) -> str:
    return "".join(json.dumps(answer.as_dict(), ensure_ascii=False) + "\n" for answer in answers)
