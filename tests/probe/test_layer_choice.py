"""The rule that chooses ℓ: what it rewards, what it does not fall for, and that a run goes on with its choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from rank_pool import RankPool
from test_world_size import run_on_ranks
from torch import Tensor
from torch.nn.functional import normalize
from toy import contrast_rows, toy_checkpoint, toy_settings, write_config, write_jsonl
from toy_models import LAYERS, toy_model

from dcr_scale import pipeline
from dcr_scale.config import load_config
from dcr_scale.diagnosis import show_layer
from dcr_scale.errors import UserError
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.probe.activations import rows_at_depths
from dcr_scale.probe.layer_choice import choose, told_apart
from dcr_scale.world import World

FAMILIES = [f"family {i // 4}" for i in range(32)]
FAMILY_P = torch.arange(32) // 4
WIDTH = 48
DEPTHS = 5


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rows(separable_from: int) -> Tensor:
    """Unit rows [32, 2, DEPTHS, WIDTH]: sides differ at random, and from one depth on by one direction too."""
    subject, direction = noise(32, 1, DEPTHS, WIDTH), noise(WIDTH)
    both = subject.expand(-1, 2, -1, -1) + 0.1 * noise(32, 2, DEPTHS, WIDTH)
    both[:, 1, separable_from - 1 :] += direction
    return normalize(both, dim=-1)


def test_a_direction_counts_where_it_holds_for_other_families():
    torch.manual_seed(0)
    everywhere, by_family = noise(WIDTH), noise(8, WIDTH)[FAMILY_P]
    differences = torch.stack([noise(32, WIDTH), 10 * by_family, 3 * everywhere + noise(32, WIDTH)], dim=1)
    apart = told_apart(differences, FAMILY_P).mean(dim=0)
    assert apart[0] < 0.75
    # Perfectly separable within each family, and so by any split that divides families: a shortcut.
    assert apart[1] < 0.75
    assert apart[2] == 1


def test_sides_that_do_not_differ_are_not_told_apart():
    assert not told_apart(torch.zeros(32, 1, WIDTH, dtype=torch.float64), FAMILY_P).any()


def test_the_first_depth_at_which_pairs_lie_apart_leaves_most_kernel_above():
    torch.manual_seed(0)
    kernel = torch.ones(DEPTHS + 1, 8)
    choice = choose(rows(separable_from=3), kernel, FAMILIES)
    assert choice.layer == 3
    assert [depth.layer for depth in choice.depths] == list(range(1, DEPTHS + 1))
    assert choice.depths[2].above == pytest.approx(3 / 6) and choice.depths[2].kernel == pytest.approx(1 / 6)
    assert choice.depths[2].apart == 1 and choice.depths[2].score == pytest.approx(0.5)
    assert "ℓ = 3" in choice.reason and "→  3" in choice.table()


def test_separable_activations_above_which_no_kernel_lies_are_not_chosen():
    torch.manual_seed(0)
    below = torch.zeros(DEPTHS + 1, 8)
    below[:4] = 1
    assert choose(rows(separable_from=2), below, FAMILIES).layer == 2
    below[2:4] = 0
    with pytest.raises(ValueError, match="no layer tells"):
        choose(normalize(torch.ones(32, 2, DEPTHS, WIDTH), dim=-1), below, FAMILIES)
    with pytest.raises(ValueError, match="is not positive"):
        choose(rows(separable_from=2), -below, FAMILIES)


def test_a_smaller_layer_that_does_as_well_within_the_error_is_preferred():
    torch.manual_seed(0)
    both = rows(separable_from=1)
    # Two pairs are turned round at depth 1, and one of another family at all others.
    both[[0, 4], :, 0] = both[[0, 4], :, 0].flip(1)
    both[8, :, 1:] = both[8, :, 1:].flip(0)
    kernel = torch.zeros(DEPTHS + 1, 8)
    kernel[-1] = 1
    choice = choose(both, kernel, FAMILIES)
    assert [depth.apart for depth in choice.depths] == [30 / 32] + [31 / 32] * (DEPTHS - 1)
    assert choice.layer == 1
    assert "within one standard error" in choice.reason
    assert 0 < choice.depths[0].behind < choice.depths[0].stderr


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_rows_at_depths_are_the_model_s_own_hidden_states(pooling):
    model, prefix = toy_model("gemma3"), 2
    encoded = [[3, 4, 5, 6, 7], [3, 4, 8, 9, 2, 30, 4], [3, 4, 12]]
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    found = rows_at_depths(
        model, encoded, range(LAYERS), prefix=prefix, pooling=pooling, normalize=False, token_limit=8, world=world
    )
    for i, ids in enumerate(encoded):
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for depth in range(LAYERS):
            own = hidden[depth][0, prefix:]
            expected = own[-1] if pooling == "last" else own.mean(dim=0)
            torch.testing.assert_close(found[i, depth], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model"))
    # Random weights know no classes, so one word of each prompt tells them apart.
    marked = [
        {**row, "prompt": row["prompt"] + (" Revenge!" if row["label"] == "toxic" else " Fun!")}
        for row in contrast_rows()
    ]
    write_jsonl(tmp_path / "data" / "contrast.jsonl", marked)
    settings["refine"]["layer"], settings["refine"]["pooling"] = "auto", "mean"
    settings["data"]["heldout"] = 0.5
    settings["probe"] = {"pairs": 12, "output_probes": 2}
    settings["align"] = None
    return settings


def test_a_run_goes_on_with_the_number(tmp_path: Path, settings: dict, alone: None, capfd: pytest.CaptureFixture[str]):
    config = load_config(write_config(tmp_path, settings), [])
    shown = show_layer(load_config(write_config(tmp_path, settings), []))
    assert not (tmp_path / "run").exists()
    pipeline.run(config)
    console = capfd.readouterr().err
    assert shown.table() in console and shown.reason in console
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    chosen = summary["layer_choice"]["layer"]
    assert chosen == shown.layer and 1 <= chosen < LAYERS
    assert len(summary["layer_choice"]["depths"]) == LAYERS - 1
    assert summary["look"]["refined"]["layer"] == chosen
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["refine"]["layer"] == chosen
    source, refined = (Checkpoint.open(tmp_path / name) for name in ("model", "run/refined"))
    changed = {name for name in source.tensors if not torch.equal(source.read(name), refined.read(name))}
    assert {int(name.split(".")[2]) for name in changed} == set(range(chosen))


@pytest.mark.slow
def test_two_ranks_that_share_the_model_choose_as_one_does(
    tmp_path: Path, settings: dict, ranks: RankPool, alone: None
):
    path, run = str(write_config(tmp_path, settings)), tmp_path / "shared"
    overrides = ["look.partitioned=yes", "look.prompts=2", "refine.steps=1"]
    ranks.run(run_on_ranks, path, str(run), *overrides, world_size=2, timeout=300.0)
    expected = show_layer(load_config(path, []))
    found = json.loads((run / "summary.json").read_text())["layer_choice"]
    assert found["layer"] == expected.layer
    for row, depth in zip(found["depths"], expected.depths, strict=True):
        assert (row["apart"], row["kernel"]) == pytest.approx((depth.apart, depth.kernel), abs=1e-4)


def test_prompts_without_pairs_leave_the_choice_to_the_user(tmp_path: Path, settings: dict, alone: None):
    path = Path(settings["data"]["contrast"][0]["path"])
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "pair": ""}) + "\n" for row in kept))
    with pytest.raises(UserError, match=r"refine.layer=auto: .* or set refine.layer to a number"):
        show_layer(load_config(write_config(tmp_path, settings), []))
