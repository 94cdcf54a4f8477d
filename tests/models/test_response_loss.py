"""Stage 2's loss: it comes without all logits at once, and is the plain one's in value and gradient."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPool
from toy import VOCABULARY, toy_checkpoint, toy_settings, write_config
from transformers import AutoModelForCausalLM, Gemma2Config

from dcr_scale.data.packing import Pack, pack
from dcr_scale.models import attention, response_loss
from dcr_scale.models.response_loss import HeadLoss, ResponseLoss


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three rows of logits at a time; the rows of each pass that came so, in order."""
    seen: list[int] = []
    plain = HeadLoss.apply

    def counted(hidden_ND, *rest):
        seen.append(len(hidden_ND))
        return plain(hidden_ND, *rest)

    monkeypatch.setattr(response_loss, "_AT_ONCE", 3 * VOCABULARY)
    monkeypatch.setattr(HeadLoss, "apply", counted)
    return seen


def examples() -> Pack:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (9, 14, 6)]
    return pack(rows, response_starts=[3, 2, 4])


def value_and_gradients(loss: ResponseLoss, batch: Pack) -> tuple[float, dict[str, torch.Tensor]]:
    loss.zero_grad()
    value = loss(batch)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_in_parts_is_the_plain_one_within_its_own_rounding(
    dtype: torch.dtype, bias: bool, trains: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((50, 16), (70, 16), (70,))]
    rounded = [tensor.to(dtype) for tensor in exact[: 3 if bias else 2]]
    targets = torch.randint(70, (50,), generator=generator)

    def run(loss, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        hidden, *head = (tensor.detach().clone() for tensor in inputs)
        for tensor in (hidden, *head) if trains else (hidden,):
            tensor.requires_grad_()
        value = loss(hidden, *head, *[None] * (2 - len(head)))
        (3 * value).backward()
        return [value.detach().double(), *(x.grad.double() for x in (hidden, *head) if x.requires_grad)]

    def plain(hidden: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        logits = F.linear(hidden, weight, offset)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")

    ours = run(lambda *inputs: HeadLoss.apply(*inputs, targets, 7), rounded)
    theirs = run(plain, rounded)
    in_double = run(plain, [tensor.double() for tensor in rounded])
    assert len(ours) == (2 if not trains else 4 if bias else 3)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for own, other, true in zip(ours, theirs, in_double, strict=True):
        error, plain_error = (own - true).norm(), (other - true).norm()
        # Eight parts of a weight's gradient are rounded where the plain one is once.
        assert error <= 2 * plain_error + 4 * eps * true.norm()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_a_models_loss_comes_in_parts(tmp_path, few_rows: list[int], trains: bool) -> None:
    folder = toy_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.SDPA, dtype=torch.float32)
    loss, batch = ResponseLoss(model), examples()
    model.get_output_embeddings().weight.requires_grad_(trains)
    before = value_and_gradients(loss, batch)
    assert few_rows == []
    loss(batch, torch.arange(4))
    after = value_and_gradients(loss, batch)
    assert few_rows == [int(batch.labels.ne(-100).sum())]
    assert after[0] == pytest.approx(before[0], rel=1e-6)
    assert after[1].keys() == before[1].keys()
    assert ("model.lm_head.weight" in after[1]) == trains
    for name, gradient in before[1].items():
        torch.testing.assert_close(after[1][name], gradient, rtol=1e-4, atol=1e-5)
    # The head is a head again.
    assert loss(batch, torch.arange(4)).shape == (4, VOCABULARY)


def test_logits_that_a_model_caps_behind_its_head_are_not_taken_for_the_heads(few_rows: list[int]) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.SDPA)
    loss, batch = ResponseLoss(model), examples()
    model.get_output_embeddings().weight.requires_grad_(False)
    before = loss(batch).item()
    loss(batch, torch.arange(4))
    assert loss(batch).item() == before
    assert few_rows == []


def aligned_losses(config: str, folder: str, at_once: int) -> tuple[list[float], int]:
    """On each rank: stage 2's losses, with so many logits made at once, and how many losses came in parts."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import load_config
    from dcr_scale.pipeline import Run

    loaded = load_config(config, [f"run.dir={folder}"])
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(response_loss, "_AT_ONCE", at_once),
        mock.patch.object(HeadLoss, "apply", side_effect=HeadLoss.apply) as parts,
    ):
        Run(loaded, engines.start(loaded.engine)).run()
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"] == "align"], parts.call_count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_under_zero3_a_gathered_head_gives_the_same_losses_in_parts(
    tmp_path: Path, ranks: RankPool, method: str
) -> None:
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model"))
    settings["refine"] = None
    settings["look"] = {"enabled": False}
    settings["engine"]["persistence_threshold"] = 0
    settings["align"] |= {"method": method, "examples": 12}
    config = str(write_config(tmp_path, settings))
    found = {}
    for at_once in (2**26, 3 * VOCABULARY):
        own = str(tmp_path / str(at_once))
        found[at_once] = ranks.run(aligned_losses, config, own, at_once, world_size=2, timeout=300.0)[0]
    (plain, none), (parted, some) = found.values()
    assert none == 0 and some >= len(parted) == 3
    assert parted == pytest.approx(plain, rel=1e-5)
