"""Every setting of a run: one tree of dataclasses, one YAML file, ``key=value`` overrides.

This file is the reference: the second argument of each ``setting`` says what the field means. DeepSpeed's own
configuration is derived from this tree in :mod:`dcr_scale.engine`. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dcr_scale import typed_yaml
from dcr_scale.errors import UserError
from dcr_scale.typed_yaml import setting

Label = Literal["seemingly_toxic", "toxic"]


@dataclass
class RunConfig:
    name: str = setting("dcr", "name of the run; its folder is runs/<name> unless dir says otherwise")
    dir: str | None = setting(None, "the run's folder; null: runs/<name>")
    seed: int = setting(0, "seeds sampling, the held-out split and LoRA's initial weights", at_least=0)

    @property
    def folder(self) -> Path:
        return Path(self.dir) if self.dir is not None else Path("runs") / self.name


@dataclass
class ModelConfig:
    path: str = setting("smollm2-135m-instruct", "local folder, Hub id, or the embedded smollm2-135m-instruct")
    revision: str | None = setting(None, "branch, tag or commit of a Hub id; null: its default branch")
    attention: Literal["auto", "flash_attn", "torch_varlen", "sdpa"] = setting(
        "auto", "kernel for packed batches; auto: flash-attn, else torch's varlen kernel on a GPU, else SDPA"
    )
    gradient_checkpointing: bool = setting(False, "recompute each layer in the backward pass to save memory")
    trust_remote_code: bool = setting(False, "run Python code that comes with the checkpoint")
    allow_pickle: bool = setting(False, "accept pytorch_model.bin files, which can run code when they are read")
    template: dict[str, bool | int | str] = setting(
        dict, "what the chat template is told beside the messages, such as {enable_thinking: false}"
    )


@dataclass
class Columns:
    """Which column of a file or Hub data set holds what; null: found by the usual names."""

    prompt: str | None = setting(None, "the prompt, or an instruction")
    input: str | None = setting(None, "text appended to the instruction (Alpaca's second column)")
    response: str | None = setting(None, "the answer or the refusal")
    label: str | None = setting(None, "the class of a contrast prompt")
    family: str | None = setting(None, "which prompts belong together: the held-out split never divides a family")
    pair: str | None = setting(None, "which two contrast prompts are a matched pair")


@dataclass
class Source:
    """Where prompts come from: ``builtin``, a JSONL, CSV or Parquet file, or ``hub:owner/name``. In ``data.contrast``
    also ``general``: the prompts of ``data.general`` that are trained on. In ``data.answered`` also ``own``: seemingly
    toxic prompts of ``data.contrast`` that are trained on, with the model's own answers from before it is trained."""

    path: str = setting("builtin", "builtin, a .jsonl, .csv or .parquet file, or hub:owner/name")
    split: str = setting("train", "split of a Hub data set")
    subset: str | None = setting(None, "configuration of a Hub data set that has several")
    revision: str | None = setting(None, "branch, tag or commit of a Hub data set; null: its default branch")
    columns: Columns = setting(Columns, "the source's own column names")
    limit: int | None = setting(None, "take at most so many rows, drawn by the run's seed", at_least=1)


@dataclass
class ContrastSource(Source):
    label: Label | None = setting(None, "the class of every row, for a source without a label column")
    labels: dict[str, Label | None] | None = setting(
        None, "the source's label values to ours; null drops a value's rows; unset: the usual names"
    )


