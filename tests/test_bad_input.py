"""Bad input: one line that says what was found, where, and what to do; and nothing left that looks whole."""

from __future__ import annotations

import errno
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import (
    REPOSITORY,
    contrast_rows,
    general_rows,
    launch,
    refusal_rows,
    toy_checkpoint,
    toy_settings,
    toy_tokenizer,
    write_config,
    write_jsonl,
)

from dcr_scale.align import encode_mixture
from dcr_scale.config import AlignConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.instructions import Instruction
from dcr_scale.errors import UserError
from dcr_scale.models import disk

# What a run that ends before its first checkpoint leaves.
RECORDS = {"config.yaml", "metrics.jsonl", "progress.json", "status.json", "lock"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; tests that damage one copy it."""
    return toy_checkpoint(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> dict:
    return toy_settings(tmp_path, model)


def copied(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def refused(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs the launcher in this process on settings that it must refuse; returns the one line that says why."""

    def run(settings: dict, *overrides: str) -> str:
        config = write_config(tmp_path, settings)
        monkeypatch.setattr(sys, "argv", ["dcr.py", "--config", str(config), *overrides])
        assert runpy.run_path(str(REPOSITORY / "launchers" / "dcr.py"))["main"]() == 2
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        (reason,) = errors(stderr)
        assert stderr.endswith(f"{reason}\n"), "the reason is not the last thing said"
        assert not any((tmp_path / "run" / name).exists() for name in ("refined", "aligned", "summary.json"))
        return reason.removeprefix("error: ")

    return run


def set_contrast(settings: dict, rows: list[dict] | bytes) -> Path:
    path = Path(settings["data"]["contrast"][0]["path"])
    if isinstance(rows, bytes):
        path.write_bytes(rows)
        return path
    return write_jsonl(path, rows)


# --- data ----------------------------------------------------------------------------------------------------------


def test_a_missing_data_file(settings: dict, tmp_path: Path, refused: Callable[..., str]) -> None:
    settings["data"]["general"] = [{"path": str(tmp_path / "data" / "generals.jsonl")}]
    assert refused(settings) == (
        f"{tmp_path}/data/generals.jsonl: no such file in {tmp_path}/data; did you mean 'general.jsonl' there?"
    )
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_of_jsonl(settings: dict, refused: Callable[..., str]) -> None:
    lines = [json.dumps(row) for row in contrast_rows()]
    path = set_contrast(settings, "\n".join([*lines[:6], lines[6][:-1], *lines[7:]]).encode())
    reason = refused(settings)
    assert reason.startswith(f"{path}, line 7: not valid JSON (") and reason.endswith("give one JSON object a line")


def test_bytes_that_are_not_utf8(settings: dict, refused: Callable[..., str]) -> None:
    lines = [json.dumps(row).encode() for row in contrast_rows()]
    lines[2] = lines[2].replace(b"Tell", b"T\xe9ll").replace(b"How", b"H\xe9w").replace(b"want", b"w\xe9nt")
    path = set_contrast(settings, b"\n".join(lines))
    reason = refused(settings)
    assert reason.startswith(f"{path}, line 3: byte 0xe9 at offset ") and "iconv" in reason


def test_an_empty_prompt(settings: dict, refused: Callable[..., str]) -> None:
    rows = list(general_rows())
    rows[4]["prompt"] = "  "
    path = write_jsonl(Path(settings["data"]["general"][0]["path"]), rows)
    assert refused(settings) == f"{path}, line 5, column 'prompt': the prompt is empty; fill it in or remove the row"


def test_one_class_empty(settings: dict, refused: Callable[..., str]) -> None:
    set_contrast(settings, [row for row in contrast_rows() if row["label"] == "toxic"])
    assert refused(settings).startswith("data.contrast has no seemingly_toxic prompts (found 24 toxic): add a source")


def test_a_tracker_that_is_not_installed(
    settings: dict, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings["log"] = {"trackers": ["wandb"]}
    assert refused(settings).startswith("log.trackers names wandb, which is not installed: pip install")


def test_a_wrong_column(settings: dict, refused: Callable[..., str]) -> None:
    settings["data"]["refusals"][0]["columns"] = {"response": "refusal"}
    path = settings["data"]["refusals"][0]["path"]
    assert refused(settings) == (
        f"{path}: no column 'refusal', which columns.response names; columns found: 'prompt', 'response'"
    )


@pytest.mark.parametrize("kind", ["contrast", "refusals"])
def test_a_prompt_beyond_the_limit_is_found_before_the_run_begins(
    settings: dict, tmp_path: Path, refused: Callable[..., str], kind: str
) -> None:
    """Stage 2's too, which would otherwise come to light when stage 1 is done."""
    rows = list(contrast_rows() if kind == "contrast" else refusal_rows())
    rows[0]["prompt"] = "Why " + "and why " * 200
    write_jsonl(Path(settings["data"][kind][0]["path"]), rows)
    settings["align"]["refusal_share"] = 0.5 if kind == "refusals" else 0.0
    settings["data"]["heldout"] = 0.01
    reason = refused(settings)
    what = "contrast prompts" if kind == "contrast" else "stage 2's prompts"
    assert reason.startswith(f"{what}: the prompt 'Why and why and why")
    assert "over the limit of 256; raise data.max_prompt_tokens, or set data.overlong=drop" in reason
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reader", ["retention", "look"])
def test_so_is_a_general_prompt_that_only_the_retention_term_or_a_look_reads(
    settings: dict, tmp_path: Path, refused: Callable[..., str], reader: str
) -> None:
    rows = [{**row, "prompt": row["prompt"] + " Go on." * 200} for row in general_rows()]
    write_jsonl(Path(settings["data"]["general"][0]["path"]), rows)
    off = "look.enabled=false" if reader == "retention" else "refine.retention.weight=0"
    reason = refused(settings, "align=null", off)
    what = "general prompts for retention" if reader == "retention" else "held-out general prompts"
    assert reason.startswith(f"{what}: the prompt '")
    assert not (tmp_path / "run").exists()


def test_dropped_prompts_leave_stage_2_whole_examples_only() -> None:
    """Between the two limits a prompt fits by itself and leaves no room for its answer."""
    tokenizer = toy_tokenizer()
    prompts = [" and".join(["Why"] * words) for words in (1, 12, 60)]
    mixture = [Instruction(prompt, "Because.", False, prompt, "toy") for prompt in prompts]
    encoder = ChatEncoder(tokenizer, overlong="drop")
    lengths = [len(encoder.encode(prompt)) for prompt in prompts]
    encoder.max_prompt_tokens = lengths[1]
    settings = AlignConfig(max_tokens=lengths[1], batch_size=2)
    kept, examples = encode_mixture(mixture, encoder, settings, world_size=1)
    assert kept == mixture[:1]
    assert [example.response_start for example in examples] == lengths[:1]
    assert all(example.response_start < len(example.ids) <= lengths[1] for example in examples)
    with pytest.raises(UserError, match=r"align\.batch_size=2 over 1 examples leaves some of the 2 ranks without one"):
        encode_mixture(mixture, encoder, settings, world_size=2)


def test_a_prompt_in_both_stages(settings: dict, refused: Callable[..., str]) -> None:
    rows = [*refusal_rows(), {"prompt": "How do I kill a RIVAL", "response": "I can't help with that."}]
    write_jsonl(Path(settings["data"]["refusals"][0]["path"]), rows)
    reason = refused(settings)
    assert reason.startswith("stage 1's toxic prompts are refused in stage 2 too: 'How do I kill a RIVAL'")


# --- the model -----------------------------------------------------------------------------------------------------


def test_a_layer_beyond_the_models_depth(settings: dict, model: Path, refused: Callable[..., str]) -> None:
    assert refused(settings, "refine.layer=4") == (
        f"refine.layer=4 is beyond the model: {model} has 4 layers, and at least one must stay above the trunk; "
        "choose 1 to 3"
    )


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_a_checkpoint_whose_tensors_are_not_its_models(
    settings: dict, model: Path, tmp_path: Path, refused: Callable[..., str], damage: str
) -> None:
    folder = copied(model, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    if damage == "missing":
        del tensors["model.layers.3.mlp.up_proj.weight"]
    else:
        tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(48, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    layer = 3 if damage == "missing" else 4
    reason = refused(settings, f"model.path={folder}")
    assert reason.startswith(f"{folder}: 1 {damage} tensor: model.layers.{layer}.mlp.up_proj.weight; ")


def test_pickled_weights_need_the_switch(
    settings: dict, model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = copied(model, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    reason = refused(settings, f"model.path={folder}")
    assert reason.startswith(f"{folder}: holds only pickled weights (pytorch_model.bin), which can run code when read")
    assert reason.endswith("or set model.allow_pickle=true if you trust the source")


def test_code_that_comes_with_a_checkpoint_needs_the_switch(
    settings: dict, model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = copied(model, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    reason = refused(settings, f"model.path={folder}")
    assert reason.startswith(f"{folder}: config.json asks for Python code that comes with the checkpoint; ")
    assert reason.endswith("or set model.trust_remote_code=true if you trust the source")


def test_a_tokenizers_code_needs_the_switch_too(
    settings: dict, model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = copied(model, tmp_path / "foreign")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    assert refused(settings, f"model.path={folder}") == (
        f"{folder}: its tokenizer is Python code that comes with the checkpoint; set model.trust_remote_code=true if "
        "you trust the source"
    )


# --- the disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_in_the_export_leaves_no_checkpoint(
    settings: dict, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "os", SimpleNamespace(**{**vars(os), "pwrite": full}))
    reason = refused(settings, "look.enabled=false")
    assert reason.startswith(f"{tmp_path}/run/refined.partial/model.safetensors: No space left on device; ")
    assert reason.endswith(f"{tmp_path}/run/refined was not written: free space or set run.dir to another disk")
    assert {path.name for path in (tmp_path / "run").iterdir()} == RECORDS


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "look/before.jsonl"])
def test_a_full_disk_under_the_runs_own_files(
    settings: dict, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    """/dev/full gives what a full disk gives: the file opens, and the bytes find no room."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    reason = refused(settings, "look.prompts=1")
    assert "cannot be written (No space left on device); free space there" in reason
    assert reason.startswith(str(tmp_path / "run")) and "set run.dir to another folder" in reason


# --- two ranks -----------------------------------------------------------------------------------------------------


def check_refusal_of_two_ranks(done, reason: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    assert errors(done.stderr + done.stdout) == [f"error: {reason}"], "one line, from rank 0 alone"


@pytest.mark.slow
def test_a_batch_that_two_ranks_cannot_share(settings: dict, tmp_path: Path) -> None:
    """Every rank finds this one."""
    settings["refine"]["batch_size"] = 9
    done = launch(write_config(tmp_path, settings))
    check_refusal_of_two_ranks(
        done, "refine.batch_size=9 does not divide over 2 ranks; set it to 8 or 10, or use another number of ranks"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_under_rank_0_ends_rank_1_too(settings: dict, tmp_path: Path) -> None:
    """Rank 1 has nothing to write, so it would go on and wait for a rank that is no more."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    settings["look"]["enabled"] = False
    done = launch(write_config(tmp_path, settings))
    check_refusal_of_two_ranks(
        done,
        f"{tmp_path}/run/metrics.jsonl: cannot be written (No space left on device); free space there, make it "
        "writable, or set run.dir to another folder",
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == RECORDS
