"""The same command, again: a run that was interrupted ends as if it had not been."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from interrupted import metrics, outcome, told_to_stop
from toy import toy_checkpoint, toy_settings, write_config

from dcr_scale import pipeline, typed_yaml
from dcr_scale.config import Config, load_config
from dcr_scale.errors import OutOfMemory, Preempted, UserError
from dcr_scale.models import disk
from dcr_scale.resume import run_lock
from dcr_scale.resume.progress import differing
from dcr_scale.resume.run_folder import RunFolder, Share
from dcr_scale.resume.stop import StopRequest
from dcr_scale.resume.training_state import FILE as TRAINING_STATE
from dcr_scale.world import World

CPU = torch.device("cpu")
LORA = ["align.method=lora", "align.lora.dropout=0.3"]
REHEARSED = ["align.rehearsal={weight: 0.5, batch_size: 4}", "align.micro_batch_tokens=256"]
PROBE = [f"probe.{key}=2" for key in ("pairs", "prompts", "rank", "groups", "output_probes")]
# Where a run can be told to stop: in the middle of a stage, in the step before its end, between the parts.
MOMENTS = {
    "in stage 1": ("refine", 2),
    "at stage 1's last step": ("refine", 4),
    "in stage 2": ("align", 3),
    "in the last look": ("look", 2),
}


# Stage 1 alone, no looks: what happens in a stage happens in either.
SHORT = ["align=null", "look.enabled=false"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "model", "llama")
    settings = toy_settings(tmp_path, tmp_path / "model")
    settings["checkpoint"] = {"every": 1}
    settings["look"] = {"prompts": 1, "max_new_tokens": 2}
    return write_config(tmp_path, settings)


def begin(config: Path, folder: Path, *overrides: str, **told: bool) -> dict:
    return pipeline.run(load_config(config, [f"run.dir={folder}", *overrides]), **told)


def interrupt(config: Path, folder: Path, stage: str, step: int, *overrides: str, number: int = signal.SIGUSR1) -> str:
    with told_to_stop(stage, step, number), pytest.raises(Preempted) as stopped:
        begin(config, folder, *overrides)
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["reason"]) == ("preempted", str(stopped.value))
    return str(stopped.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [["probe.every=2", *PROBE], [*LORA, *REHEARSED]], ids=["full, with the probe", "lora, rehearsed"]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    config: Path, tmp_path: Path, overrides: list[str], alone: None
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begin(config, whole, *overrides)
    for stage, step in MOMENTS.values():
        interrupt(config, cut, stage, step, *overrides)
    begin(config, cut, *overrides)
    assert outcome(cut) == outcome(whole)
    assert not (cut / "checkpoints").exists(), "what is done needs no checkpoint"
    assert json.loads((cut / "status.json").read_text(encoding="utf-8"))["state"] == "finished"


@pytest.fixture
def halfway(config: Path, tmp_path: Path, alone: None) -> Path:
    """The folder of a run that was told to stop after step 3 of stage 1's four, with two checkpoints."""
    folder = tmp_path / "run"
    said = interrupt(config, folder, "refine", 3, *SHORT, number=signal.SIGTERM)
    assert "SIGTERM" in said and "step 3" in said
    assert checkpoints(folder) == ["refine-00000002", "refine-00000003"], "keep_last is 2"
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda checkpoint: flip(checkpoint / TRAINING_STATE),
    "a truncated file": lambda checkpoint: truncate(checkpoint / TRAINING_STATE),
    "no state.json": lambda checkpoint: (checkpoint / "state.json").unlink(),
    "half a state.json": lambda checkpoint: truncate(checkpoint / "state.json"),
    "no tensors": lambda checkpoint: (checkpoint / TRAINING_STATE).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    config: Path, halfway: Path, tmp_path: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture
) -> None:
    damage(halfway / "checkpoints" / "refine-00000003")
    begin(config, halfway, *SHORT)
    said = capfd.readouterr().err
    assert "refine-00000003: " in said and "is left out" in said
    begin(config, tmp_path / "whole", *SHORT)
    assert outcome(halfway) == outcome(tmp_path / "whole")


