"""The prompts that a run was trained on, found again from its folder, for the contamination guard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from dcr_scale.config import Config, load_config
from dcr_scale.errors import UserError
from dcr_scale.pipeline import load_data

log = logging.getLogger(__name__)


def find_run(given: str | None, model: Path) -> Config | None:
    """The configuration of the run ``given``, or of the folder above the model where that is a run's.

    Raises UserError where a given folder is no run's; None, and a word on the console, where there is none to find.
    """
    folder = Path(given) if given is not None else model.resolve().parent
    path = folder / "config.yaml"
    if path.is_file():
        log.info("the model's run: %s", folder)
        return load_config(path, [])
    if given is not None:
        raise UserError(f"--run {given}: no config.yaml there; give a run's folder, such as runs/<name>")
    log.info("no run is known of this model, so suites are not checked for prompts that it was trained on: give --run")
    return None


def training_prompts(run: Config) -> Mapping[str, list[str]]:
    """Texts of each set that the run saw, by the set's name: ``data.contrast``, ``data.general``, ``data.refusals``.

    Held-out contrast prompts are among them: they choose when stage 1 stops. Raises UserError where a source of the run
    cannot be read any more.
    """
    try:
        data = load_data(run)
    except UserError as error:
        raise UserError(
            f"the run's training prompts cannot be read again: {error}; start this where the run was started, or give "
            "--run another folder"
        ) from None
    found: dict[str, list[str]] = {}
    if run.refine is not None:
        found["data.contrast"] = [prompt.text for prompt in (*data.contrast.train, *data.contrast.heldout)]
        if run.refine.retention.weight:
            retained = data.general.train[: run.refine.retention.prompts]
            found["data.general"] = [instruction.prompt for instruction in retained]
    for name, refusal in (("data.general", False), ("data.refusals", True)):
        if mixed := [instruction.prompt for instruction in data.mixture if instruction.refusal == refusal]:
            found[name] = [*found.get(name, []), *mixed]
    return found
