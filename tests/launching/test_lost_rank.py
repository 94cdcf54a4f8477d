"""Which failures are told to be another rank's, and how."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from dcr_scale.command_line import exit_code
from dcr_scale.lost_rank import explain

READ_ERROR = (
    "[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [192.0.2.2]:13968: Connection reset by peer. "
    "This is typically caused by a remote worker hanging or bugs in the application."
)
TIMEOUT = (
    "[/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to "
    "complete"
)


REFUSED = (
    "[/third_party/gloo/gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection refused, "
    "remote=[127.0.0.1]:14161"
)


def test_a_closed_connection_names_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    said = explain(RuntimeError(READ_ERROR))
    assert said is not None and said.startswith("rank 3 on ")
    assert "lost the other ranks: Read error [192.0.2.2]:13968: Connection reset by peer. A rank" in said
    assert "engine.timeout_minutes" not in said and "\n" not in said


def test_a_timeout_names_the_setting() -> None:
    said = explain(RuntimeError(TIMEOUT))
    assert said is not None and "Timed out waiting 30000ms" in said and "engine.timeout_minutes" in said


def test_a_connection_that_is_refused_at_the_start_names_where() -> None:
    said = explain(RuntimeError(f"Gloo connectFullMesh failed with {REFUSED}"))
    assert said is not None and "lost the other ranks: timed out connecting" in said and "127.0.0.1" in said


def test_ranks_that_never_came_are_lost_as_well() -> None:
    with pytest.raises(dist.DistStoreError) as caught:
        dist.TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=timedelta(seconds=0.5))
    said = explain(caught.value)
    assert said is not None and "1/2 clients joined" in said


def test_other_errors_are_not_put_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(RuntimeError("shapes [2] and [3] do not match")) is None
    assert explain(ValueError("no gloo/ here")) is None

    def fail() -> None:
        raise RuntimeError("a bug")

    assert exit_code(fail) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: a bug" in said and "lost the other ranks" not in said


def test_a_launcher_ends_with_the_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    def lose() -> None:
        raise RuntimeError(TIMEOUT)

    assert exit_code(lose) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: rank ")