@dataclass
class DataConfig:
    contrast: list[ContrastSource] = setting(lambda: [ContrastSource()], "stage 1's prompts, both classes")
    general: list[Source] = setting(lambda: [Source()], "general instructions with answers")
    refusals: list[Source] = setting(lambda: [Source()], "toxic prompts with refusals, for stage 2")
    answered: list[Source] = setting(list, "seemingly toxic prompts with answers, for stage 2; [] is none")
    answer_tokens: int = setting(
        64,
        "longest answer of the model's own (path: own); a longer one is cut after a sentence, and the model learns to "
        "end its turn there",
        at_least=8,
    )
    heldout: float = setting(0.2, "share of each class kept out of training, by whole families", above=0, at_most=0.5)
    heldout_limit: int = setting(400, "at most so many held-out prompts a class", at_least=1)
    max_prompt_tokens: int = setting(256, "longest prompt, chat template included", at_least=8)
    overlong: Literal["error", "drop"] = setting("error", "what to do with a prompt that is longer")
    system_prompt: str | None = setting(None, "system message of every chat; null: what the template puts itself")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = setting(2e-5, "peak learning rate", above=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of the first and second moment")
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", at_least=0)
    warmup: float = setting(0.1, "share of the steps over which the rate rises from 0", at_least=0, at_most=1)
    schedule: Literal["constant", "linear", "cosine"] = setting("linear", "shape of the rate after warm-up")
    final: float = setting(0.0, "the rate at the last step as a share of the peak", at_least=0, at_most=1)
    clip: float = setting(1.0, "clip the gradient's global norm here; 0: never", at_least=0)


@dataclass
class LossConfig:
    name: Literal["circle", "supcon"] = setting(
        "supcon", "contrastive loss over the global batch; the paper's is circle"
    )
    margin: float = setting(0.25, "Circle loss: relaxation m", at_least=0, at_most=1)
    gamma: float = setting(32.0, "Circle loss: scale γ", above=0)
    temperature: float = setting(0.1, "SupCon: temperature τ", above=0)


@dataclass
class RetentionConfig:
    """Holds the layer-ℓ activations of general prompts near their original values."""

    weight: float = setting(1.0, "weight of the term beside the contrastive loss; 0 turns it off", at_least=0)
    prompts: int = setting(256, "general prompts whose original activations are kept", at_least=1)
    batch_size: int = setting(8, "general prompts a step, over all ranks", at_least=1)
    memory_gib: float = setting(4.0, "per rank; original activations beyond it go to a file", at_least=0)


@dataclass
class StopConfig:
    """When stage 1 has done its work; judged on held-out prompts."""

    every: int = setting(10, "steps between two looks at the held-out prompts", at_least=1)
    cross_cosine: float | None = setting(
        0.1, "stop when the mean cosine between the classes is under this; null: never", at_least=-1, at_most=1
    )
    patience: int = setting(4, "stop after so many looks without progress; 0: never", at_least=0)
    min_delta: float = setting(0.01, "progress is a fall of the cross-class cosine by this much", at_least=0)


@dataclass
class RefineConfig:
    """Stage 1: contrastive refinement of the trunk."""

    layer: int | Literal["auto"] = setting(
        12, "ℓ: the trunk is the embedding and the first ℓ layers; auto: chosen before stage 1 by the probe", at_least=1
    )
    pooling: Literal["last", "mean"] = setting(
        "last", "which of a prompt's activations stand for it: its last token's, or the mean over its own tokens"
    )
    loss: LossConfig = setting(LossConfig, "the contrastive loss")
    steps: int = setting(60, "optimiser steps at most", at_least=1)
    batch_size: int = setting(32, "contrast prompts a step, over all ranks", at_least=4)
    toxic_share: float = setting(0.5, "share of toxic prompts in a batch", above=0, at_most=0.9)
    sampling: Literal["auto", "matched", "independent"] = setting(
        "auto", "matched: both sides of a pair in one batch; auto: matched where every prompt has a partner"
    )
    micro_batch_tokens: int | None = setting(
        None,
        "tokens of one pack on one rank: a larger batch takes two passes over several packs, at the memory of one and "
        "with the same gradient; null: one pass over all",
        at_least=16,
    )
    train_embeddings: bool = setting(False, "train the input embedding as well; never where it is tied to the head")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "optimiser and schedule")
    retention: RetentionConfig = setting(RetentionConfig, "the retention term")
    stop: StopConfig = setting(StopConfig, "early stopping")

    @property
    def chosen_layer(self) -> int:
        """ℓ as a number: ``auto`` has given way to one before stage 1 begins."""
        assert self.layer != "auto", "refine.layer=auto has not been resolved yet"
        return self.layer


@dataclass
class LoraConfig:
    r: int = setting(8, "rank of the update", at_least=1)
    alpha: float = setting(16.0, "the update is scaled by alpha / r", above=0)
    dropout: float = setting(0.05, "dropout on the adapter's input", at_least=0, at_most=0.9)
    targets: list[str] | None = setting(None, "names of linear modules; null: every linear layer but the head")
    export: Literal["merged", "adapter", "both"] = setting(
        "merged", "what stage 2 leaves: a checkpoint with the adapters merged in, the adapters in peft's form, or both"
    )


@dataclass
class RehearsalConfig:
    """Keeps stage 1's contrastive loss up beside stage 2's own, so that what stage 1 pulled apart stays apart."""

    weight: float = setting(0.0, "weight of the contrastive loss beside the mean loss of a token; 0: none", at_least=0)
    batch_size: int = setting(16, "contrast prompts a step, over all ranks, half of them toxic", at_least=4)
    layer: int | None = setting(None, "ℓ, where activations are taken; null: refine.layer", at_least=1)
    pooling: Literal["last", "mean"] | None = setting(None, "null: refine.pooling, or last where refine is null")
    loss: LossConfig | None = setting(
        None, "null: refine.loss, or the default where refine is null; what is given is all of it, refine.loss aside"
    )


