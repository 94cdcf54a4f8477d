"""Who a process is, by its environment, and who says what went wrong."""

from __future__ import annotations

import socket

import pytest

from dcr_scale.command_line import exit_code
from dcr_scale.errors import UserError
from dcr_scale.world import from_environment

# What SLURM sets for a batch script of two tasks, where no srun has started anything yet.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCHED, "SLURM_STEP_NUM_TASKS", *BATCH):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_command_in_a_batch_script_is_alone(place: pytest.MonkeyPatch) -> None:
    for name, value in BATCH.items():
        place.setenv(name, value)
    world = from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)


def test_a_task_of_srun_is_one_of_them(place: pytest.MonkeyPatch) -> None:
    for name, value in {**BATCH, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}.items():
        place.setenv(name, value)
    world = from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)


@pytest.mark.parametrize(
    ("rank", "local_rank", "agreed", "said"),
    [
        (0, 0, True, "error: no such file"),
        (0, 0, False, "error: no such file"),
        (8, 0, True, ""),
        (8, 0, False, f"{socket.gethostname()}: error: no such file"),
        (9, 1, False, ""),
    ],
)
def test_what_only_one_node_found_is_said_there_once(
    place: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: int, local_rank: int, agreed: bool, said: str
) -> None:
    place.setattr("time.sleep", lambda _: None)
    place.setenv("RANK", str(rank))
    place.setenv("LOCAL_RANK", str(local_rank))

    def fail() -> None:
        error = UserError("no such file")
        error.agreed = agreed
        raise error

    assert exit_code(fail) == 2
    assert capsys.readouterr().err.strip() == said