def test_a_half_written_checkpoint_is_none(config: Path, halfway: Path) -> None:
    shutil.rmtree(halfway / "checkpoints" / "refine-00000002")
    (halfway / "checkpoints" / "refine-00000003").rename(halfway / "checkpoints" / "refine-00000003.partial")
    summary = begin(config, halfway, *SHORT)
    assert summary["refine"]["updates"] == 4


def test_where_no_checkpoint_is_sound_the_user_decides(config: Path, halfway: Path) -> None:
    for checkpoint in (halfway / "checkpoints").iterdir():
        flip(checkpoint / TRAINING_STATE)
    with pytest.raises(UserError, match="none of the checkpoints of refine can be used; --fresh"):
        begin(config, halfway, *SHORT)
    assert json.loads((halfway / "status.json").read_text(encoding="utf-8"))["state"] == "failed"
    assert begin(config, halfway, *SHORT, fresh=True)["refine"]["updates"] == 4


@pytest.mark.parametrize("where", ["checkpoints/refine-00000003/state.json", "progress.json"])
def test_what_newer_code_has_written_is_not_guessed_at(config: Path, halfway: Path, where: str) -> None:
    written = json.loads((halfway / where).read_text(encoding="utf-8"))
    (halfway / where).write_text(json.dumps({**written, "format": 99}), encoding="utf-8")
    with pytest.raises(UserError, match=r"newer version of dcr-scale \(format 99, this one reads 1\)"):
        begin(config, halfway, *SHORT)


def test_a_folder_of_another_run_is_refused_with_every_difference(config: Path, halfway: Path) -> None:
    changed = [*SHORT, "refine.optimizer.lr=2e-3", "refine.loss.gamma=16"]
    with pytest.raises(UserError, match=r"refine.loss.gamma: 32.0 then, 16.0 now; refine.optimizer.lr: 0.001 then, 0"):
        begin(config, halfway, *changed)
    free = ["log.every=2", "checkpoint.every=3", "engine.reduce_bucket=1000000", "refine.micro_batch_tokens=512"]
    begin(config, halfway, *SHORT, *free)


def test_a_setting_that_there_was_not_yet_had_its_default() -> None:
    def about() -> dict:
        return {"settings": json.loads(json.dumps(typed_yaml.to_tree(Config()))), "model's weights": "1"}

    before, now = about(), about()
    del before["settings"]["align"]["rehearsal"], before["settings"]["look"]["layer"]
    assert not list(differing(before, now))
    now["settings"]["align"]["rehearsal"]["weight"] = 0.5
    assert list(differing(before, now)) == [("align.rehearsal.weight", 0.0, 0.5)]
    before["settings"]["align"] = None
    assert "align.method" in {key for key, _, _ in differing(before, now)}, "where there was no stage 2"


def test_a_finished_run_does_not_pass_for_one_that_exports_more(config: Path, tmp_path: Path, alone: None) -> None:
    folder, lora = tmp_path / "run", ["refine=null", "look.enabled=false", "align.method=lora"]
    begin(config, folder, *lora)
    with pytest.raises(UserError, match=r'align.lora.export: "merged" then, "both" now'):
        begin(config, folder, *lora, "align.lora.export=both")


def test_a_changed_run_goes_on_where_it_is_told_to(config: Path, halfway: Path) -> None:
    summary = begin(config, halfway, *SHORT, "refine.optimizer.lr=2e-3", accept_changes=True)
    assert summary["refine"]["updates"] == 4


