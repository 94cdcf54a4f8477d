"""The published sets that the recipe was measured with, where a checkout has them beside it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dcr_scale.config import ContrastSource, DataConfig, Source
from dcr_scale.data.contrast import load_contrast
from dcr_scale.data.instructions import MixturePools, build_mixture, load_general, load_refusals
from dcr_scale.data.leakage import check_leakage
from dcr_scale.data.sources import read_rows

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the published sets are not part of the project and not in {SHARED}"
)


def path(name: str) -> str:
    return str(SHARED / name)


def paper() -> DataConfig:
    """XSTest's safe prompts against HH-RLHF's toxic ones; Alpaca and disjoint refusals for stage 2."""
    return DataConfig(
        contrast=[
            ContrastSource(path=path("xstest_prompts.csv"), labels={"safe": "seemingly_toxic", "unsafe": None}),
            ContrastSource(path=path("stl_toxic_stage1.jsonl"), label="toxic"),
        ],
        general=[Source(path=path("alpaca.jsonl"))],
        refusals=[Source(path=path("stl_refusals_stage2.jsonl"))],
    )


def test_the_papers_contrast_set_has_its_counts() -> None:
    contrast = load_contrast(paper(), seed=0)
    for side, seemingly, toxic in ((contrast.train, 200, 400), (contrast.heldout, 50, 100)):
        counts = Counter(prompt.label for prompt in side)
        assert counts["seemingly_toxic"] == pytest.approx(seemingly, abs=2)
        assert counts["toxic"] == pytest.approx(toxic, abs=2)


def test_xstest_as_published_needs_no_configuration_and_splits_by_focus() -> None:
    source = ContrastSource(path=path("xstest_prompts.csv"))
    rows = read_rows(source, kind="contrast")
    assert Counter(row.values["label"] for row in rows) == {"seemingly_toxic": 250, "toxic": 200}
    contrast = load_contrast(DataConfig(contrast=[source]), seed=0)
    assert "kill" in {prompt.family for prompt in (*contrast.train, *contrast.heldout)}
    assert not {p.family for p in contrast.train} & {p.family for p in contrast.heldout}


def test_the_papers_stages_share_no_toxic_prompt_and_mix_at_five_per_cent() -> None:
    data = paper()
    refusals, general = load_refusals(data, seed=0), load_general(data, seed=0)
    check_leakage(load_contrast(data, seed=0), refusals)
    mixture = build_mixture(MixturePools(general.train, refusals.train, refusal_share=0.05), examples=5000, seed=0)
    assert sum(example.refusal for example in mixture) == 250


@pytest.mark.parametrize("name", ["or_bench_dev.jsonl", "coconot_dev.jsonl", "oktest_dev.jsonl", "advbench.jsonl"])
def test_benchmark_files_are_read_unconfigured(name: str) -> None:
    assert len(read_rows(ContrastSource(path=path(name)), kind="contrast")) >= 50
