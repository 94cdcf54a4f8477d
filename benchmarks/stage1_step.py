"""Stage 1's step against the obvious way to write it, under the same ZeRO-3, on the same prompts and ranks.

    python benchmarks/stage1_step.py [--ranks 2] [--rounds 3] [--steps 6] [--out FILE] [key=value ...]

*ours* is :class:`dcr_scale.refine.Refiner` itself, retention off: the trunk alone, padding-free packs with the shared
prefix held once, the loss of dcr_kernels. *peer* is what one would write first: the whole causal language model,
padded batches, ``output_hidden_states``, pytorch-metric-learning's CircleLoss over gathered rows, the tail frozen.

Each arm runs in fresh processes, the arms take turns, and the ratio is the median over rounds. Tokens are those of the
prompts with their chat template, the same number for both arms; memory is the peak above what imports take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from importlib import metadata
from pathlib import Path

from fresh_ranks import run_on_ranks

ARMS = ("ours", "peer")


def rank_main(arm: str, steps: int, overrides: list[str]) -> None:
    """One rank of one arm: prints a JSON line on rank 0."""
    import torch
    from transformers import AutoTokenizer

    from dcr_scale import engine as engines
    from dcr_scale.config import load_config
    from dcr_scale.data.chat import ChatEncoder
    from dcr_scale.data.contrast import encode_contrast, load_contrast
    from dcr_scale.models.checkpoint import Checkpoint, resolve
    from dcr_scale.models.stored import StoredModel
    from dcr_scale.models.tensor_map import build_tensor_map
    from dcr_scale.models.trunk import build_skeleton, read_config
    from dcr_scale.refine import Refiner
    from dcr_scale.runlog import RunLog, configure_console

    config = load_config(Path(__file__).parents[1] / "configs" / "demo.yaml", ["refine.retention.weight=0", *overrides])
    world = engines.start(config.engine)
    configure_console(rank=1)
    folder = resolve(config.model)
    model_config = read_config(folder, config.model)
    checkpoint = Checkpoint.open(folder)
    model = StoredModel(model_config, checkpoint, build_tensor_map(build_skeleton(model_config), checkpoint))
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder))
    contrast = encode_contrast(load_contrast(config.data, config.run.seed), encoder)
    encoded = contrast.train.ids
    imports = _memory(world.device)
    if arm == "ours":
        config.run.dir = os.environ["DCR_BENCHMARK_FOLDER"]
        runlog = RunLog(config.log, config.run.folder, "benchmark", {}, world)
        refiner = Refiner(config, model, contrast, [], encoder.prefix, runlog, world)
        step, sampler = refiner.train_step, refiner.sampler
    else:
        peer = Peer(config, model, contrast.train, world)
        step, sampler = peer.train_step, peer.sampler
    seconds = []
    for number in range(steps + 1):
        world.barrier()
        began = time.perf_counter()
        step(number)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        world.barrier()
        seconds.append(time.perf_counter() - began)
    # The first step allocates and traces; it is no step of a run.
    tokens = [sum(len(encoded[i]) for i in sampler.batch(number)) for number in range(1, steps + 1)]
    (peak,) = world.max(_memory(world.device, peak=True) - imports)
    if world.first:
        rate = statistics.median(t / s for t, s in zip(tokens, seconds[1:], strict=True))
        print(json.dumps({"tokens_per_second": rate, "peak_gib": peak, "seconds": seconds[1:]}), flush=True)
    engines.finish()


class Peer:
    """Stage 1 as one would write it first."""

    def __init__(self, config, stored, contrast, world):
        from pytorch_metric_learning.losses import CircleLoss
        from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

        from dcr_scale import engine as engines
        from dcr_scale.data.sampler import ContrastSampler
        from dcr_scale.models.trunk import build_model, decoder_layers
        from dcr_scale.models.weights import load_weights

        self.settings, self.world = config.refine, world
        self.prompts, self.train_ids = contrast.prompts, contrast.ids
        self.sampler = ContrastSampler(
            self.prompts,
            batch_size=self.settings.batch_size,
            toxic_share=self.settings.toxic_share,
            sampling=self.settings.sampling,
            seed=config.run.seed,
        )
        dtype = engines.compute_dtype(config.engine, world.device)
        with engines.partitioned(config.engine, dtype, world.device):
            model = build_model(stored.config, attention="sdpa", dtype=dtype)
        load_weights(model, stored.checkpoint, stored.tensor_map)
        trained = {id(p) for layer in decoder_layers(model)[: self.settings.layer] for p in layer.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        loss = CircleLoss(m=self.settings.loss.margin, gamma=self.settings.loss.gamma)
        self.loss = DistributedLossWrapper(loss) if world.size > 1 else loss
        self.engine = engines.Engine(model, config.engine, self.settings.optimizer, self.settings.steps, world)

    def train_step(self, number: int) -> None:
        import torch

        from dcr_scale.data.sampler import shard

        own = shard(self.sampler.batch(number), self.world.rank, self.world.size)
        longest = max(len(self.train_ids[i]) for i in own)
        ids = torch.zeros(len(own), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(own):
            ids[row, : len(self.train_ids[i])] = torch.tensor(self.train_ids[i])
            mask[row, : len(self.train_ids[i])] = 1
        ids, mask = ids.to(self.world.device), mask.to(self.world.device)
        output = self.engine(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        hidden = output.hidden_states[self.settings.layer]
        pooled = hidden[torch.arange(len(own), device=ids.device), mask.sum(1) - 1]
        labels = torch.tensor([int(self.prompts[i].label == "toxic") for i in own], device=ids.device)
        loss = self.loss(pooled.float(), labels)
        self.engine.backward(loss)
        self.engine.step(float(loss.detach()))


def _memory(device, peak: bool = False) -> float:
    """GiB: resident on the CPU, allocated on the GPU."""
    import psutil
    import torch

    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)) / 2**30
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return psutil.Process().memory_info().rss / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over configs/demo.yaml")
    arguments = parser.parse_args()
    if arguments.arm:
        rank_main(arguments.arm, arguments.steps, arguments.overrides)
        return

    import tempfile

    import torch

    from dcr_scale.world import device_name

    rounds: list[dict[str, dict]] = []
    with tempfile.TemporaryDirectory() as folder:

        def launch(arm: str) -> dict:
            options = ["--steps", str(arguments.steps), *arguments.overrides]
            return run_on_ranks(__file__, arm, options, arguments.ranks, {"DCR_BENCHMARK_FOLDER": folder})

        for _ in range(arguments.rounds):
            rounds.append({arm: launch(arm) for arm in ARMS})
    speed = [r["ours"]["tokens_per_second"] / r["peer"]["tokens_per_second"] for r in rounds]
    memory = [r["ours"]["peak_gib"] / r["peer"]["peak_gib"] for r in rounds]
    result = {
        "benchmark": "stage1_step",
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "ranks": arguments.ranks,
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
        "python": platform.python_version(),
        "overrides": arguments.overrides,
        "speed_ratio": round(statistics.median(speed), 3),
        "speed_ratio_rounds": [round(ratio, 3) for ratio in speed],
        "memory_ratio": round(statistics.median(memory), 3),
        **{
            arm: {
                "tokens_per_second": round(statistics.median(r[arm]["tokens_per_second"] for r in rounds), 1),
                "peak_gib_above_imports": round(statistics.median(r[arm]["peak_gib"] for r in rounds), 3),
            }
            for arm in ARMS
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
