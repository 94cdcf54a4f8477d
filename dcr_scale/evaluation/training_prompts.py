"""The prompts that a run was trained on, found again from its folder, for the contamination guard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcr_scale.config import Config, load_config
from dcr_scale.errors import UserError
from dcr_scale.run_data import load_data

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedOn:
    """A run's configuration, and the texts of each set that it saw, by the set's name; None where they are unknown."""

    run: Config | None
    prompts: Mapping[str, list[str]] | None


UNKNOWN = TrainedOn(None, None)


def trained_on(given: str | None, model: Path) -> TrainedOn:
    """What the run ``given`` saw, or else the run in whose folder the model lies.

    Raises UserError where a given folder is no run's, or its sources cannot be read any more. Where none was given, the
    console says that nothing is known.
    """
    folder = Path(given) if given is not None else model.resolve().parent
    path = folder / "config.yaml"
    if not path.is_file():
        if given is not None:
            raise UserError(f"--run {given}: no config.yaml there; give a run's folder, such as runs/<name>")
        log.info("no run is known of this model, so its training prompts are not looked for in the suites: give --run")
        return UNKNOWN
    try:
        run = load_config(path, [])
        prompts = training_prompts(run)
    except UserError as error:
        if given is not None:
            raise UserError(f"--run {given}: {error}") from None
        log.warning("%s: training prompts are not looked for in the suites: %s", path, error)
        return UNKNOWN
    log.info("training prompts of the run in %s are looked for in the suites", folder)
    return TrainedOn(run, prompts)


def training_prompts(run: Config) -> Mapping[str, list[str]]:
    """Texts of each set that the run saw, by the set's name: ``data.contrast``, ``data.general``, ``data.refusals``,
    ``data.answered``, among them those that the model was to answer itself.

    Held-out contrast prompts are among them: they choose when stage 1 stops. Paths are read from where this is started.
    Raises UserError where a source cannot be read any more.
    """
    data = load_data(run)
    found: dict[str, list[str]] = {}
    if run.refine is not None or (run.align is not None and run.align.rehearsal.weight):
        found["data.contrast"] = [prompt.text for prompt in (*data.contrast.train, *data.contrast.heldout)]
    if run.refine is not None and run.refine.retention.weight:
        retained = data.general.train[: run.refine.retention.prompts]
        found["data.general"] = [instruction.prompt for instruction in retained]
    answered = {source.path for source in run.data.answered} - {source.path for source in run.data.general}
    for one in data.mixture:
        if one.response:
            name = "refusals" if one.refusal else "answered" if one.source in answered else "general"
            found.setdefault(f"data.{name}", []).append(one.prompt)
    # Which of them the model answered, and so was trained on, the configuration does not say.
    if data.asked:
        found.setdefault("data.answered", []).extend(instruction.prompt for instruction in data.asked)
    return found
