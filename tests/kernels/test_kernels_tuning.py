"""Tuning: every rank ends with rank 0's choice, and a cached choice is not measured again."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from dcr_kernels import configs, tuning

CPU = torch.device("cpu")
SHAPE = "4 bytes, ieee"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(configs, "_tuned", {})


def favourite_of_this_rank() -> float:
    """Rank 0 finds narrow tiles fast, every other rank wide ones."""
    block = configs.config("statistics", SHAPE, "sm_90")["BLOCK_N"]
    return float(block if dist.get_rank() == 0 else -block)


def tune_on_rank() -> dict[str, int]:
    chosen = tuning.tune(
        "statistics", favourite_of_this_rank, dtype=torch.float32, device=CPU, n_rows=4096, group=dist.group.WORLD
    )
    assert configs.config("statistics", SHAPE, "sm_90") == chosen
    configs._tuned.clear()
    return chosen


def test_ranks_use_what_rank_0_measured(ranks):
    first, second = ranks.run(tune_on_rank, world_size=2)
    assert first == second
    assert first["BLOCK_N"] == configs.config("statistics", SHAPE, "sm_90")["BLOCK_N"] // 2


def test_cache_spares_the_measurement(tmp_path):
    cache, calls = tmp_path / "tuned.json", []

    def measure() -> float:
        calls.append(1)
        return -float(configs.config("on_chip", SHAPE, "sm_90")["BLOCK_M"])

    chosen = tuning.tune("on_chip", measure, dtype=torch.float32, device=CPU, cache=cache)
    assert json.loads(cache.read_text()) == {"sm_90": {"on_chip": {SHAPE: chosen}}}
    assert len(calls) > 1
    calls.clear()
    configs._tuned.clear()
    assert tuning.tune("on_chip", measure, dtype=torch.float32, device=CPU, cache=cache) == chosen
    assert not calls


def test_a_cache_gives_one_entry_and_keeps_the_others(tmp_path):
    cache = tmp_path / "tuned.json"
    table = configs.config("on_chip", SHAPE, "sm_90")
    other = {**configs.config("strip", SHAPE, "sm_90"), "num_warps": 1}
    cache.write_text(json.dumps({"sm_90": {"on_chip": {SHAPE: table}, "strip": {SHAPE: other}}}))

    def measured() -> float:
        raise AssertionError("measured again")

    # The table's own entry may have won: it is in the cache all the same.
    assert tuning.tune("on_chip", measured, dtype=torch.float32, device=CPU, cache=cache) == table
    assert configs.config("strip", SHAPE, "sm_90") != other
    tuning.tune("pool_forward", lambda: 1.0, dtype=torch.bfloat16, device=CPU, cache=cache)
    kept = json.loads(cache.read_text())["sm_90"]
    assert sorted(kept) == ["on_chip", "pool_forward", "strip"]
    assert kept["strip"] == {SHAPE: other}


def test_float32_products_without_tensor_cores_have_their_own_tiles():
    assert configs.shape_class("statistics", torch.float32, 512) == "4 bytes, ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert configs.shape_class("statistics", torch.float32, 512) == "4 bytes, few rows"
        assert configs.shape_class("statistics", torch.float32, 4096) == "4 bytes"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert configs.shape_class("statistics", torch.bfloat16, 512) == "2 bytes, few rows"
    assert configs.shape_class("on_chip", torch.bfloat16, 512) == configs.shape_class("pool_forward", torch.float16)


def test_candidates_that_cannot_run_are_passed_over():
    table = configs.config("segment_outer", "4 bytes", "sm_90")

    def measure() -> float:
        if configs.config("segment_outer", "4 bytes", "sm_90") != table:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    assert tuning.tune("segment_outer", measure, dtype=torch.float32, device=CPU) == table


def test_a_configuration_with_other_settings_is_refused():
    with pytest.raises(ValueError, match=r"on_chip \(4 bytes, ieee\) has \['BLOCK_X'\]"):
        configs.install("sm_90", "on_chip", SHAPE, {"BLOCK_X": 1})
