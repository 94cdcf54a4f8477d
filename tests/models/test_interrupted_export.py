"""Whatever ends an export, and whenever: the old checkpoint or the new one is there, whole."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rank_pool import RankPool
from test_export import changed_model, contents, export_on_rank, trunk_of
from toy_checkpoints import open_toy, partition, save_toy, world_of

from dcr_scale.errors import UserError
from dcr_scale.models import disk, verify
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.manifest import hash_file

# Every call by which an export changes the disk.
CHANGES = ["pwrite", "copy_file_range", "rename", "fsync", "unlink", "rmdir"]


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, Path, dict[str, bytes], dict[str, bytes]]:
    """A source, an export of it that is about to be replaced, and the content of the old and the new export."""
    source, destination = tmp_path / "source", tmp_path / "runs" / "refined"
    save_toy(source, "llama", sharded=True)
    assert export_on_rank(str(source), str(tmp_path / "runs" / "new"), "llama", 0, 1) is None
    new = contents(tmp_path / "runs" / "new")
    shutil.rmtree(tmp_path / "runs" / "new")
    checkpoint, tensor_map = open_toy(source)
    export_checkpoint(destination, checkpoint, tensor_map, {}, world=world_of(), extra_files={"README.md": "Old.\n"})
    old = contents(destination)
    assert old.keys() == new.keys() and old != new
    return source, destination, old, new


def counting(change: int | None) -> tuple[SimpleNamespace, list[int]]:
    """os, whose ``change``-th call that changes the disk is the process's last, and the number of calls so far."""
    calls = [0]

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if calls[0] == change:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return function(*arguments, **named)

        return call

    return SimpleNamespace(**{**vars(os), **{name: watched(getattr(os, name)) for name in CHANGES}}), calls


def export_until(source: str, destination: str, change: int | None, swaps: bool, report: Any) -> None:
    watched, calls = counting(change)
    disk.os = shutil.os = watched  # type: ignore[attr-defined]
    if not swaps:
        disk._renameat2 = lambda: None  # type: ignore[assignment]
    message = export_on_rank(source, destination, "llama", 0, 1)
    report.send((message, calls[0]))