@dataclass
class AlignConfig:
    """Stage 2: supervised safety alignment."""

    method: Literal["lora", "full"] = setting("lora", "train low-rank adapters, merged on export, or everything")
    lora: LoraConfig = setting(LoraConfig, "the adapters")
    examples: int | None = setting(None, "size of the mixture; null: as many as the sources give", at_least=1)
    refusal_share: float = setting(0.05, "share of (toxic prompt, refusal) examples", at_least=0, at_most=1)
    answered_share: float = setting(0.0, "share of examples out of data.answered", at_least=0, at_most=1)
    epochs: float = setting(3.0, "passes over the mixture", above=0)
    batch_size: int = setting(128, "examples a step, over all ranks", at_least=1)
    max_tokens: int = setting(256, "longest example; a longer response is cut there", at_least=16)
    micro_batch_tokens: int = setting(4096, "tokens of one packed micro-batch on one rank", at_least=16)
    optimizer: OptimizerConfig = setting(lambda: OptimizerConfig(lr=3e-4), "optimiser and schedule")
    rehearsal: RehearsalConfig = setting(RehearsalConfig, "stage 1's loss, kept up")


@dataclass
class EngineConfig:
    """What DeepSpeed's configuration is derived from."""

    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on a GPU that computes in it, else fp32")
    persistence_threshold: int = setting(
        100_000, "parameters of fewer elements are kept whole on every rank", at_least=0
    )
    persistence_total: int = setting(50_000_000, "and at most so many elements in all are kept whole", at_least=0)
    reduce_bucket: int = setting(50_000_000, "elements of gradients reduced at once", at_least=1)
    prefetch_bucket: int = setting(50_000_000, "elements of parameters gathered ahead", at_least=0)
    max_live: int = setting(1_000_000_000, "elements of gathered parameters alive at once", at_least=1)
    non_finite: Literal["stop", "skip"] = setting("stop", "what a non-finite loss or gradient norm does to the run")
    max_skipped: int = setting(3, "with skip: stop after so many skipped steps in a row", at_least=1)
    timeout_minutes: float = setting(30.0, "how long a rank waits for the others before it gives up", above=0)
    offload_optimizer: Literal["none", "cpu", "nvme"] = setting(
        "none", "where masters and moments live between updates: on the device, in the host's memory, or on its disk"
    )
    offload_parameters: Literal["none", "cpu"] = setting(
        "none", "where partitions of the parameters live while no layer needs them"
    )
    offload_folder: str | None = setting(None, "folder on a local NVMe disk, for offload_optimizer=nvme")


@dataclass
class CheckpointConfig:
    """States of a stage's training from which the same command goes on after an interruption."""

    every: int | None = setting(
        20, "steps between two; null or 0: only when the run is told to stop (SIGTERM, SIGUSR1)", at_least=0
    )
    keep_last: int = setting(2, "so many of a stage's latest are kept, until the stage is done", at_least=1)
    keep_every: int | None = setting(
        None, "and, for good, those after every so many steps (a multiple of every); null: none", at_least=1
    )


@dataclass
class ProfileConfig:
    """Traces of each stage's steps by torch's profiler, in <run>/profile/."""

    steps: int = setting(0, "so many optimiser steps are traced, on rank 0; 0: none", at_least=0)
    after: int = setting(3, "steps before the traced ones", at_least=0)


@dataclass
class LookConfig:
    """The first look at the effect: before stage 1, after it, and after stage 2."""

    enabled: bool = setting(True, "take the look")
    prompts: int = setting(32, "held-out prompts a class", at_least=1)
    max_new_tokens: int = setting(24, "tokens generated for a prompt", at_least=1)
    batch_size: int = setting(16, "prompts generated at once on one rank", at_least=1)
    layer: int | None = setting(None, "where cosines are taken; null: refine.layer, else 0.4 of the depth", at_least=1)
    partitioned: Literal["auto", "yes", "no"] = setting(
        "auto", "spread the model over the ranks; auto: where one device cannot hold it"
    )


@dataclass
class ProbeConfig:
    """Kernel similarity and refusal probability of held-out prompts, measured through both stages."""

    every: int | None = setting(
        None, "steps between two measurements, beside those at a stage's start and end; null or 0: no probe", at_least=0
    )
    pairs: int = setting(8, "pairs of prompts of each kind whose kernel similarity is measured", at_least=2)
    prompts: int = setting(32, "prompts of each class whose refusal probability is measured", at_least=1)
    rank: int = setting(16, "rows of each of the two projections that sketch a gradient", at_least=1)
    groups: int = setting(4, "independent sketches of a gradient", at_least=1)
    output_probes: int = setting(4, "random directions of the logits; the time grows with them", at_least=2)
    seed: int = setting(0, "draws projections and directions; the same in runs whose curves are compared", at_least=0)
    micro_batch_tokens: int = setting(1024, "tokens of one pass on one rank", at_least=16)


