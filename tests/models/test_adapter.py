"""Adapters beside the model: peft loads what was trained, whatever the ranks, and a failure leaves the old ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from toy_checkpoints import open_toy, save_toy, world_of
from transformers import AutoModelForCausalLM

from dcr_scale.config import LoraConfig
from dcr_scale.errors import UserError
from dcr_scale.models import disk, verify
from dcr_scale.models.adapter import export_adapter
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.lora import lora_deltas

SETTINGS = LoraConfig(r=3, alpha=7.0, dropout=0.0)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(source: Path, targets: list[str]) -> tuple[dict[str, torch.nn.Parameter], torch.nn.Module]:
    """(base parameters by name, the model with random adapters), as stage 2 makes them."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(source)
    base = dict(model.named_parameters())
    torch.manual_seed(3)
    settings = peft.LoraConfig(
        r=SETTINGS.r, lora_alpha=SETTINGS.alpha, target_modules=targets, init_lora_weights=False, lora_dropout=0.0
    )
    return base, peft.inject_adapter_in_model(settings, model)


@pytest.mark.parametrize(
    "targets", [LINEAR, ["model.layers.1.self_attn.q_proj"]], ids=["every linear layer", "one of a kind"]
)
def test_peft_loads_it_and_computes_what_the_merged_export_computes(tmp_path: Path, targets: list[str]) -> None:
    import peft

    source, merged, folder = (tmp_path / name for name in ("source", "merged", "adapter"))
    save_toy(source, "llama")
    base, model = adapted(source, targets)
    export_adapter(folder, model, SETTINGS, str(source), world=world_of(), extra_files={"README.md": "An adapter.\n"})
    deltas = lora_deltas(model)
    changed = {name: parameter for name, parameter in base.items() if parameter in deltas}
    export_checkpoint(merged, *open_toy(source), changed, deltas=deltas, world=world_of())

    ids = torch.arange(1, 60)[None]
    plain = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        before = plain(ids).logits
        loaded = peft.PeftModel.from_pretrained(plain, folder)
        expected = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        found = loaded(ids).logits
    # Weights of unit variance amplify float32's rounding: the adapter's effect is the measure.
    effect = float((expected - before).abs().max())
    assert effect > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * effect)
    assert loaded.peft_config["default"].base_model_name_or_path == str(source)
    wrapped = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(wrapped) == (21 if targets == LINEAR else 1)
    assert (folder / "README.md").read_text() == "An adapter.\n"
    assert not list(verify.damage(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_failure_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_toy(tmp_path / "source", "llama")
    _, model = adapted(tmp_path / "source", LINEAR)
    export_adapter(tmp_path / "adapter", model, SETTINGS, "base", world=world_of())
    before = contents(tmp_path / "adapter")

    def full_disk(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", full_disk)
        with pytest.raises(UserError, match=r"No space left on device; .* free space or set run.dir"):
            export_adapter(tmp_path / "adapter", model, SETTINGS, "other", world=world_of())
    assert contents(tmp_path / "adapter") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]


def test_what_peft_could_not_load_is_refused(tmp_path: Path) -> None:
    import peft

    save_toy(tmp_path / "source", "qwen3-moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="holds no adapter"):
        export_adapter(tmp_path / "adapter", model, SETTINGS, "base", world=world_of())
    settings = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.inject_adapter_in_model(settings, model)
    with pytest.raises(UserError, match=r"down_proj: an adapter of fused experts .* merge it"):
        export_adapter(tmp_path / "adapter", model, SETTINGS, "base", world=world_of())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def under_zero(source: str, destination: str) -> int:
    """On each rank: adapters of a partitioned model, exported; how many parameters were whole at once."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import peft
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings), no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    torch.manual_seed(3)
    lora = peft.LoraConfig(r=3, lora_alpha=7.0, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(lora, model)
    # Adapters become partitioned when an engine takes the model.
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    most = 0

    def gather(parameters: list[torch.nn.Parameter]):
        nonlocal most
        assert all(hasattr(parameter, "ds_id") for parameter in parameters)
        most = max(most, len(parameters))
        return deepspeed.zero.GatheredParameters(parameters)

    export_adapter(Path(destination), model, SETTINGS, "base", world=world, gather=gather)
    return most


@pytest.mark.slow
def test_partitioned_factors_are_gathered_one_at_a_time(tmp_path: Path, ranks: RankPool) -> None:
    source = tmp_path / "source"
    save_toy(source, "llama")
    assert ranks.run(under_zero, str(source), str(tmp_path / "two"), world_size=2, timeout=300.0) == [1, 1]
    _, model = adapted(source, ["q_proj", "up_proj"])
    export_adapter(tmp_path / "one", model, SETTINGS, "base", world=world_of())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def on_private_disks(source: str, root: str) -> None:
    from dcr_scale.models import phases

    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    _, model = adapted(Path(source), LINEAR)
    waiting, phases._VISIBLE_SECONDS = phases._VISIBLE_SECONDS, 0.5
    try:
        export_adapter(Path(root) / f"disk_{world.rank // 2}" / "adapter", model, SETTINGS, "base", world=world)
    finally:
        phases._VISIBLE_SECONDS = waiting


def test_every_disk_gets_the_adapter(tmp_path: Path, ranks: RankPool) -> None:
    save_toy(tmp_path / "source", "llama")
    ranks.run(on_private_disks, str(tmp_path / "source"), str(tmp_path), world_size=3)
    first, second = (contents(tmp_path / f"disk_{number}" / "adapter") for number in (0, 1))
    assert first == second and "adapter_model.safetensors" in first
