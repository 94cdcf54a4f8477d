"""One interface: a steering survives its file, fits its model or says so, and leaves no hook behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy import toy_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dcr_scale import baselines
from dcr_scale.baselines.scans import Scans
from dcr_scale.baselines.surgical import Surgical
from dcr_scale.errors import UserError

STEERINGS: dict[str, baselines.Steering] = {
    "surgical": Surgical(4, torch.randn(32), depth=2, position=-1, orthogonal=1.0),
    "scans": Scans(4, torch.randn(1, 32), torch.randn(3, 32), first=1, alpha=1.5, threshold=0.25),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = toy_checkpoint(tmp_path_factory.mktemp("toy"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("method", STEERINGS)
def test_a_steering_survives_its_file(method: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    STEERINGS[method].save(path)
    found = baselines.load(path)
    assert type(found) is type(STEERINGS[method])
    assert found.layers == 4
    assert found.settings() == STEERINGS[method].settings()
    for name, tensor in STEERINGS[method].tensors().items():
        assert torch.equal(found.tensors()[name], tensor)


@pytest.mark.parametrize("method", STEERINGS)
@torch.no_grad()
def test_it_steers_inside_its_context_and_nowhere_else(
    method: str, toy: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = toy
    ids = torch.tensor([[5, 9, 20, 33]])
    before = model(input_ids=ids).logits
    with STEERINGS[method].applied(model, tokenizer):
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(RuntimeError, match="stop"), STEERINGS[method].applied(model, tokenizer):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_for_surgical_rows_and_decisions_mean_nothing(toy: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = toy
    ids = torch.tensor([[5, 9, 20, 33]])
    with STEERINGS["surgical"].applied(model, tokenizer) as applied:
        expected = model(input_ids=ids).logits
        applied.keep([0])
        with applied.decided(ids, torch.ones_like(ids)):
            assert torch.equal(model(input_ids=ids).logits, expected)


def test_vectors_of_another_model_are_refused(toy: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    narrow = Surgical(4, torch.randn(16), depth=2, position=-1, orthogonal=1.0)
    deep = Surgical(5, torch.randn(32), depth=2, position=-1, orthogonal=1.0)
    for steering, said in ((narrow, "4 layers of width 16"), (deep, "5 layers of width 32")):
        with pytest.raises(UserError, match=f"{said}; this model has 4 of width 32"), steering.applied(*toy):
            pass


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        baselines.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        baselines.load(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="no steering"):
        baselines.load(tmp_path / "weights.safetensors")
    newer = {"format": "dcr-steering 2", "method": "scans", "layers": "4", "settings": "{}"}
    save_file({"vectors": torch.zeros(2)}, tmp_path / "newer.safetensors", newer)
    with pytest.raises(UserError, match="'dcr-steering 2' by 'scans'; 'dcr-steering 1' by surgical or scans"):
        baselines.load(tmp_path / "newer.safetensors")
    save_file({"vectors": torch.zeros(2)}, tmp_path / "cut.safetensors", {**newer, "format": "dcr-steering 1"})
    with pytest.raises(UserError, match=r"damaged .*references"):
        baselines.load(tmp_path / "cut.safetensors")
