"""The SLURM recipes on a real SLURM: a cluster of one node, started here, that signals a job and takes it back."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from rank_pool import free_port
from toy import REPOSITORY, launcher_command, toy_checkpoint, toy_settings, write_config

RECIPES = REPOSITORY / "launchers" / "slurm"
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
DAEMONS = {name: shutil.which(name, path=SBIN) for name in ("munged", "mungekey", "slurmctld", "slurmd", "sbatch")}
MISSING = [name for name, path in DAEMONS.items() if path is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here (slurm-wlm, munge): {', '.join(MISSING)} missing"),
]

# A node of two "GPUs", which are any two devices. Requeued jobs wait for credentials to expire: seconds, not minutes.
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
GresTypes=gpu
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def daemon(*command: str, environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands reach the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    cpus, host = os.cpu_count(), socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    settings = SETTINGS.format(host=host, user=getpass.getuser(), folder=folder, cpus=cpus, **ports)
    (folder / "slurm.conf").write_text(settings, encoding="utf-8")
    devices = "".join(f"Name=gpu File=/dev/{name}\n" for name in ("null", "zero"))
    (folder / "gres.conf").write_text(devices, encoding="utf-8")
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SBIN}
    subprocess.run([DAEMONS["mungekey"], "--create", f"--keyfile={folder}/munge.key"], check=True)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    with ExitStack() as stack:
        for name, *flags in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            stack.enter_context(daemon(DAEMONS[name], *flags, environment=environment))
        wait_for(lambda: "idle" in asked(["sinfo", "--noheader", "--format=%T"], environment), 60, folder)
        yield environment


def asked(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout


def wait_for(condition: Callable[[], bool], seconds: float, told: Path) -> None:
    """Fails with what files in ``told`` end with."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            logs = [path for path in told.iterdir() if path.suffix == ".log"]
            pytest.fail("\n".join(f"{path.name}: …{path.read_text(encoding='utf-8')[-2000:]}" for path in logs))
        time.sleep(0.5)


@pytest.mark.parametrize(("recipe", "tasks"), [("dcr.sbatch", 2), ("dcr_deepspeed.sbatch", 1)])
def test_a_signalled_job_comes_back_and_finishes(
    tmp_path: Path, cluster: dict[str, str], recipe: str, tasks: int
) -> None:
    """SIGUSR1 as SLURM sends it before the job's time is over: the run saves, and the same job goes on from there."""
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model"))
    settings["refine"] |= {"steps": 100, "stop": {"every": 50, "patience": 0}}
    settings["look"] = {"enabled": False}
    config, run = write_config(tmp_path, settings), tmp_path / "run"
    _, ranks = launcher_command("dcr.py", ranks=2)
    environment = {
        **cluster, **ranks, "PATH": f"{Path(sys.executable).parent}:{cluster['PATH']}",
        "PYTHON": sys.executable, "BIN": str(Path(sys.executable).parent), "RUN_DIR": str(run),
    }  # fmt: skip
    flags = [
        "--parsable", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", "--gpus-per-node=2", "--overcommit",
        f"--output={tmp_path}/job.log", "--time=20", f"--chdir={REPOSITORY}",
    ]  # fmt: skip
    job = asked(["sbatch", *flags, str(RECIPES / recipe), "--config", str(config)], environment).strip()
    assert job.isdecimal()
    log, metrics = tmp_path / "job.log", run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > 10, 120, tmp_path)
    asked(["scancel", "--signal=USR1", job], environment)
    wait_for(lambda: "back into the queue" in log.read_text(encoding="utf-8"), 60, tmp_path)
    saved = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert saved["state"] == "preempted" and "SIGUSR1" in saved["reason"] and 10 <= saved["step"] < 100
    wait_for(lambda: asked(["squeue", "--noheader", f"--jobs={job}"], environment) == "", 240, tmp_path)
    assert json.loads((run / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == "refine"]
    assert steps == list(range(1, 101)), "went on after the step that was saved"
    assert (run / "aligned" / "model.safetensors").is_file()