def test_other_data_under_the_same_name_is_another_run(config: Path, halfway: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "contrast.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("walnut", "hazelnut"), encoding="utf-8")
    with pytest.raises(UserError, match="data sources' content"):
        begin(config, halfway, *SHORT)


def test_a_finished_run_says_so_and_trains_nothing(config: Path, tmp_path: Path, alone: None) -> None:
    folder = tmp_path / "run"
    summary = begin(config, folder, *SHORT)
    before = {path: path.stat().st_mtime_ns for path in (folder / "refined").iterdir()}
    assert begin(config, folder, *SHORT) == summary
    assert {path: path.stat().st_mtime_ns for path in (folder / "refined").iterdir()} == before


def test_a_full_disk_leaves_the_older_checkpoint(
    config: Path, halfway: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of the next checkpoint; the run ends with what to do, and goes on later."""
    flip(halfway / "checkpoints" / "refine-00000003" / TRAINING_STATE)
    written = 0

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    real = os.pwrite
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"No space left on device.*free space"):
        patched.setattr(disk.os, "pwrite", pwrite)
        begin(config, halfway, *SHORT)
    assert checkpoints(halfway) == ["refine-00000002", "refine-00000003"]
    begin(config, halfway, *SHORT)
    begin(config, tmp_path / "whole", *SHORT)
    assert outcome(halfway) == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("part", "owner", "method", "advice"),
    [
        (
            "refine", "dcr_scale.refine.Refiner", "train_step",
            "refine.micro_batch_tokens=146, model.gradient_checkpointing=true, engine.offload_optimizer=cpu",
        ),
        ("align", "dcr_scale.align.Aligner", "train_step", "align.micro_batch_tokens=32, "),
        (
            "look_before", "dcr_scale.evaluation.look.Looker", "take",
            "look.partitioned=yes, look.batch_size=1, look.max_new_tokens=1, or more GPUs",
        ),
    ],
)  # fmt: skip
def test_a_full_device_names_the_settings_that_help(
    config: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch,
    part: str, owner: str, method: str, advice: str,
) -> None:  # fmt: skip
    def full(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(f"{owner}.{method}", full)
    with pytest.raises(OutOfMemory, match=rf"^rank 0 ran out of memory in {part}: ") as told:
        begin(config, tmp_path / "run")
    assert advice in str(told.value) and "Tried to allocate 2.00 GiB" in str(told.value)
    for setting in re.findall(r"(\w+\.\w+)=(\w+)", str(told.value)):
        load_config(config, ["=".join(setting)])
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["reason"]) == ("failed", str(told.value))


def test_a_full_device_is_told_of_no_setting_that_is_no_less(config: Path) -> None:
    """Of none that is in use, of fewer tokens only where a pass would take fewer, and of none that is not allowed."""
    folder = RunFolder(load_config(config, ["align.micro_batch_tokens=16"]), World(0, 1, 0, 1, CPU), StopRequest())

    def helps(part: str, share: Share | None = None) -> str:
        folder.part, folder.shares = part, {} if share is None else {part: share}
        return folder._helps()

    assert helps("refine", Share(tokens=1000, longest=100)).startswith("refine.micro_batch_tokens=500, ")
    assert helps("refine", Share(tokens=1000, longest=600)).startswith("refine.micro_batch_tokens=500, "), "fewer"
    assert helps("refine", Share(tokens=1000, longest=1000)).startswith("model."), "one prompt is one pass"
    assert helps("refine", Share(tokens=20, longest=5)).startswith("refine.micro_batch_tokens=16, ")
    assert helps("align", Share(tokens=1000, longest=5)).startswith("model."), "16 is the least"
    folder.config.align.micro_batch_tokens = 4096
    assert helps("align", Share(tokens=1000, longest=5)).startswith("align.micro_batch_tokens=500, ")
    folder.config.model.gradient_checkpointing = True
    folder.config.engine.offload_optimizer = folder.config.engine.offload_parameters = "cpu"
    assert helps("align", Share(tokens=1000, longest=1000)) == "more GPUs; launchers/plan.py tells how many"
    assert helps("layer_choice").startswith("probe.micro_batch_tokens=512, ")
    folder.config.look.partitioned, folder.config.look.max_new_tokens = "yes", 1
    folder.answered, folder.config.data.answer_tokens = 1, 64
    assert helps("answers").startswith("data.answer_tokens=32, or more GPUs")
    assert helps("look_before") == "more GPUs; launchers/plan.py tells how many"


def test_an_attempt_does_not_end_for_the_reason_of_the_one_before(config: Path, halfway: Path) -> None:
    before = {"state": "failed", "reason": "rank 0 ran out of memory in refine"}
    (halfway / "status.json").write_text(json.dumps(before), encoding="utf-8")
    with pytest.raises(UserError) as told:
        begin(config, halfway, *SHORT, "refine.optimizer.lr=2e-3")
    status = json.loads((halfway / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["reason"]) == ("failed", str(told.value))


def test_the_chosen_layer_stays_in_the_configuration(
    config: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, auto = tmp_path / "run", [*SHORT, "refine.layer=auto"]
    choice = SimpleNamespace(layer=3, reason="the third", as_dict=lambda: {"layer": 3})
    monkeypatch.setattr(pipeline, "measure_layer", lambda *arguments: choice)
    interrupt(config, folder, "refine", 2, *auto)

    def layer() -> object:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["refine"]["layer"]

    assert layer() == 3
    interrupt(config, folder, "refine", 3, *auto)
    assert layer() == 3
    begin(config, folder, *auto)
    begin(config, folder, *auto)
    assert layer() == 3, "nor does a finished run forget it"


@pytest.mark.parametrize("stage", ["refine", "align"])
def test_a_probe_that_is_new_in_the_middle_of_a_stage_measures_from_there(
    config: Path, tmp_path: Path, alone: None, stage: str
) -> None:
    folder, only = tmp_path / "run", ["look.enabled=false", f"{'align' if stage == 'refine' else 'refine'}=null"]
    interrupt(config, folder, stage, 1, *only)
    probing = [*only, "probe.every=2", *PROBE]
    with told_to_stop(stage, 3), pytest.raises(Preempted):
        begin(config, folder, *probing, accept_changes=True)
    summary = begin(config, folder, *probing)
    measured = [row["step"] for row in metrics(folder) if row["stage"] == f"{stage}/probe"]
    last = max(row["step"] for row in metrics(folder) if row["stage"] == stage)
    assert measured == sorted({1, *range(2, last, 2), last})
    assert [summary["probe"][stage][end]["step"] for end in ("first", "last")] == [1, last]


def test_a_checkpoint_that_is_kept_for_good_outlives_its_stage(config: Path, tmp_path: Path, alone: None) -> None:
    folder, kept = tmp_path / "run", [*SHORT, "refine.steps=6", "checkpoint.keep_last=1", "checkpoint.keep_every=2"]
    interrupt(config, folder, "refine", 5, *kept)
    assert checkpoints(folder) == ["refine-00000002", "refine-00000004", "refine-00000005"]
    begin(config, folder, *kept)
    assert checkpoints(folder) == ["refine-00000002", "refine-00000004"]


def test_a_fresh_start_leaves_nothing_of_the_run_before(config: Path, tmp_path: Path, alone: None) -> None:
    """But what is not the run's, and what says how it was begun."""
    folder, made = tmp_path / "run", tmp_path / "expected"
    begin(config, made, *SHORT)
    left = [
        "proposition.json", "profile/refine.json.gz", "tensorboard/events.out", "wandb/run-1/files/output.log",
        "adapter/README.md", "aligned/model.safetensors", "aligned.partial/model.safetensors",
        "refined.replaced/model.safetensors", "retention-0.bin", "look/before.jsonl", "checkpoints/align-00000002/x",
    ]  # fmt: skip
    for name in [*left, "notes.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    begin(config, folder, *SHORT, fresh=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in made.iterdir()} | {"notes.txt"}


@pytest.mark.parametrize("text", ['{"format": 1, "id": "a"}', '{"format": 1', "[]"])
def test_a_damaged_progress_says_how_to_begin_anew(config: Path, tmp_path: Path, alone: None, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"progress.json: is damaged; --fresh begins the run anew"):
        begin(config, tmp_path / "run", *SHORT)


def test_what_is_kept_for_good_is_among_what_is_saved(config: Path) -> None:
    for every in ("null", "0", "4"):
        with pytest.raises(UserError, match=r"checkpoint.keep_every=6 is no multiple of checkpoint.every="):
            load_config(config, ["checkpoint.keep_every=6", f"checkpoint.every={every}"])
    load_config(config, ["checkpoint.keep_every=6", "checkpoint.every=3"])


def test_one_job_at_a_time(config: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 0.2)
    folder = tmp_path / "run"
    held = run_lock.RunLock(folder, World(0, 1, 0, 1, torch.device("cpu")))
    with pytest.raises(UserError, match=f'another job works in this folder .*"pid": {os.getpid()}'):
        begin(config, folder, *SHORT)
    held.release()
    begin(config, folder, *SHORT)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_no_run(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_lock.fcntl, "flock", without)
    with caplog.at_level(logging.WARNING, "dcr_scale.resume.run_lock"):
        run_lock.RunLock(tmp_path, World(0, 1, 0, 1, torch.device("cpu"))).release()
    (said,) = caplog.messages
    assert f"lock: this file system has no locks ({os.strerror(code)})" in said
