"""What benchmarks/train.py measures, each arm on one rank of its own process: our two stages, and TRL's SFTTrainer.

An arm's function runs steps that warm up and the measured ones, and returns what :class:`Steps` has noted of them.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from dcr_scale import engine as engines
from dcr_scale.align import Aligner, encode_mixture
from dcr_scale.config import Config
from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.data.contrast import EncodedContrast, encode_contrast
from dcr_scale.data.packing import micro_batches
from dcr_scale.errors import UserError
from dcr_scale.models.loading import open_source, read_tokenizer
from dcr_scale.models.lora import adapter_config
from dcr_scale.models.packing_check import check_packing
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import read_config
from dcr_scale.planning.arithmetic import Arithmetic, plan_arithmetic
from dcr_scale.planning.modules import ModuleList, trunk_modules, whole_modules
from dcr_scale.planning.workload import Work
from dcr_scale.refine import Refiner
from dcr_scale.run_data import load_data
from dcr_scale.runlog import RunLog, configure_console
from dcr_scale.world import World

# The first two passes are slow: DeepSpeed traces the modules, and buffers are allocated.
WARM_UP = 2


@dataclass
class Steps:
    """Seconds, tokens and FLOPs of the measured steps on this rank, by the clock that suits it.

    On one CPU rank that is the process's own time, user and system, so that others on the machine count for little; on
    several ranks, which wait for each other, and on a GPU it is the wall's.
    """

    world: World
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    arithmetic: list[Arithmetic] = field(default_factory=list)

    def clock(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.by_processor else time.perf_counter()

    @property
    def by_processor(self) -> bool:
        return self.world.size == 1 and self.world.device.type == "cpu"

    def time(self, step: Callable[[], object]) -> None:
        self.world.barrier()
        began = self.clock()
        step()
        self.world.barrier()
        self.seconds.append(self.clock() - began)

    def figures(self, gemm_flops: float) -> dict[str, float]:
        """Rates over all measured steps and ranks. ``gemm_flops``: what a rank's device computes a second at best."""
        tokens, responses = self.world.sum(sum(self.tokens), sum(self.response_tokens))
        (seconds,) = self.world.max(sum(self.seconds))
        found = {"tokens_per_second": tokens / seconds, "tokens_per_step": tokens / len(self.seconds)}
        if responses:
            found["response_tokens_per_second"] = responses / seconds
        if self.arithmetic:
            for name in ("model", "device"):
                (flops,) = self.world.sum(sum(getattr(step, name) for step in self.arithmetic))
                share = flops / self.world.size / seconds / gemm_flops
                found["mfu" if name == "model" else "computed_share_of_gemm"] = share
        return found


def gemm_rate(steps: Steps, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product in ``dtype`` on this rank's device, all ranks at once: the fastest of five."""
    size = 8192 if steps.world.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=steps.world.device).to(dtype) for _ in range(2))
    probe = Steps(steps.world)
    for _ in range(6):
        probe.time(lambda: left @ right)
    (slowest,) = steps.world.max(min(probe.seconds[1:]))
    return 2 * size**3 / slowest


def memory_gib(device: torch.device, *, peak: bool = False) -> float:
    """Allocated on the GPU, or resident on the CPU, now or at its peak."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)) / 2**30
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return psutil.Process().memory_info().rss / 2**30


# --- our stages --------------------------------------------------------------------------------------------


def refine_steps(
    config: Config, model: StoredModel, contrast: EncodedContrast, retained: list[list[int]], prefix: int, steps: Steps,
    count: int,
) -> None:  # fmt: skip
    """Stage 1's own steps. Its tokens are those of the prompts, the shared prefix counted in each."""
    settings, world = config.refine, steps.world
    assert settings is not None
    modules = trunk_modules(model.config, settings)
    with tempfile.TemporaryDirectory() as folder:
        runlog = RunLog(config.log, Path(folder), "benchmark", {}, world)
        refiner = Refiner(config, model, contrast, retained, prefix, runlog, world)
        # A run begins with it: DeepSpeed's trace of the passes is then as it is there.
        check_packing(refiner.activations, refiner.heldout.ids[:2], prefix, world.device)
        for number in range(count + WARM_UP):
            packs = refiner.packs.of_step(number)
            if number >= WARM_UP:
                lengths = [part.batch.layout.lengths for part in packs]
                steps.tokens.append(sum(prefix + length for pack in lengths for length in pack))
                steps.arithmetic.append(
                    _arithmetic(modules, model.config, config, prefix, lengths, twice=len(packs) > 1)
                )
                steps.response_tokens.append(0)
            steps.time(lambda number=number: refiner.train_step(number))
        del steps.seconds[:WARM_UP]
        runlog.close()