@dataclass
class LogConfig:
    every: int = setting(1, "steps between two lines on the console; metrics.jsonl has them all", at_least=1)
    trackers: list[Literal["tensorboard", "wandb"]] = setting(list, "also log to these ([tracking] extra)")
    project: str = setting("dcr-scale", "project name for wandb")


@dataclass
class Config:
    run: RunConfig = setting(RunConfig, "the run")
    model: ModelConfig = setting(ModelConfig, "the checkpoint to refine")
    data: DataConfig = setting(DataConfig, "prompts and answers")
    refine: RefineConfig | None = setting(RefineConfig, "stage 1; null skips it, which leaves safety tuning alone")
    align: AlignConfig | None = setting(AlignConfig, "stage 2; null skips it")
    engine: EngineConfig = setting(EngineConfig, "DeepSpeed ZeRO-3")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "what an interrupted run goes on from")
    look: LookConfig = setting(LookConfig, "the first look at the effect")
    probe: ProbeConfig = setting(ProbeConfig, "what is measured while the stages run")
    log: LogConfig = setting(LogConfig, "console and trackers")
    profile: ProfileConfig = setting(ProfileConfig, "where the time of a step goes")

    @property
    def rehearsed(self) -> Rehearsed | None:
        """What stage 2 rehearses, ``refine``'s settings in the place of those not given; None where it does not.

        ``refine.layer: auto`` must have given way to a number.
        """
        refine, align = self.refine, self.align
        if align is None or not align.rehearsal.weight:
            return None
        own = align.rehearsal
        layer = own.layer if own.layer is not None or refine is None else refine.chosen_layer
        assert layer is not None, "align.rehearsal.layer has not been checked"
        pooling = own.pooling or (refine.pooling if refine is not None else "last")
        loss = own.loss or (refine.loss if refine is not None else LossConfig())
        return Rehearsed(own.batch_size, layer, pooling, loss)


class Rehearsed(NamedTuple):
    """What stage 2 rehearses: a :class:`RehearsalConfig` whose every setting has a value."""

    batch_size: int
    layer: int
    pooling: Literal["last", "mean"]
    loss: LossConfig


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Read, override, type-check and cross-check a configuration. Raises UserError with one line."""
    config = typed_yaml.load(Config, path, overrides)
    if config.refine is None and config.align is None:
        raise UserError(f"{path}: refine and align are both null: there is nothing to do")
    if config.align is not None:
        _check_shares(config.data, config.align)
        _check_adapters(config.align)
        if config.align.rehearsal.weight and config.align.rehearsal.layer is None and config.refine is None:
            raise UserError(f"{path}: align.rehearsal needs align.rehearsal.layer where refine is null")
    if config.engine.offload_optimizer == "nvme" and config.engine.offload_folder is None:
        raise UserError(f"{path}: engine.offload_optimizer=nvme needs engine.offload_folder, on a local NVMe disk")
    if config.checkpoint.keep_every and (
        not config.checkpoint.every or config.checkpoint.keep_every % config.checkpoint.every
    ):
        raise UserError(
            f"{path}: checkpoint.keep_every={config.checkpoint.keep_every} is no multiple of checkpoint.every="
            f"{config.checkpoint.every}"
        )
    if config.probe.groups == 1 and config.probe.rank % 2:
        raise UserError(f"{path}: probe.rank={config.probe.rank} must be even where probe.groups is 1")
    return config


def _check_adapters(align: AlignConfig) -> None:
    if align.method == "full" and align.lora.export != "merged":
        raise UserError(
            f"align.lora.export={align.lora.export}, but align.method=full trains no adapters; set align.method=lora"
        )


def _check_shares(data: DataConfig, align: AlignConfig) -> None:
    """Raise UserError where stage 2's mixture cannot be made, whatever its sources hold."""
    if bool(data.answered) != (align.answered_share > 0):
        raise UserError(
            f"data.answered has {len(data.answered)} sources and align.answered_share={align.answered_share:g}: give "
            "both or neither"
        )
    if align.refusal_share + align.answered_share > 1:
        raise UserError(
            f"align.refusal_share={align.refusal_share:g} and align.answered_share={align.answered_share:g} are more "
            "than the whole mixture; lower one"
        )
