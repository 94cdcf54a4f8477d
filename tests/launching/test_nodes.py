"""Two nodes with addresses of their own train together through the launcher; when one is gone, the other ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import ADDRESSES, INTERFACE, Nodes, NotPermitted, kill_all, two_nodes
from toy import REPOSITORY, toy_checkpoint, toy_settings, write_config

pytestmark = pytest.mark.slow

# Starting up on two busy cores.
PATIENCE = 240.0
BINARIES = Path(sys.executable).parent


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    try:
        with two_nodes() as made:
            yield made
    except NotPermitted as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model"))
    settings |= {"look": {"enabled": False}, "align": None}
    return write_config(tmp_path, settings)


def launch(nodes: Nodes, folder: Path, config: Path, *overrides: str) -> list[subprocess.Popen]:
    """The same command on both nodes but for the node's number, as docs/launching.md has it."""
    hostfile = folder / "hostfile"
    hostfile.write_text("node-01 slots=1\nnode-02 slots=1\n", encoding="utf-8")
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BINARIES}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    command = [str(BINARIES / "deepspeed"), "--log_level", "warning", "--hostfile", str(hostfile), "--no_ssh"]
    command += ["--master_addr", ADDRESSES[0], "--master_port", "29511"]
    run = ["launchers/dcr.py", "--config", str(config), *overrides]
    return [
        nodes.start(
            node, [*command, "--node_rank", str(node), *run], folder / f"{node}.log", cwd=REPOSITORY, env=environment
        )
        for node in range(2)
    ]


def said(folder: Path, node: int) -> str:
    return (folder / f"{node}.log").read_text(encoding="utf-8", errors="replace")


def wait_for_step(folder: Path, processes: list[subprocess.Popen], step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while f" {step}/" not in said(folder, 0):
        ended = [node for node, process in enumerate(processes) if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, said(folder, ended[0] if ended else 0)
        time.sleep(0.2)


def test_two_nodes_train_together(tmp_path: Path, config: Path, nodes: Nodes) -> None:
    processes = launch(nodes, tmp_path, config)
    try:
        for node, process in enumerate(processes):
            assert process.wait(timeout=PATIENCE) == 0, said(tmp_path, node)
    finally:
        for process in processes:
            if process.poll() is None:
                kill_all(process)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["world_size"] == 2
    spoke = [re.findall(r"^refine +\d+/4 ", said(tmp_path, node), re.MULTILINE) for node in range(2)]
    assert len(spoke[0]) == 4 and not spoke[1], "the first rank speaks"


@pytest.mark.parametrize(
    ("fate", "timeout_minutes"),
    [
        # Nobody closes a connection: only the timeout can tell. It bounds the start as well.
        pytest.param("unplugged", 0.5, id="unplugged"),
        # The kernel closes the connections of what has died, and no timeout is waited for.
        pytest.param("killed", 30.0, id="killed"),
    ],
)
def test_a_node_that_is_gone_ends_the_other(
    tmp_path: Path, config: Path, nodes: Nodes, fate: str, timeout_minutes: float
) -> None:
    endless = ["refine.steps=100000", f"engine.timeout_minutes={timeout_minutes}"]
    processes = launch(nodes, tmp_path, config, *endless)
    first, second = processes
    try:
        wait_for_step(tmp_path, processes, 3)
        if fate == "unplugged":
            nodes.unplug(1)
        else:
            kill_all(second)
        began = time.monotonic()
        # Past it, the test fails for a job that hangs.
        assert first.wait(timeout=60 + (60 * timeout_minutes if fate == "unplugged" else 0)) == 1
        print(f"{fate}: the other node's launcher ended after {time.monotonic() - began:.0f} s")
        if fate == "unplugged":
            assert second.wait(timeout=60) == 1
    finally:
        for process in processes:
            if process.poll() is None:
                kill_all(process)
    lost = [line for line in said(tmp_path, 0).splitlines() if line.startswith("error: rank 0 on ")]
    assert len(lost) == 1 and "lost the other ranks" in lost[0]
    assert ("engine.timeout_minutes" in lost[0]) == (fate == "unplugged")
