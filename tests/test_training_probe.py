"""The probe through training: what it leaves, and that the training it watches does not notice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_pool import RankPool
from test_run import STEP_FIELDS, bytes_of, read_metrics
from test_world_size import run_on_ranks
from toy import toy_checkpoint, toy_settings, toy_tokenizer, write_config

from dcr_scale import pipeline
from dcr_scale.config import ProbeConfig, load_config
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import ContrastPrompt, EncodedPrompts
from dcr_scale.errors import UserError
from dcr_scale.training_probe import TrainingProbe, choose_pairs, jackknife, mean_similarity
from dcr_scale.world import World

KINDS = ["within_seemingly_toxic", "within_toxic", "cross", "general"]
CLASSES = ["seemingly_toxic", "toxic", "general"]
CURVES = [f"refusal_probability/{label}" for label in CLASSES]
CURVES += [f"{name}/{kind}" for kind in KINDS for name in ("kernel", "kernel_norm")]


def probed_settings(folder: Path) -> dict:
    """Both stages in a few steps, all weights trained in the first and adapters in the second; every draw of randomness
    that training can have is switched on: dropout in attention and in the adapters."""
    source = toy_checkpoint(folder / "model", "llama")
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**described, "attention_dropout": 0.1}), encoding="utf-8")
    settings = toy_settings(folder, source)
    settings["look"]["enabled"] = False
    settings["refine"].update(steps=3)
    lora = {"dropout": 0.2, "targets": ["q_proj", "down_proj"]}
    settings["align"].update(method="lora", lora=lora, examples=8, micro_batch_tokens=160)
    settings["probe"] = {"pairs": 3, "prompts": 3, "rank": 8, "groups": 3, "output_probes": 4}
    return settings


def training_rows(run: Path) -> list[dict]:
    rows = [row for row in read_metrics(run) if not row["stage"].endswith("/probe")]
    return [{key: value for key, value in row.items() if key in STEP_FIELDS - CLOCKS} for row in rows]


CLOCKS = {"tokens_per_second", "memory_gib"}


def check_curves(run: Path, stages: dict[str, list[int]]) -> None:
    """Rows at the steps of each stage, every curve with its error; the summary's first and last are theirs."""
    rows = read_metrics(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))["probe"]
    for stage, steps in stages.items():
        own = [row for row in rows if row["stage"] == f"{stage}/probe"]
        assert [row["step"] for row in own] == steps
        assert all(row.keys() == {"stage", "step", *CURVES, *(f"{key}_stderr" for key in CURVES)} for row in own)
        assert all(0 <= row[f"refusal_probability/{label}"] <= 1 for row in own for label in CLASSES)
        for end, row in (("first", own[0]), ("last", own[-1])):
            assert summary[stage][end]["step"] == row["step"]
            assert summary[stage][end] == pytest.approx({key: row[key] for key in summary[stage][end]}, rel=1e-5)
        # Training moves both.
        assert own[0]["kernel/cross"] != own[-1]["kernel/cross"]
        assert own[0]["refusal_probability/toxic"] != own[-1]["refusal_probability/toxic"]
    assert summary["pairs"] == dict.fromkeys(KINDS, 3) and summary["prompts"] == dict.fromkeys(CLASSES, 3)


def check_joint(run: Path) -> None:
    """Stage 2 begins where stage 1 ended: the trunk's weights had reached the whole model, and adapters count for
    nothing yet."""
    rows = read_metrics(run)
    ended = [row for row in rows if row["stage"] == "refine/probe"][-1]
    began = next(row for row in rows if row["stage"] == "align/probe")
    assert {key: began[key] for key in CURVES} == pytest.approx({key: ended[key] for key in CURVES}, rel=1e-3)


def test_alone_a_run_with_the_probe_trains_the_same_weights(tmp_path: Path, alone: None) -> None:
    config = write_config(tmp_path, probed_settings(tmp_path))
    for name, override in (("plain", "probe.every=0"), ("probed", "probe.every=2")):
        pipeline.run(load_config(config, [f"run.dir={tmp_path / name}", override]))
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    for stage in ("refined", "aligned"):
        assert bytes_of(plain / stage) == bytes_of(probed / stage)
    assert training_rows(plain) == training_rows(probed)
    assert not any(row["stage"].endswith("/probe") for row in read_metrics(plain))
    check_curves(probed, {"refine": [0, 2, 3], "align": [0, 2]})
    check_joint(probed)


@pytest.mark.slow
def test_on_two_ranks_a_run_with_the_probe_trains_the_same_weights(tmp_path: Path, ranks: RankPool) -> None:
    """Under ZeRO-3, activations recomputed; parameters small enough are kept whole, the others are gathered."""
    settings = probed_settings(tmp_path)
    settings["model"]["gradient_checkpointing"] = True
    settings["engine"]["persistence_threshold"] = 100
    config = str(write_config(tmp_path, settings))
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    for run, override in ((plain, "probe.every=null"), (probed, "probe.every=2")):
        ranks.run(run_on_ranks, config, str(run), override, world_size=2, timeout=600.0)
    for stage in ("refined", "aligned"):
        assert bytes_of(plain / stage) == bytes_of(probed / stage)
    assert training_rows(plain) == training_rows(probed)
    check_curves(probed, {"refine": [0, 2, 3], "align": [0, 2]})
    check_joint(probed)