def run_until(source: Path, destination: Path, change: int | None, swaps: bool) -> tuple[str | None, int] | None:
    """Export in a process of its own; None where it was killed on the way."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=export_until, args=(str(source), str(destination), change, swaps, there))
    process.start()
    there.close()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return here.recv() if process.exitcode == 0 else None


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_killed_at_any_moment_the_old_or_the_new_one_is_readable(
    old_and_new: tuple[Path, Path, dict[str, bytes], dict[str, bytes]], tmp_path: Path, swaps: bool
) -> None:
    source, destination, old, new = old_and_new
    backup = tmp_path / "backup"
    shutil.copytree(destination, backup)
    finished = run_until(source, destination, None, swaps)
    assert finished is not None and finished[0] is None
    calls, seen = finished[1], set()
    # All moments around the renames, which come last, and some of the others.
    for change in sorted({*random.Random(0).sample(range(calls), 6), *range(calls - 16, calls)}):
        shutil.rmtree(destination)
        shutil.copytree(backup, destination)
        assert run_until(source, destination, change, swaps) is None
        Checkpoint.open(destination)
        found = contents(destination)
        # Renaming twice begins with the removal of nothing that matters: the old one may only be moved back.
        assert found in (old, new), f"killed at change {change} of {calls}"
        seen.add("old" if found == old else "new")
        assert not list(verify.damage(destination))
    assert seen == {"old", "new"}
    # What the dead left behind is no hindrance, and goes.
    finished = run_until(source, destination, None, swaps)
    assert finished is not None and finished[0] is None
    assert contents(destination) == new
    assert [path.name for path in destination.parent.iterdir()] == ["refined"]


def fail_on_ranks(source: str, destination: str, failing: int, after: int) -> str | None:
    """On each rank: an export in which the disk of one rank is full after so many writes."""
    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    model = changed_model(Path(source), "llama")
    for parameter in trunk_of(model).values():
        partition(parameter, world.rank, world.size)
    writes = 0

    def pwrite(*arguments: Any) -> int:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Half of it is written first, as it happens on a disk that is nearly full.
        descriptor, data, offset = arguments
        return os.pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

    if world.rank == failing:
        disk.os = SimpleNamespace(**{**vars(os), "pwrite": pwrite})  # type: ignore[attr-defined]
    try:
        export_checkpoint(Path(destination), *open_toy(Path(source)), trunk_of(model), world=world)
    except UserError as error:
        return str(error)
    finally:
        disk.os = os  # type: ignore[attr-defined]
    return None


def test_a_disk_that_fills_up_at_any_write_leaves_the_old_one(
    old_and_new: tuple[Path, Path, dict[str, bytes], dict[str, bytes]], ranks: RankPool
) -> None:
    source, destination, old, _ = old_and_new
    draw = random.Random(1)
    for _ in range(6):
        failing, after = draw.randrange(3), draw.randrange(40)
        messages = ranks.run(fail_on_ranks, str(source), str(destination), failing, after, world_size=3)
        assert messages[0] == messages[1] == messages[2]
        assert "No space left on device" in str(messages[0]) and f"{destination} was not written" in str(messages[0])
        assert contents(destination) == old
        assert [path.name for path in destination.parent.iterdir()] == ["refined"]


def test_a_limit_on_file_sizes_leaves_the_old_one(
    old_and_new: tuple[Path, Path, dict[str, bytes], dict[str, bytes]],
) -> None:
    source, destination, old, _ = old_and_new
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        message = export_on_rank(str(source), str(destination), "llama", 0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in str(message) and "raise the limit on the size of files" in str(message)
    assert contents(destination) == old


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one toy checkpoint, but not for two."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_the_old_one(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_toy(tmp_path / "source", "llama")
    destination = small_disk / "refined"
    assert export_on_rank(str(tmp_path / "source"), str(destination), "llama", 0, 1) is None
    old = contents(destination)
    assert "are free there" in str(export_on_rank(str(tmp_path / "source"), str(destination), "llama", 0, 1))
    # Free space that others take while the export runs.
    monkeypatch.setattr("dcr_scale.models.export.shutil.disk_usage", lambda _: SimpleNamespace(free=2**40))
    message = export_on_rank(str(tmp_path / "source"), str(destination), "llama", 0, 1)
    assert "No space left on device" in str(message)
    assert contents(destination) == old
    assert [path.name for path in small_disk.iterdir()] == ["refined"]


def test_swapping_falls_back_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        import ctypes

        ctypes.set_errno(errno.EINVAL)
        return -1

    for name in ("refined", "refined.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    monkeypatch.setattr(disk, "_renameat2", lambda: refuse)
    disk.replace_folder(tmp_path / "refined")
    assert (tmp_path / "refined" / "which").read_text() == "refined.partial"
    assert [path.name for path in tmp_path.iterdir()] == ["refined"]


def test_a_reader_between_two_renames_gets_the_old_one_and_the_new_one_still_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_toy(tmp_path / "refined", "llama")
    save_toy(tmp_path / "refined.partial", "llama-tied")
    expected = hash_file(tmp_path / "refined.partial" / "model.safetensors")
    rename, opened = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if target.name == "refined.replaced" and not opened:
            opened.append(Checkpoint.open(tmp_path / "refined"))

    monkeypatch.setattr(disk, "_renameat2", lambda: None)
    monkeypatch.setattr(disk, "os", SimpleNamespace(**{**vars(os), "rename": interrupted}))
    disk.replace_folder(tmp_path / "refined")
    assert "lm_head.weight" in opened[0].tensors
    assert hash_file(tmp_path / "refined" / "model.safetensors") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["refined"]
