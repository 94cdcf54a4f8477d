"""Exporting: what changed is written, the rest stays byte for byte, and nothing half-written looks whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_pool import RankPool
from toy_checkpoints import ARCHITECTURES, open_toy, partition, save_toy, world_of
from transformers import AutoConfig, AutoModelForCausalLM

from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.models import export as export_module
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.lora import LowRankDelta, lora_deltas
from dcr_scale.models.weights import load_weights


def trunk_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What stage 1 changes: the first two layers."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("model.layers.0.", "model.layers.1."))
    }


def changed_model(folder: Path, architecture: str) -> torch.nn.Module:
    """The model in ``folder`` with new values in its trunk."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trunk_of(model).values():
            parameter.copy_(torch.randn_like(parameter))
    return model


def export_on_rank(source: str, destination: str, architecture: str, rank: int, world_size: int) -> str | None:
    """One rank of an export of partitioned parameters; the message of a UserError."""
    model = changed_model(Path(source), architecture)
    changed = trunk_of(model)
    if world_size > 1:
        for parameter in changed.values():
            partition(parameter, rank, world_size)
    checkpoint, tensor_map = open_toy(Path(source))
    try:
        export_checkpoint(
            Path(destination),
            checkpoint,
            tensor_map,
            changed,
            world=world_of(rank, world_size),
            extra_files={"README.md": "A refined model.\n"},
        )
    except UserError as error:
        return str(error)
    return None


def export_on_ranks(source: str, destination: str, architecture: str, full_rank: int | None = None) -> str | None:
    """Runs on each rank of the pool; the disk of ``full_rank`` is full."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    writes = os.pwrite
    if rank == full_rank:
        disk.os = SimpleNamespace(**{**vars(os), "pwrite": full_disk})
    try:
        return export_on_rank(source, destination, architecture, rank, world_size)
    finally:
        disk.os = os
        assert os.pwrite is writes


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_pretrained_reads_the_change_and_the_tail_keeps_its_bytes(
    tmp_path: Path, architecture: str, sharded: bool
) -> None:
    source, destination = tmp_path / "source", tmp_path / "out" / "refined"
    save_toy(source, architecture, sharded=sharded, dtype=torch.bfloat16)
    assert export_on_rank(str(source), str(destination), architecture, 0, 1) is None

    expected = changed_model(source, architecture).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(destination).state_dict()
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name

    before, after = Checkpoint.open(source), Checkpoint.open(destination)
    assert before.tensors == after.tensors, "names, dtypes, files or offsets have changed"
    touched = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    assert touched
    assert all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in touched)
    assert (destination / "README.md").read_text() == "A refined model.\n"
    assert (destination / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3-moe"])
def test_bytes_are_the_same_whatever_the_world_size(tmp_path: Path, ranks: RankPool, architecture: str) -> None:
    source = tmp_path / "source"
    save_toy(source, architecture, sharded=True)
    outputs = []
    for world_size in (1, 2, 3, 4):
        destination = tmp_path / f"on_{world_size}"
        ranks.run(export_on_ranks, str(source), str(destination), architecture, world_size=world_size)
        outputs.append(contents(destination))
    assert outputs[0].keys() == {path.name for path in source.iterdir()} | {"README.md", "manifest.json"}
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


def test_a_full_disk_on_one_rank_is_the_same_error_on_all_and_leaves_nothing(tmp_path: Path, ranks: RankPool) -> None:
    source, destination = tmp_path / "source", tmp_path / "refined"
    save_toy(source, "llama")
    messages = ranks.run(export_on_ranks, str(source), str(destination), "llama", 1, world_size=2)
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]
    assert "set run.dir to another disk" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failed_export_leaves_the_previous_one_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = tmp_path / "source", tmp_path / "refined"
    save_toy(source, "llama")
    export_on_rank(str(source), str(destination), "llama", 0, 1)
    (destination / "marker").touch()
    before = contents(destination)
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", full_disk)
        assert "No space left" in str(export_on_rank(str(source), str(destination), "llama", 0, 1))
    assert contents(destination) == before
    assert export_on_rank(str(source), str(destination), "llama", 0, 1) is None
    assert contents(destination).keys() == before.keys() - {"marker"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refined", "source"]


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_toy(tmp_path / "source", "llama")
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    message = export_on_rank(str(tmp_path / "source"), str(tmp_path / "refined"), "llama", 0, 1)
    assert "0.00 GiB are free" in str(message)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_copying_falls_back_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    # What an export left has a manifest, so that its unchanged tensors need not be read to be hashed.
    save_toy(tmp_path / "original", "llama")
    export_on_rank(str(tmp_path / "original"), str(tmp_path / "source"), "llama", 0, 1)
    export_on_rank(str(tmp_path / "source"), str(tmp_path / "kernel"), "llama", 0, 1)
    monkeypatch.setattr(disk.os, "copy_file_range", refuse)
    monkeypatch.setattr(disk, "CHUNK_BYTES", 4096)
    export_on_rank(str(tmp_path / "source"), str(tmp_path / "fallback"), "llama", 0, 1)
    assert contents(tmp_path / "kernel") == contents(tmp_path / "fallback")


def test_files_that_others_write_too_are_open_for_writing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the NFS client of a node may send a whole page back, over the bytes of another node."""
    source = tmp_path / "source"
    save_toy(source, "mixtral")
    written: list[int] = []
    pwrite = os.pwrite

    def seen(opened: int, data: memoryview, offset: int) -> int:
        written.append(fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE)
        return pwrite(opened, data, offset)

    monkeypatch.setattr(disk.os, "pwrite", seen)
    assert export_on_rank(str(source), str(tmp_path / "out"), "mixtral", 0, 1) is None
    assert set(written) == {os.O_WRONLY}


