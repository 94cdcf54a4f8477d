"""Ranks without a shared file system: every disk gets the checkpoint that one rank alone would write."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_pool import RankPool
from test_export import contents, lora_model, trunk_of
from test_tensor_map import LAYOUTS, rewrite
from toy_checkpoints import open_toy, partition, save_toy, world_of
from transformers import AutoModelForCausalLM

from dcr_scale.errors import UserError
from dcr_scale.models import disk, phases
from dcr_scale.models import tensor_map as tensor_map_module
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.lora import lora_deltas


def export_on_ranks(
    source: str, root: str, disks: list[int], kind: str, full: int | None = None
) -> tuple[str | None, list[str], int]:
    """On each rank: export to the disk it has, which is a folder here; a UserError's message, what was logged, and the
    most bytes that were sent at once. The disk of rank ``full`` is full after a few writes."""
    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    model, deltas = None, None
    if kind == "lora":
        base, wrapped = lora_model(Path(source))
        deltas = lora_deltas(wrapped)
        changed = {name: parameter for name, parameter in base.items() if parameter in deltas}
    else:
        model = AutoModelForCausalLM.from_pretrained(source)
        changed = trunk_of(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in changed.values():
                parameter.copy_(torch.randn_like(parameter))
    if world.size > 1 and kind != "whole":
        for parameter in changed.values():
            partition(parameter, world.rank, world.size)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dcr_scale.models.export")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    waiting, phases._VISIBLE_SECONDS = phases._VISIBLE_SECONDS, 0.5
    chunk, disk.CHUNK_BYTES = disk.CHUNK_BYTES, 1024
    sent: list[int] = [0]
    send = torch.distributed.send

    def counting_send(values: torch.Tensor, to: int) -> None:
        sent.append(values.numel())
        send(values, to)

    torch.distributed.send = counting_send
    writes = 0

    def full_disk(*arguments) -> int:
        nonlocal writes
        writes += 1
        if writes > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(*arguments)

    if world.rank == full:
        disk.os = SimpleNamespace(**{**vars(os), "pwrite": full_disk})
    checkpoint, tensor_map = open_toy(Path(source))
    destination = Path(root) / f"disk_{disks[world.rank]}" / "out"
    try:
        export_checkpoint(destination, checkpoint, tensor_map, changed, deltas=deltas, world=world)
    except UserError as error:
        return str(error), logged, max(sent)
    finally:
        torch.distributed.send, disk.os, disk.CHUNK_BYTES = send, os, chunk
        phases._VISIBLE_SECONDS = waiting
        logger.removeHandler(handler)
        logger.setLevel(level)
    return None, logged, max(sent)


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "parts"), ("mixtral", "parts"), ("llama", "whole"), ("qwen3-moe", "lora")]
)
@pytest.mark.parametrize("disks", [[0, 1], [0, 0, 1, 1], [0, 1, 0]], ids=str)
def test_every_disk_holds_what_one_rank_writes(
    tmp_path: Path, ranks: RankPool, architecture: str, kind: str, disks: list[int]
) -> None:
    source = tmp_path / "source"
    save_toy(source, architecture, sharded=True)
    ranks.run(export_on_ranks, str(source), str(tmp_path / "one"), [0], kind, world_size=1)
    results = ranks.run(export_on_ranks, str(source), str(tmp_path), disks, kind, world_size=len(disks))
    expected = contents(tmp_path / "one" / "disk_0" / "out")
    assert "manifest.json" in expected
    for number in set(disks):
        assert contents(tmp_path / f"disk_{number}" / "out") == expected
        assert [path.name for path in (tmp_path / f"disk_{number}").iterdir()] == ["out"]
    for message, logged, most in results:
        assert message is None
        assert any("ranks share no disk there" in line for line in logged)
        assert most <= 1024, "a block at a time, never a tensor"


def test_one_disk_is_written_to_by_all_and_nothing_is_sent(tmp_path: Path, ranks: RankPool) -> None:
    save_toy(tmp_path / "source", "llama")
    results = ranks.run(export_on_ranks, str(tmp_path / "source"), str(tmp_path), [0] * 4, "parts", world_size=4)
    assert results == [(None, [], 0)] * 4


@pytest.mark.parametrize("full", [0, 1])
def test_one_full_disk_ends_all_and_leaves_nothing(tmp_path: Path, ranks: RankPool, full: int) -> None:
    save_toy(tmp_path / "source", "llama")
    results = ranks.run(export_on_ranks, str(tmp_path / "source"), str(tmp_path), [0, 1], "parts", full, world_size=2)
    messages = [message for message, _, _ in results]
    assert messages[0] == messages[1]
    assert "No space left on device" in str(messages[0])
    assert [list((tmp_path / f"disk_{number}").iterdir()) for number in (0, 1)] == [[], []]


def export_transposed(source: str, root: str) -> None:
    """On each rank, a disk of its own: a checkpoint whose layout cannot be followed range by range."""
    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    _, converter = LAYOUTS["transposed"]
    kept = tensor_map_module.get_model_conversion_mapping, tensor_map_module._SMALL, phases._VISIBLE_SECONDS
    tensor_map_module.get_model_conversion_mapping = lambda model: [converter]
    tensor_map_module._SMALL, phases._VISIBLE_SECONDS = 0, 0.5
    try:
        checkpoint, tensor_map = open_toy(Path(source))
        assert tensor_map.scattered
        torch.manual_seed(0)
        name = next(iter(tensor_map.scattered))
        changed = {name: torch.nn.Parameter(torch.randn(24, 40))}
        destination = Path(root) / f"disk_{world.rank}" / "out"
        export_checkpoint(destination, checkpoint, tensor_map, changed, world=world)
    finally:
        tensor_map_module.get_model_conversion_mapping, tensor_map_module._SMALL, phases._VISIBLE_SECONDS = kept


def test_scattered_parameters_reach_every_disk(tmp_path: Path, ranks: RankPool) -> None:
    save_toy(tmp_path / "source", "llama")
    rewrite(tmp_path / "source", LAYOUTS["transposed"][0])
    ranks.run(export_transposed, str(tmp_path / "source"), str(tmp_path / "one"), world_size=1)
    ranks.run(export_transposed, str(tmp_path / "source"), str(tmp_path), world_size=2)
    first = contents(tmp_path / "disk_0" / "out")
    assert first == contents(tmp_path / "disk_1" / "out") == contents(tmp_path / "one" / "disk_0" / "out")
    assert first["model.safetensors"] != (tmp_path / "source" / "model.safetensors").read_bytes()
