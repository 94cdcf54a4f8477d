"""The rank pool: groups of the size asked for, failures that name their rank, a pool that survives them."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import wait

import psutil
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankFailure


def sum_of_ranks() -> tuple[int, int, int]:
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(total)


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("rank says no")
    dist.barrier()


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)


def hold_gibibyte() -> int:
    """Small objects in a cycle: neither reference counts nor the allocator's own habits give them back."""
    tensors: list = [torch.ones(2000) for _ in range(2**17)]
    tensors.append(tensors)
    return os.getpid()


def test_group_has_the_size_asked_for(ranks):
    for world_size in (2, 2, 3, 1):
        total = world_size * (world_size + 1) // 2
        expected = [(rank, world_size, total) for rank in range(world_size)]
        assert ranks.run(sum_of_ranks, world_size=world_size) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "message"),
    [
        (raise_on, r"rank 1 of 2:(.|\n)*rank says no"),
        (sleep_on, "rank 1 of 2 did not finish"),
        (die_on, "died without a traceback"),
    ],
)
def test_failure_is_reported_and_the_pool_survives(ranks, job, message):
    with pytest.raises(RankFailure, match=message):
        ranks.run(job, 1, world_size=2, timeout=8)
    assert [total for _, _, total in ranks.run(sum_of_ranks, world_size=2)] == [3, 3]


def test_a_rank_that_died_while_it_waited_is_replaced(ranks):
    ranks.run(sum_of_ranks, world_size=2)
    os.kill(ranks.run(os.getpid, world_size=2)[1], signal.SIGKILL)
    # The server of the ranks says so; the process may be gone before that.
    wait([process.sentinel for process, _ in ranks._workers])
    with pytest.warns(UserWarning, match="rank-1 .-9."):
        assert [total for _, _, total in ranks.run(sum_of_ranks, world_size=2)] == [3, 3]


def test_a_waiting_rank_holds_nothing_of_its_last_job(ranks):
    process = psutil.Process(ranks.run(os.getpid, world_size=1)[0])
    before = process.memory_info().rss
    ranks.run(hold_gibibyte, world_size=1)
    ranks.run(os.getpid, world_size=1)  # begins when the rank has tidied up
    assert process.memory_info().rss < before + 2**27