def align_steps(
    config: Config, model: StoredModel, examples: list[EncodedExample], prefix: int, steps: Steps, count: int
) -> None:
    """Stage 2's own steps. Its tokens are those of the examples, the shared prefix counted in each."""
    settings, world = config.align, steps.world
    assert settings is not None
    if settings.rehearsal.weight:
        raise UserError("stage 2 is timed without rehearsal: leave align.rehearsal.weight at 0")
    modules = whole_modules(model.config, settings)
    with tempfile.TemporaryDirectory() as folder:
        runlog = RunLog(config.log, Path(folder), "benchmark", {}, world)
        aligner = Aligner(config, model, examples, prefix, runlog, world)
        aligner.engine.train(True)
        for number in range(count + WARM_UP):
            if number >= WARM_UP:
                drawn = [examples[i] for i in aligner.sampler.batch(number)]
                costs = [len(example.ids) - prefix for example in drawn]
                plan = micro_batches(costs, world_size=world.size, limit=settings.micro_batch_tokens)
                own = [drawn[i] for pack in plan[world.rank] for i in pack]
                responses = sum(len(example.ids) - example.response_start for example in own)
                steps.tokens.append(sum(len(example.ids) for example in own))
                steps.response_tokens.append(responses)
                lengths = [tuple(costs[i] for i in pack) for pack in plan[world.rank]]
                steps.arithmetic.append(_arithmetic(modules, model.config, config, prefix, lengths, responses))
            steps.time(lambda number=number: aligner.train_step(number))
        del steps.seconds[:WARM_UP]
        runlog.close()


def _arithmetic(
    modules: ModuleList, model: PretrainedConfig, config: Config, prefix: int, lengths: Sequence[Sequence[int]],
    responses: int = 0, *, twice: bool = False,
) -> Arithmetic:  # fmt: skip
    """FLOPs of one step's packs on one rank: of the layers that run, the prefix as often as it runs."""
    packs = tuple(tuple(pack) for pack in lengths)
    work = Work(prefix, 1, packs, tuple(() for _ in packs), (responses,), twice, sum(map(len, packs)))
    return plan_arithmetic(modules, model, work, checkpointing=config.model.gradient_checkpointing)


# --- TRL's -------------------------------------------------------------------------------------------------


