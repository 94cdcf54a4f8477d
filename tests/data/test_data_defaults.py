"""What a run gets that names no data: built-in sets that fit each other."""

from __future__ import annotations

from dcr_scale.config import DataConfig
from dcr_scale.data.contrast import load_contrast
from dcr_scale.data.instructions import MixturePools, build_mixture, load_general, load_refusals
from dcr_scale.data.leakage import check_leakage
from dcr_scale.data.sampler import ContrastSampler


def test_the_built_in_sets_load_without_overlap_and_mix() -> None:
    data = DataConfig()
    refusals = load_refusals(data, seed=0)
    check_leakage(load_contrast(data, seed=0), refusals)
    pools = MixturePools(load_general(data, seed=0).train, refusals.train, refusal_share=0.05)
    mixture = build_mixture(pools, examples=None, seed=0)
    assert len(mixture) >= 300


def test_built_in_pairs_survive_the_split_so_that_batches_are_matched() -> None:
    contrast = load_contrast(DataConfig(), seed=0)
    for side in (contrast.train, contrast.heldout):
        sampler = ContrastSampler(side, batch_size=32, toxic_share=0.5, sampling="matched", seed=0)
        assert sampler.matched