def test_an_odd_rank_of_a_single_group_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match=r"^None: probe\.rank=5 must be even where"):
        load_config(None, ["probe.rank=5", "probe.groups=1"])


def test_where_ranks_are_many_each_has_a_prompt() -> None:
    """Further held-out prompts are measured and no pair's; the pairs are those of few ranks."""
    general = [[20], [21], [22], [23]]

    def chosen(ranks: int) -> TrainingProbe:
        world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device("cpu"))
        settings = ProbeConfig(every=1, pairs=2, prompts=2)
        return TrainingProbe(settings, ChatEncoder(toy_tokenizer()), prompts(True), general, world)

    few, many = chosen(1), chosen(14)
    assert len(few.sequences) == 6 and len(set(many.sequences)) == 14
    assert many.sequences[:6] == few.sequences
    assert (many.pairs, many.asked) == (few.pairs, few.asked)
    assert len(many.described) == 14


def test_fewer_prompts_than_ranks_are_refused() -> None:
    world = World(rank=0, size=16, local_rank=0, local_size=16, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"^the probe has 14 held-out prompts, too few for 16 ranks"):
        TrainingProbe(
            ProbeConfig(every=1), ChatEncoder(toy_tokenizer()), prompts(True), [[20], [21], [22], [23]], world
        )


# --- which pairs ---------------------------------------------------------------------------------------------------


def prompts(pairs: bool) -> EncodedPrompts:
    """Families a and b of two pairs each, c of one; a prompt's only token tells it apart."""
    made = []
    for number, family in enumerate("aabbc"):
        for label in ("seemingly_toxic", "toxic"):
            pair = f"{number}" if pairs else None
            made.append(ContrastPrompt(f"{label} {number}", label, family, pair, source="test"))
    return EncodedPrompts(tuple(made), tuple([token] for token in range(len(made))))


@pytest.mark.parametrize("matched", [True, False])
def test_pairs_are_of_as_many_families_as_there_are(matched: bool) -> None:
    pairs = choose_pairs(prompts(matched), [[20], [21], [22], [23]], 3)
    # Seemingly toxic prompts have even numbers, their partners the next: families a, b and c begin at 0, 4 and 8.
    assert pairs["cross"] == [((0,), (1,)), ((4,), (5,)), ((8,), (9,))]
    assert pairs["within_seemingly_toxic"] == [((0,), (4,)), ((4,), (8,)), ((8,), (0,))]
    assert pairs["within_toxic"] == [((1,), (5,)), ((5,), (9,)), ((9,), (1,))]
    assert pairs["general"] == [((20,), (1,)), ((21,), (5,)), ((22,), (9,))]


def test_a_kind_without_pairs_is_left_out() -> None:
    both = prompts(True)
    alone = EncodedPrompts(both.prompts[:2], both.ids[:2])
    assert choose_pairs(alone, [[20]], 3) == {"cross": [((0,), (1,))], "general": [((20,), (1,))]}


# --- means ---------------------------------------------------------------------------------------------------------


def similarity(squared: torch.Tensor, deviations: torch.Tensor) -> SimpleNamespace:
    """What is read of a measurement of prompts against one another."""
    own = deviations.diagonal(dim1=1, dim2=2)
    return SimpleNamespace(squared=squared, deviations=deviations, self_squared=squared.diagonal(), self_deviations=own)


def test_squares_are_averaged_before_the_root_and_pairs_without_an_own_square_are_left_out() -> None:
    squared = torch.tensor([[4.0, -1.0, 9.0], [2.0, 16.0, 3.0], [5.0, 5.0, -1.0]], dtype=torch.float64)
    found = similarity(squared, torch.zeros(2, 3, 3, dtype=torch.float64))
    means = mean_similarity(found, torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0]))
    assert means["kernel"][0] == pytest.approx(-math.sqrt((1 / 4 - 2 / 16) / 2))
    assert means["kernel_norm"][0] == pytest.approx(math.sqrt((-1 + 2 + 5) / 3))
    assert all(math.isnan(value) for value in mean_similarity(found, torch.tensor([2]), torch.tensor([0]))["kernel"])


def test_errors_that_prompts_share_cancel_in_the_ratio_and_add_up_in_the_norm() -> None:
    """Every estimate off by the same factor: no error of the ratio. All pairs alike: no error over pairs."""
    squared = torch.full((3, 3), 2.0, dtype=torch.float64) + 6 * torch.eye(3, dtype=torch.float64)
    found = similarity(squared, torch.stack([0.1 * squared, torch.zeros_like(squared)]))
    means = mean_similarity(found, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]))
    assert means["kernel"] == pytest.approx((0.5, 0.0), abs=1e-9)
    # d√s = ds / (2 √s)
    assert means["kernel_norm"] == pytest.approx((math.sqrt(2), 0.2 / (2 * math.sqrt(2))))


def test_the_jackknife_of_a_mean_is_its_textbook_error() -> None:
    sample = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = jackknife(lambda x: x.mean(), sample)
    assert mean == pytest.approx(float(sample.mean()))
    assert error == pytest.approx(float(sample.std()) / math.sqrt(7))
