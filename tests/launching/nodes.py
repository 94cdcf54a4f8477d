"""Two "nodes" on one machine: network namespaces with an address each and a cable between them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Addresses for documentation (RFC 5737): no route anywhere has them.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
# Each node's end of the cable.
INTERFACE = "cable"


class NotPermitted(Exception):
    """This machine does not let the process make namespaces; the message is what it said."""


class Nodes:
    """Commands run on node 0 or 1 as on machines of their own, but for the disk, which they share."""

    def __init__(self, holders: Sequence[subprocess.Popen]):
        self._enter = [
            ["nsenter", "--target", str(holder.pid), "--user", "--net", "--preserve-credentials"] for holder in holders
        ]

    def do(self, node: int, *command: str) -> None:
        done = subprocess.run([*self._enter[node], *command], capture_output=True, text=True)
        if done.returncode:
            raise NotPermitted(f"{' '.join(command)}: {done.stderr.strip()}")

    def start(self, node: int, command: Sequence[str], output: Path, **popen: object) -> subprocess.Popen:
        """In a process group of its own, with what it says in a file."""
        with output.open("w", encoding="utf-8") as file:
            return subprocess.Popen(
                [*self._enter[node], *command], stdout=file, stderr=file, start_new_session=True, **popen
            )

    def unplug(self, node: int) -> None:
        """Pull the cable: packets get lost, and nobody is told."""
        self.do(node, "ip", "link", "set", INTERFACE, "down")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Raises NotPermitted where there are no such things.

    In a user namespace, in which also who is not root may make networks.
    """
    holders: list[subprocess.Popen] = []
    try:
        holders.append(_hold(["unshare", "--user", "--map-root-user", "--net"]))
        inside = ["nsenter", "--target", str(holders[0].pid), "--user", "--preserve-credentials"]
        holders.append(_hold([*inside, "unshare", "--net"]))
        nodes = Nodes(holders)
        cable = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE]
        nodes.do(0, *cable, "netns", str(holders[1].pid))
        for node, address in enumerate(ADDRESSES):
            nodes.do(node, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                nodes.do(node, "ip", "link", "set", interface, "up")
        yield nodes
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def _hold(command: Sequence[str]) -> subprocess.Popen:
    """Something that sleeps in a namespace of its own, which lasts as long as that."""
    try:
        holder = subprocess.Popen([*command, "sleep", "infinity"], stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise NotPermitted(f"{error.filename} is not installed") from None
    ours = os.readlink("/proc/self/ns/net")
    while holder.poll() is None:
        # Each of the commands becomes the next one: what it is to be at last has its namespaces.
        if Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n":
            assert os.readlink(f"/proc/{holder.pid}/ns/net") != ours
            return holder
        time.sleep(0.02)
    assert holder.stderr is not None
    raise NotPermitted(f"{' '.join(command)}: {holder.stderr.read().strip()}")


def kill_all(process: subprocess.Popen) -> None:
    """The whole group that was started, as when a node loses its power."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
