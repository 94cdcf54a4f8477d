"""Kernel similarity of held-out matched pairs before, between and after the stages.

A run's own probe follows a dozen pairs, step by step. What the study claims rests on more of them, measured at three
moments: of the built-in set and the other paired sources it takes one pair from every family that no training prompt is
of, those beyond a source's limit among them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from dcr_scale.config import DataConfig, ProbeConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import ContrastPrompt, load_contrast
from dcr_scale.data.splitting import draw
from dcr_scale.evaluation.identity import digest, weights_digest
from dcr_scale.models.cache import build_once
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.probe import KernelProbe

# A seemingly toxic prompt and its matched toxic one.
MatchedPair = tuple[ContrastPrompt, ContrastPrompt]

_FILE = "similarities.json"


def heldout_pairs(data: DataConfig, seed: int, count: int) -> list[MatchedPair]:
    """At most ``count`` matched pairs, each of a family of its own of which a run with this seed trains on nothing."""
    trained = {prompt.family for prompt in load_contrast(data, seed).train}
    sources = [dataclasses.replace(source, limit=None) for source in data.contrast]
    whole = load_contrast(dataclasses.replace(data, contrast=sources), seed)
    sides: dict[str, dict[str, ContrastPrompt]] = {}
    for prompt in (*whole.train, *whole.heldout):
        if prompt.pair is not None and prompt.family not in trained:
            sides.setdefault(prompt.pair, {})[prompt.label] = prompt
    one_a_family = {
        pair["toxic"].family: (pair["seemingly_toxic"], pair["toxic"]) for pair in sides.values() if len(pair) == 2
    }
    return draw(list(one_a_family.values()), count, lambda pair: pair[0].family, seed=seed, purpose="kernel")


def at_moments(
    moments: Mapping[str, Path],
    load: Callable[[Path], tuple[PreTrainedModel, ChatEncoder]],
    pairs: Sequence[MatchedPair],
    settings: ProbeConfig,
    work: Path,
) -> dict[str, list]:
    """Of the checkpoint of each moment, ‖K(x', x)‖_F / ‖K(x', x')‖_F of each pair (x' the seemingly toxic prompt); None
    where the estimate of the latter is not positive. ``families``: what tells the pairs' families apart from one seed
    to another, without their names.

    Output probes and projections are the same at all moments. One that several cells share is measured once: ``work``
    keeps it.
    """
    found: dict[str, list] = {"families": [digest(seemingly.family.encode())[:8] for seemingly, _ in pairs]}
    texts = [[prompt.text for prompt in pair] for pair in pairs]
    for moment, folder in moments.items():
        asked = [weights_digest(Checkpoint.open(folder)), dataclasses.asdict(settings), texts]

        def build(partial: Path, folder: Path = folder) -> None:
            measured = _similarities(*load(folder), pairs, settings)
            (partial / _FILE).write_text(json.dumps(measured), encoding="utf-8")

        built = build_once(work / digest(json.dumps(asked).encode())[:16], build)
        found[moment] = json.loads((built / _FILE).read_text(encoding="utf-8"))
    return found


def _similarities(
    model: PreTrainedModel, encoder: ChatEncoder, pairs: Sequence[MatchedPair], settings: ProbeConfig
) -> list[float | None]:
    probe = KernelProbe.configured(model, settings)
    observed, trained = ([encoder.encode(pair[side].text) for pair in pairs] for side in (0, 1))
    found = probe.measure(observed, trained).normalized.diagonal()
    return [None if math.isnan(value) else round(value, 4) for value in found.tolist()]
