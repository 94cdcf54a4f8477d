"""Stage 1's loss kept up in stage 2: against plain torch, on any number of ranks and packs, and told what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPool
from toy import toy_checkpoint, toy_settings, write_config
from transformers import AutoModelForCausalLM

from dcr_scale.config import load_config
from dcr_scale.errors import UserError
from dcr_scale.models.checkpoint import Checkpoint

WEIGHT, LAYER, TEMPERATURE = 0.7, 2, 0.2
REHEARSED = [
    "refine=null", "look.enabled=false", "align.rehearsal.batch_size=8", f"align.rehearsal.weight={WEIGHT}",
    f"align.rehearsal.layer={LAYER}", f"align.rehearsal.loss={{temperature: {TEMPERATURE}}}",
    "align.micro_batch_tokens=512",
]  # fmt: skip
# AdamW divides by the gradient's own size; a large eps keeps rounding from deciding signs.
PLAIN = ["align.optimizer.eps=1e-2", "align.optimizer.warmup=0", "align.optimizer.schedule=constant"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    source = toy_checkpoint(tmp_path / "model", "llama")
    return str(write_config(tmp_path, toy_settings(tmp_path, source)))


def trained(config: str, overrides: list[str]) -> tuple[dict[str, torch.Tensor], list[list[Any]]]:
    """On each rank: stage 2's export, and of every step its contrast prompts, which are toxic, its examples, and in how
    many packs they ran."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.align import Aligner
    from dcr_scale.pipeline import Run

    steps: list[list[Any]] = []
    packs: list[Any] = []
    step_of, pack_of = Aligner.train_step, Aligner._pack

    def noted(self: Aligner, step: int) -> float:
        assert self.rehearsal is not None
        share, _ = self.rehearsal.of_step(step)
        asked = [self.rehearsal.prompts.ids[i] for i in share]
        toxic = [self.rehearsal.prompts.prompts[i].label == "toxic" for i in share]
        packs.clear()
        loss = step_of(self, step)
        steps.append([asked, toxic, [self.examples[i] for i in self.sampler.batch(step)], len(packs)])
        return loss

    loaded = load_config(config, overrides)
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(Aligner, "train_step", noted),
        mock.patch.object(Aligner, "_pack", lambda self, *given: packs.append(given) or pack_of(self, *given)),
    ):
        Run(loaded, engines.start(loaded.engine)).run()
    return tensors(loaded.run.folder / "aligned"), steps


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def supcon(rows_ND: torch.Tensor, toxic: list[bool]) -> torch.Tensor:
    """Khosla et al., arXiv 2004.11362, equation 2, one anchor after another."""
    rows_ND = F.normalize(rows_ND, dim=1)
    losses = []
    for i, label in enumerate(toxic):
        others = [j for j in range(len(toxic)) if j != i]
        logits = rows_ND[others] @ rows_ND[i] / TEMPERATURE
        same = torch.tensor([toxic[j] == label for j in others])
        losses.append(-logits.log_softmax(0)[same].mean())
    return torch.stack(losses).mean()


@pytest.mark.slow
def test_a_step_is_what_plain_torch_makes_of_both_losses(tmp_path: Path, config: str, ranks: RankPool) -> None:
    overrides = [*REHEARSED, *PLAIN, "align.epochs=0.01", "align.optimizer.clip=0"]
    ((found, ((asked, toxic, examples, _),)),) = ranks.run(trained, config, overrides, world_size=1, timeout=300.0)
    assert len(asked) == 8 and sum(toxic) == 4

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    summed, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logits = model(torch.tensor([example.ids])).logits[0]
        targets = torch.tensor(example.ids[example.response_start :])
        summed = summed + F.cross_entropy(logits[example.response_start - 1 : -1], targets, reduction="sum")
        count += len(targets)
    last = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER][0, -1] for ids in asked]
    contrastive = supcon(torch.stack(last), toxic)
    (summed / count + WEIGHT * contrastive).backward()

    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (row,) = [row for row in rows if row["stage"] == "align"]
    assert row["rehearsal"] == pytest.approx(contrastive.item(), rel=1e-5)
    assert row["loss"] == pytest.approx(summed.item() / count, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        step = parameter.grad / (parameter.grad.abs() + 1e-2)
        expected = parameter.detach() - 1e-3 * step
        assert torch.allclose(found[name].double().view(step.shape), expected, rtol=0, atol=2e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_run_on_any_number_of_ranks_and_packs(
    tmp_path: Path, config: str, ranks: RankPool, method: str
) -> None:
    overrides = [*REHEARSED, *PLAIN, f"align.method={method}", "align.lora.dropout=0", "align.batch_size=16"]
    overrides.append("engine.persistence_threshold=0")
    results = {}
    for name, size, one_pack, own in (
        ("alone", 1, True, ["align.micro_batch_tokens=2048"]),
        ("packs", 1, False, ["align.micro_batch_tokens=300"]),
        ("ranks", 2, True, []),
        ("recomputed", 4, False, ["model.gradient_checkpointing=true", "align.micro_batch_tokens=160"]),
    ):
        given = [*overrides, *own, f"run.dir={tmp_path / name}"]
        results[name] = ranks.run(trained, config, given, world_size=size, timeout=300.0)
        assert all((step[-1] == 1) == one_pack for _, steps in results[name] for step in steps), name
    alone, source = results["alone"][0][0], tensors(tmp_path / "model")
    for name in ("packs", "ranks", "recomputed"):
        for key, value in results[name][0][0].items():
            moved = (alone[key] - source[key]).abs().max()
            assert (value - alone[key]).abs().max() <= 1e-3 * moved + 1e-7, f"{name}: {key}"


def test_what_is_not_given_is_stage_1s(config: str) -> None:
    refine = ["refine.layer=3", "refine.pooling=mean", "refine.loss={name: circle, gamma: 8}"]
    found = load_config(config, [*refine, "align.rehearsal.weight=0.5"]).rehearsed
    assert found is not None
    assert (found.layer, found.pooling) == (3, "mean")
    assert (found.loss.name, found.loss.gamma) == ("circle", 8)
    own = ["align.rehearsal={weight: 0.5, layer: 1, pooling: last, loss: {name: supcon}}"]
    found = load_config(config, [*refine, *own]).rehearsed
    assert found is not None and (found.layer, found.pooling, found.loss.name) == (1, "last", "supcon")
    alone = load_config(config, ["refine=null", "align.rehearsal={weight: 1, layer: 2}"]).rehearsed
    assert alone is not None and (alone.pooling, alone.loss.name) == ("last", "supcon")
    assert load_config(config, refine).rehearsed is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["refine=null", "align.rehearsal.weight=1"], "needs align.rehearsal.layer where refine is null"),
        (["align.rehearsal={weight: 1, layer: 4}"], "align.rehearsal.layer=4 is beyond the model"),
        (["align.rehearsal={weight: 1, batch_size: 8}"], "align.micro_batch_tokens=64 leaves no room"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(
    config: str, overrides: list[str], message: str, alone: None
) -> None:
    from dcr_scale import engine as engines
    from dcr_scale.pipeline import Run

    with pytest.raises(UserError, match=message):
        loaded = load_config(config, overrides)
        Run(loaded, engines.start(loaded.engine))


@pytest.mark.slow
def test_a_batch_that_ranks_cannot_share_is_refused(config: str, ranks: RankPool) -> None:
    overrides = [*REHEARSED, "align.rehearsal.batch_size=9"]
    with pytest.raises(Exception, match=r"align\.rehearsal\.batch_size"):
        ranks.run(trained, config, overrides, world_size=2, timeout=300.0)
