"""The map keeps prompts' places to one another, and leaves training's random numbers alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dcr_scale.evaluation.activation_map import CELLS_A_CLASS, ActivationMap, MappedPrompt, principal_components


def test_rows_in_a_plane_keep_their_distances_and_toxic_ones_lie_ahead() -> None:
    generator = torch.Generator().manual_seed(1)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q
    rows_ND = (torch.randn(30, 2, generator=generator) * torch.tensor([5.0, 1.0])) @ plane.T + 3.0
    toxic_N = rows_ND @ plane[:, 0] > (rows_ND @ plane[:, 0]).median()
    points_N2, explained = principal_components(rows_ND, toxic_N)
    torch.testing.assert_close(torch.pdist(points_N2), torch.pdist(rows_ND.double()), atol=1e-4, rtol=0)
    assert explained[0] > explained[1] > 0 and abs(sum(explained) - 1) < 1e-3
    assert (points_N2[toxic_N].mean(0) >= points_N2[~toxic_N].mean(0)).all()


def test_looks_share_axes_and_cosines_are_the_rows_own(tmp_path: Path) -> None:
    labels = ["toxic"] * 30 + ["seemingly_toxic"] * 30
    prompts = [MappedPrompt(label, "a.jsonl", "", f"prompt {i}") for i, label in enumerate(labels)]
    drawn = ActivationMap(tmp_path / "look" / "activations.json", prompts, 3, "mean")
    state = torch.get_rng_state()
    rows_ND = torch.nn.functional.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    drawn.add("before", rows_ND)
    drawn.add("after", rows_ND.flip(1))
    drawn.add("again", rows_ND)
    assert torch.equal(torch.get_rng_state(), state)
    kept = json.loads(drawn.path.read_text(encoding="utf-8"))
    assert kept["looks"]["before"]["shared"] == kept["looks"]["again"]["shared"] != kept["looks"]["after"]["shared"]
    # Seemingly toxic prompts come first, whatever their order was.
    assert [kept["prompts"][i]["text"] for i in kept["cells"]][:2] == ["prompt 30", "prompt 31"]
    assert len(kept["cells"]) == 2 * CELLS_A_CLASS
    chosen = rows_ND[[*range(30, 50), *range(20)]]
    torch.testing.assert_close(torch.tensor(kept["looks"]["before"]["cosines"]), chosen @ chosen.T, atol=1e-4, rtol=0)


def test_prompts_that_lie_on_one_spot_have_a_map() -> None:
    points_N2, explained = principal_components(torch.ones(4, 3), torch.tensor([True, False, True, False]))
    assert points_N2.abs().max() == 0 and explained == [0.0, 0.0]