def test_other_weights_stay_behind_and_templates_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_toy(source, "llama")
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", ".gitattributes"):
        (source / name).write_text("x")
    for folder in ("original", "additional_chat_templates"):
        (source / folder).mkdir()
        (source / folder / "tool_use.jinja").write_text("x")
    (source / "LICENSE").write_text("x")
    export_on_rank(str(source), str(tmp_path / "out"), "llama", 0, 1)
    assert contents(tmp_path / "out").keys() == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "LICENSE",
        "README.md",
        "manifest.json",
        "additional_chat_templates/tool_use.jinja",
    }


def test_a_tied_tensor_that_the_file_holds_twice_is_written_twice(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    save_toy(source, "llama-tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    checkpoint, tensor_map = open_toy(source)
    embedding = torch.nn.Parameter(torch.randn(101, 24))
    changed = {"model.embed_tokens.weight": embedding}
    export_checkpoint(tmp_path / "out", checkpoint, tensor_map, changed, world=world_of())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], embedding)
    assert torch.equal(exported["lm_head.weight"], embedding)


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    save_toy(tmp_path / "source", "llama")
    before = contents(tmp_path / "source")
    message = export_on_rank(str(tmp_path / "source"), str(tmp_path / "source"), "llama", 0, 1)
    assert "would replace the checkpoint it is made from" in str(message)
    assert contents(tmp_path / "source") == before


def lora_model(source: Path):
    """(base parameters by name, peft model) with random factors on every linear layer."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(source)
    base = dict(model.named_parameters())
    torch.manual_seed(2)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False))
    return base, wrapped


def export_lora(source: str, destination: str, block: int) -> None:
    from dcr_scale.models import lora as lora_module

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    base, wrapped = lora_model(Path(source))
    lora_module._BLOCK = block
    deltas = lora_deltas(wrapped)
    changed = {name: parameter for name, parameter in base.items() if parameter in deltas}
    for parameter in changed.values():
        partition(parameter, rank, world_size)
    checkpoint, tensor_map = open_toy(Path(source))
    export_checkpoint(
        Path(destination), checkpoint, tensor_map, changed, deltas=deltas, world=world_of(rank, world_size)
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_merged_lora_equals_peft_and_is_the_same_on_any_ranks(
    tmp_path: Path, ranks: RankPool, architecture: str
) -> None:
    source = tmp_path / "source"
    save_toy(source, architecture)
    for world_size in (1, 3):
        # Blocks of a few rows, so that ranks begin and end inside them.
        ranks.run(export_lora, str(source), str(tmp_path / f"on_{world_size}"), 100, world_size=world_size)
    assert contents(tmp_path / "on_1") == contents(tmp_path / "on_3")

    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    merged = lora_model(source)[1].merge_and_unload().state_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "on_3").state_dict()
    changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(exported[name], original[name])
    per_layer = {"llama": 7, "qwen3-moe": 4 + 3}[architecture]  # with experts: gate_up, down and router
    assert changed == 3 * per_layer


def test_updates_of_weights_stored_transposed_are_transposed() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=12, n_head=2, vocab_size=50))
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    layer = wrapped.base_model.model.transformer.h[0].attn.c_attn
    delta = lora_deltas(wrapped)[layer.base_layer.weight]
    expected = layer.get_delta_weight("default").flatten()
    torch.testing.assert_close(delta.elements(5, expected.numel() - 5), expected[5:])


def test_adapters_that_are_no_plain_low_rank_update_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_toy(tmp_path, "llama")
    for options in ({"use_dora": True}, {"lora_bias": True}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], bias="none", **options))
        with pytest.raises(UserError, match="only plain LoRA"):
            lora_deltas(wrapped)


def test_exported_index_places_every_tensor(tmp_path: Path) -> None:
    save_toy(tmp_path / "source", "llama", sharded=True)
    export_on_rank(str(tmp_path / "source"), str(tmp_path / "out"), "llama", 0, 1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: info.file for name, info in Checkpoint.open(tmp_path / "out").tensors.items()}


def test_a_trained_trunk_survives_the_way_out_and_in(tmp_path: Path) -> None:
    save_toy(tmp_path / "source", "mixtral", sharded=True)
    export_on_rank(str(tmp_path / "source"), str(tmp_path / "out"), "mixtral", 0, 1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    load_weights(model, *open_toy(tmp_path / "out"))
    for name, parameter in changed_model(tmp_path / "source", "mixtral").named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("shape", [(32, 24), (48, 32), (96, 64)])
def test_an_update_is_the_same_on_ranks_with_more_threads(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    delta = LowRankDelta(torch.randn(1, shape[0], 8), torch.randn(1, 8, shape[1]), 2.0)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(delta.elements(0, shape[0] * shape[1]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(values, found[0]) for values in found)
