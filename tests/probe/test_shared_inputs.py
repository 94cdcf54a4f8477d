"""Linears that read one tensor are entered together from the second pass on, and by themselves where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcr_scale.probe.shared_inputs import SharedInputs
from dcr_scale.probe.units import Unit

QUERY, KEY, DOWN = (
    Unit(name, "linear", 0, nn.Identity(), nn.Parameter(torch.zeros(2, 2)), (2, 2)) for name in ("q", "k", "down")
)


class Recorder:
    """Keeps a unit's name with its input, and which units came together."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def enter(self, units: Any, inputs_MD: Tensor, routing: None) -> list[Tensor]:
        self.calls.append([unit.name for unit in units])
        return [inputs_MD + ord(unit.name[0]) for unit in units]


def one_pass(shared: SharedInputs, sink: Recorder, *inputs: tuple[Unit, Tensor]) -> None:
    last: Tensor | None = None
    for unit, x in inputs:
        kept, is_first = shared.enter(sink, unit, x)
        assert torch.equal(kept, x.view(-1, 2) + ord(unit.name[0]))
        assert is_first == (x is not last)
        last = x
    shared.forget()


def test_what_reads_one_tensor_is_entered_together_once_that_is_known():
    shared, sink = SharedInputs(), Recorder()
    for _ in range(3):
        x, inner = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
        one_pass(shared, sink, (QUERY, x), (KEY, x), (DOWN, inner))
    assert sink.calls == [["q"], ["k"], ["down"], *[["q", "k"], ["down"]] * 2]


@pytest.mark.parametrize("change", ["another", "in place"])
def test_a_pass_in_which_they_read_different_values_is_right_too(change):
    shared, sink = SharedInputs(), Recorder()
    x = torch.randn(3, 2)
    one_pass(shared, sink, (QUERY, x), (KEY, x))
    assert torch.equal(shared.enter(sink, QUERY, x)[0], x + ord("q"))
    y = torch.randn(3, 2) if change == "another" else x.mul_(2)
    kept, is_first = shared.enter(sink, KEY, y)
    assert torch.equal(kept, y + ord("k")) and is_first
    assert sink.calls[2:] == [["q", "k"], ["k"]]
