"""Kill random ranks of a run at random moments, saves included, and see that it ends with the same weights.

    python tests/chaos.py [--kills 50] [--ranks 2] [--seed 0] [--method full] [--folder DIR]

A toy run of both stages goes through ``deepspeed launchers/dcr.py`` once undisturbed. Then the same command is started
again and again; each time one rank, drawn at random, is killed by SIGKILL: at a random moment, or every other time a
random moment after a checkpoint or an export has begun to be written. When a run ends in spite of it, its files must be
those of the undisturbed one, bit for bit, and the next run begins. Exits with 0 where every run ended so, else with 1.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
from interrupted import outcome
from toy import launcher_command, toy_checkpoint, toy_settings, write_config

from dcr_scale.world import cpu_model

# How long the launcher, and the ranks that are left, may take to end once a rank is gone.
ENDS_WITHIN_SECONDS = 60.0
GIVE_UP_SECONDS = 600.0


@dataclass
class Chaos:
    """``kills`` SIGKILLs over as many runs as it takes; every draw is by ``seed``."""

    folder: Path
    kills: int
    ranks: int
    seed: int
    method: str = "full"
    steps: int = 12
    done: int = 0
    differing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        toy_checkpoint(self.folder / "model", "llama")
        settings = toy_settings(self.folder, self.folder / "model")
        settings["refine"] |= {"steps": self.steps, "stop": {"every": 3, "cross_cosine": None, "patience": 0}}
        settings["align"] |= {"method": self.method, "epochs": self.steps / 5}
        settings["look"] = {"prompts": 2, "max_new_tokens": 2}
        settings["checkpoint"] = {"every": 1, "keep_last": 2}
        self.config = write_config(self.folder, settings)

    def run(self) -> bool:
        """Whether every run ended with the undisturbed one's files."""
        began = time.monotonic()
        if self._attempt("undisturbed", kill=False) != 0:
            raise SystemExit(f"the undisturbed run failed; see {self.folder / 'undisturbed.log'}")
        self.seconds = time.monotonic() - began
        expected = outcome(self.folder / "undisturbed")
        number = 0
        while self.done < self.kills:
            name = f"run_{number}"
            attempts = 0
            while self._attempt(name, kill=self.done < self.kills) != 0:
                attempts += 1
                if attempts > self.kills + 3:
                    raise SystemExit(f"{name} does not end; see {self.folder / name}.log")
            found = outcome(self.folder / name)
            unlike = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            self.differing += [f"{name}: {key}" for key in unlike]
            print(f"{name} ended after {attempts} kills: {unlike or 'bit-equal'}", flush=True)
            number += 1
        return not self.differing

    def _attempt(self, name: str, *, kill: bool) -> int:
        """Start the command once, kill one of its ranks if asked to; its exit code. SystemExit where it hangs."""
        run = self.folder / name
        arguments = ["--config", str(self.config), f"run.dir={run}"]
        command, environment = launcher_command("dcr.py", *arguments, ranks=self.ranks)
        with (self.folder / f"{name}.log").open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command, cwd=Path(__file__).parents[1], env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
            try:
                if kill:
                    self._kill_one(process, run)
                return process.wait(timeout=ENDS_WITHIN_SECONDS if kill and self.struck else GIVE_UP_SECONDS)
            except subprocess.TimeoutExpired:
                raise SystemExit(f"{name}: still running {ENDS_WITHIN_SECONDS:.0f} s after a rank was killed") from None
            finally:
                for left in [process.pid, *(child.pid for child in _ranks(process.pid))]:
                    if psutil.pid_exists(left):
                        psutil.Process(left).kill()

    def _kill_one(self, process: subprocess.Popen, run: Path) -> None:
        """SIGKILL a random rank at a random moment; ``struck`` says whether one was still there."""
        self.struck = False
        in_a_save = self.done % 2 == 1
        # Runs that go on are shorter than the whole one, whose seconds these are: their ends are struck too.
        moment = self.random.uniform(0.0, 0.3) if in_a_save else self.random.uniform(0.2, 0.8) * self.seconds
        began = time.monotonic()
        while process.poll() is None:
            due = time.monotonic() - began >= moment
            if in_a_save and not due and not _being_written(run):
                # The clock starts where something begins to be written.
                began = time.monotonic()
            if due:
                ranks = _ranks(process.pid)
                if ranks:
                    victim = self.random.choice(ranks)
                    victim.send_signal(signal.SIGKILL)
                    self.struck = True
                    self.done += 1
                    what = ", ".join(_being_written(run)) or "nothing being written"
                    print(f"kill {self.done}: pid {victim.pid} of {run.name} ({what})", flush=True)
                return
            time.sleep(0.01)


def _being_written(run: Path) -> list[str]:
    """Names of the checkpoints and exports that are there in part; folders may come and go meanwhile."""
    return [name for folder, names, _ in os.walk(run) for name in names if name.endswith(".partial")]


def _ranks(launcher: int) -> list[psutil.Process]:
    """The processes that run ranks, under the launcher's."""
    try:
        children = psutil.Process(launcher).children(recursive=True)
        return [child for child in children if any(word.startswith("--local_rank=") for word in child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "transformers"))
    cores = f"{len(os.sched_getaffinity(0))} cores of {cpu_model()}"
    print(f"{given.kills} kills on {given.ranks} ranks, {cores}, {versions}")
    equal = Chaos(folder, given.kills, given.ranks, given.seed, given.method).run()
    print(f"{given.kills} kills, {'every run ended bit-equal' if equal else 'runs differ'}; {folder}")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
