"""Where held-out prompts lie at layer ℓ, drawn in two dimensions: principal components and cosines, no activations.

The map is kept in ``look/activations.json`` and written anew after every look, so a run that is cut short leaves one.
Nothing here draws random numbers: a run with a map trains the weights of one without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcr_scale.evaluation.suites import CLASSES

# More points of a class cover one another; more cells of a heat map are smaller than a pixel of a phone.
POINTS_A_CLASS = 150
CELLS_A_CLASS = 20


@dataclass(frozen=True)
class MappedPrompt:
    """``label`` is one of the three classes, ``source`` and ``family`` are the data's."""

    label: str
    source: str
    family: str
    text: str


class ActivationMap:
    """The same prompts at every look of one run.

    Args:
        prompts: in the order of the rows; the first 150 of a class are mapped, the first 20 have their cosines kept.
    """

    def __init__(self, path: Path, prompts: Sequence[MappedPrompt], layer: int, pooling: str):
        self.path, self.layer, self.pooling = path, layer, pooling
        self.kept = _first_of_each(prompts, POINTS_A_CLASS)
        self.prompts = [prompts[i] for i in self.kept]
        self.celled = _first_of_each(self.prompts, CELLS_A_CLASS)
        self.rows: dict[str, Tensor] = {}

    def add(self, name: str, pooled_ND: Tensor) -> None:
        """Take in a look's unit rows (float32 [N, D], in the order of the prompts) and write the map."""
        self.rows[name] = pooled_ND[self.kept].cpu()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: self.rows[name].contiguous()}, self._rows_file(name))
        self.path.write_text(json.dumps(self.as_dict(), ensure_ascii=False) + "\n", encoding="utf-8")

    def restore(self, names: Sequence[str]) -> None:
        """Take in looks that an interrupted run has left; one whose rows are gone is left out."""
        for name in names:
            if self._rows_file(name).is_file():
                self.rows.update(load_file(self._rows_file(name)))

    def _rows_file(self, name: str) -> Path:
        return self.path.with_name(f"activations-{name}.safetensors")

    def as_dict(self) -> dict[str, Any]:
        """Each look on its own two principal components, all looks on those of all rows together (``shared``), and
        the cosines; ``explained`` is the components' share of the variance."""
        toxic = torch.tensor([prompt.label == "toxic" for prompt in self.prompts])
        shared, shared_explained = principal_components(
            torch.cat(list(self.rows.values())), toxic.repeat(len(self.rows))
        )
        looks = {}
        for i, (name, rows_ND) in enumerate(self.rows.items()):
            own, explained = principal_components(rows_ND, toxic)
            cells_ND = rows_ND[self.celled]
            looks[name] = {
                "points": _rounded(own),
                "explained": explained,
                "shared": _rounded(shared[i * len(toxic) : (i + 1) * len(toxic)]),
                "cosines": _rounded(cells_ND @ cells_ND.T),
            }
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "cells": self.celled,
            "shared_explained": shared_explained,
            "looks": looks,
        }


def principal_components(rows_ND: Tensor, toxic_N: Tensor) -> tuple[Tensor, list[float]]:
    """Rows on their first two principal components (float64 [N, 2]), and each one's share of the variance.

    A component's sign is free: it is chosen so that toxic prompts lie further along it than the others.
    """
    centred_ND = rows_ND.double() - rows_ND.double().mean(0)
    # The Gram matrix of the rows: there are fewer of them than dimensions in a model of any size.
    values_N, vectors_NN = torch.linalg.eigh(centred_ND @ centred_ND.T)
    values_N = values_N.clamp(min=0)
    points_N2 = vectors_NN[:, [-1, -2]] * values_N[[-1, -2]].sqrt()
    if 0 < int(toxic_N.sum()) < len(toxic_N):
        ahead_2 = points_N2[toxic_N].mean(0) - points_N2[~toxic_N].mean(0)
        points_N2 = torch.where(ahead_2 < 0, -points_N2, points_N2)
    total = float(values_N.sum()) or 1.0
    return points_N2, [round(float(value) / total, 4) for value in values_N[[-1, -2]]]


def _first_of_each(prompts: Sequence[MappedPrompt], count: int) -> list[int]:
    """Indices of the first so many prompts of every class, class after class."""
    return [i for label in CLASSES for i in [j for j, p in enumerate(prompts) if p.label == label][:count]]


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]