def trl_steps(arm: str, config: Config, folder: Path, examples: list[EncodedExample], steps: Steps, count: int) -> None:
    """TRL's trainer on the same examples, under the DeepSpeed configuration that stage 2 derives.

    Unpacked: padded rows, as many examples a step as ours. Packed: rows of ``align.micro_batch_tokens``, cut
    by TRL, as many a step as hold most nearly the tokens of ours. TRL's fused head scores every position of a row but
    on Triton devices, where it scores those with a label alone: "response rows" has it do so anywhere.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings, world = config.align, steps.world
    assert settings is not None
    dtype = engines.compute_dtype(config.engine, world.device)
    packed, batch = arm != "TRL unpacked", settings.batch_size // world.size
    if arm == "TRL packed, response rows":
        trl.trainer.utils._use_triton = lambda device: True
    mean = sum(len(example.ids) for example in examples) / len(examples)
    # Packed rows one at a time, each as long as our micro-batch; padded ones eight at once, its trainer's default.
    rows = 1 if packed else math.gcd(batch, 8)
    accumulated = max(1, round(batch * mean / settings.micro_batch_tokens)) if packed else batch // rows
    deepspeed = engines.deepspeed_config(config.engine, settings.optimizer, dtype, world.device)
    deepspeed |= {"train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": accumulated}
    output = tempfile.TemporaryDirectory()
    arguments = SFTConfig(
        output_dir=output.name,
        deepspeed=deepspeed,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        max_steps=count + WARM_UP,
        packing=packed,
        max_length=settings.micro_batch_tokens if packed else settings.max_tokens,
        completion_only_loss=True,
        gradient_checkpointing=config.model.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        use_cpu=world.device.type == "cpu",
        optim="adamw_torch_fused",
        learning_rate=settings.optimizer.lr,
        max_grad_norm=settings.optimizer.clip,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    # Built under the arguments' ZeRO-3, partitioned as it is read.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    adapters = None
    if settings.method == "lora":
        adapters = adapter_config(settings.lora, model)
        adapters.task_type = "CAUSAL_LM"

    class Clock(TrainerCallback):
        """Ends of updates: between two of them lies all that an update takes, its data included."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *unused: Any, **named: Any) -> None:
            world.barrier()
            self.ends.append(steps.clock())

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            if len(clock.ends) >= WARM_UP:
                mask = inputs.get("attention_mask")
                steps.tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
                steps.response_tokens.append(int((inputs["labels"] != -100).sum()))
            return super().training_step(model, inputs, *rest, **named)

    clock = Clock()
    columns = [
        {
            "input_ids": example.ids,
            "labels": [-100] * example.response_start + example.ids[example.response_start :],
        }
        for example in examples
    ]
    trainer = Counting(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(columns),
        processing_class=read_tokenizer(folder, config.model),
        peft_config=adapters,
        callbacks=[clock],
    )
    trainer.train()
    measured = clock.ends[WARM_UP - 1 :]
    steps.seconds += [end - began for began, end in zip(measured, measured[1:], strict=False)]
    output.cleanup()


# --- one arm in one process --------------------------------------------------------------------------------


def run_arm(arm: str, config: Config, folder: Path, count: int, contrast: EncodedContrast | None = None) -> dict:
    """Measure an arm on this rank, which joins the others; the figures of all ranks together.

    ``contrast``: stage 1's prompts in token ids; None: the configuration's, encoded by the model's tokenizer.
    """
    world = engines.start(config.engine)
    configure_console(rank=1)
    transformers_logging.set_verbosity_error()
    steps = Steps(world)
    model = open_source(folder, read_config(folder, config.model), config.model)
    prefix, retained, examples = 0, [], []
    if contrast is None:
        encoder = ChatEncoder(read_tokenizer(folder, config.model))
        prefix, data = encoder.prefix, load_data(config)
        contrast = encode_contrast(data.contrast, encoder)
        assert config.refine is not None and config.align is not None
        general = [instruction.prompt for instruction in data.general.train[: config.refine.retention.prompts]]
        retained = [ids for ids in encoder.encode_prompts(general, "general prompts") if ids is not None]
        _, examples = encode_mixture(data.mixture, encoder, config.align, world.size)
    dtype = engines.compute_dtype(config.engine, world.device)
    rate = gemm_rate(steps, dtype)
    imports = memory_gib(world.device)
    if arm == "stage 1":
        refine_steps(config, model, contrast, retained, prefix, steps, count)
    elif arm == "stage 2":
        align_steps(config, model, examples, prefix, steps, count)
    else:
        trl_steps(arm, config, folder, examples, steps, count)
    (peak,) = world.max(memory_gib(world.device, peak=True) - imports)
    figures = steps.figures(rate) | {
        "gemm_TFLOPs": rate / 1e12,
        "peak_gib": peak,
        "seconds": steps.seconds,
        "clock": "processor" if steps.by_processor else "wall",
    }
    engines.finish()
    return figures
