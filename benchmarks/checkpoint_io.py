"""Checkpoint bytes in and out under ZeRO-3, against from_pretrained and DeepSpeed's save_16bit_model.

    python benchmarks/checkpoint_io.py --ranks 4 [--width 2048] [--layers 8] [--rounds 3] [--arms ours] [--out FILE]

Makes a Llama-shaped checkpoint of random bf16 weights, loads it on CPU ranks and writes it again with every weight
changed. Each arm runs in fresh processes, the arms take turns; the disk's sequential write, of as many bytes, is
measured between them. Exit code 1 where the ranks together read more than 1.05 times the file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from fresh_ranks import run_on_ranks

ARMS = ("ours", "peer")
LIMIT = 1.05
DISK_SHARE = 0.8
_BLOCK = 32 * 2**20
VOCABULARY = 32000


def counters() -> dict[str, int]:
    """What the kernel counts of this process: bytes through read and write calls (``rchar``, ``wchar``), and bytes
    that storage was asked for (``read_bytes``, which reading mapped files shows in, as the calls do not)."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def memory(field: str) -> int:
    """A size out of /proc/self/status, in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``work`` returns, and on this rank its seconds, bytes, and highest memory above what was held before."""
    import torch.distributed as dist

    # What earlier work has left goes back to the system, or this work would take it up again unseen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Highest from here on.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    held, before = memory("VmRSS"), counters()
    dist.barrier()
    began = time.perf_counter()
    result = work()
    dist.barrier()
    seconds = time.perf_counter() - began
    after = counters()
    found = {name: after[name] - before[name] for name in ("rchar", "wchar", "read_bytes")}
    return result, {"seconds": seconds, "peak_bytes": memory("VmHWM") - held, **found}


# --- the arms, on one rank ---------------------------------------------------------------------------------


def rank_main(arm: str, source: Path, destination: Path) -> None:
    """Load and write; prints a JSON line of all ranks' numbers on rank 0."""
    from dcr_scale import engine as engines
    from dcr_scale.config import EngineConfig

    settings = EngineConfig(precision="bf16", persistence_threshold=0)
    world = engines.start(settings)
    (ours if arm == "ours" else peer)(source, destination, world, settings)
    engines.finish()


def report(world: Any, model: Any, **numbers: dict[str, float]) -> None:
    parameters = list(model.parameters())
    partition = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters)
    every = world.gather({"partition_bytes": partition, **numbers})
    if world.first:
        print(json.dumps(every), flush=True)


def warm_up(settings: Any, world: Any) -> None:
    """What the first model of a process imports and allocates is not what a checkpoint costs; nor are the buffers of
    DeepSpeed's collectives on a CPU, 66 MiB a rank that all share, which a large parameter touches to their end."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dcr_scale import engine as engines

    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with engines.partitioned(settings, torch.bfloat16, world.device):
        AutoModelForCausalLM.from_config(tiny)
        torch.nn.Embedding(1, 2**26)


def ours(source: Path, destination: Path, world: Any, settings: Any) -> None:
    import torch

    from dcr_scale import engine as engines
    from dcr_scale.config import ModelConfig
    from dcr_scale.models.checkpoint import Checkpoint
    from dcr_scale.models.export import export_checkpoint
    from dcr_scale.models.tensor_map import build_tensor_map
    from dcr_scale.models.trunk import build_model, build_skeleton, read_config
    from dcr_scale.models.verified_loading import load_verified
    from dcr_scale.models.weights import own_part

    def load() -> Any:
        config = read_config(source, ModelConfig())
        with engines.partitioned(settings, torch.bfloat16, world.device):
            model = build_model(config, attention="sdpa", dtype=torch.bfloat16)
        checkpoint = Checkpoint.open(source)
        tensor_map = build_tensor_map(build_skeleton(config), checkpoint)
        load_verified(model, checkpoint, tensor_map, world)
        return model, checkpoint, tensor_map

    warm_up(settings, world)
    (model, checkpoint, tensor_map), loaded = measured(load)
    for parameter in model.parameters():
        own_part(parameter).values.neg_()
    changed = dict(model.named_parameters())
    _, written = measured(lambda: export_checkpoint(destination, checkpoint, tensor_map, changed, world=world))
    report(world, model, load=loaded, export=written)


def peer(source: Path, destination: Path, world: Any, settings: Any) -> None:
    """As transformers and DeepSpeed do it by themselves."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from dcr_scale import engine as engines
    from dcr_scale.config import OptimizerConfig

    config = engines.deepspeed_config(settings, OptimizerConfig(), torch.bfloat16, world.device)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    # Kept alive: it is by this object that from_pretrained knows of ZeRO-3.
    known = HfDeepSpeedConfig(config)
    warm_up(settings, world)
    model, loaded = measured(lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16))
    assert known.is_zero3() and all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    # It saves training engines only. One small parameter trains, so that no optimiser's state weighs in.
    model.requires_grad_(False)
    model.get_parameter("model.norm.weight").requires_grad_(True)
    optimizer = torch.optim.AdamW([model.get_parameter("model.norm.weight")])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def save() -> None:
        engine.save_16bit_model(str(destination), "pytorch_model.bin")
        if world.first:
            # Ours is on the disk when it returns.
            for path in destination.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    _, written = measured(save)
    report(world, model, load=loaded, export=written)


# --- the run -----------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, width: int, layers: int) -> tuple[int, int]:
    """A Llama's random bf16 weights, a layer in each shard, with a manifest; bytes of all files and of the largest
    tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dcr_scale.models.checkpoint import Checkpoint
    from dcr_scale.models.manifest import MANIFEST_FILE, Manifest, hash_file

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else name
        parts.setdefault(part, []).append(name)
    index = {}
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    checkpoint = Checkpoint.open(folder)
    hashes = {name: hash_file(folder / t.file, t.start, t.nbytes) for name, t in checkpoint.tensors.items()}
    (folder / MANIFEST_FILE).write_text(Manifest.of_folder(checkpoint, hashes).text(), encoding="utf-8")
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")), 2 * max(s.numel() for s in shapes.values())


def forget(folder: Path) -> None:
    """Take the folder's files out of the page cache, so that they are read from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_write_rate(path: Path, nbytes: int) -> float:
    """Bytes a second of one file written from end to end and made durable."""
    block = os.urandom(_BLOCK)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for begin in range(0, nbytes, _BLOCK):
            file.write(block[: nbytes - begin])
        os.fsync(file.fileno())
    rate = nbytes / (time.perf_counter() - began)
    path.unlink()
    return rate


def launch(arm: str, ranks: int, source: Path, destination: Path) -> list[dict]:
    """Run one arm: each rank's numbers."""
    environment = {
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        # What is freed leaves the process at once, so that its highest size is what was held, not what was kept.
        "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": "0",
    }  # fmt: skip
    return run_on_ranks(__file__, arm, ["--source", str(source), "--destination", str(destination)], ranks, environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048, help="hidden size of the model; a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path)
    for hidden in ("--arm", "--source", "--destination"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        rank_main(given.arm, Path(given.source), Path(given.destination))
        return 0

    import torch

    from dcr_scale.world import device_name

    torch.set_num_threads(1)
    rounds: dict[str, list[list[dict]]] = {arm: [] for arm in given.arms}
    disk: list[float] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        nbytes, largest = make_checkpoint(folder / "source", given.width, given.layers)
        for number in range(given.rounds):
            for arm in given.arms:
                forget(folder / "source")
                disk.append(disk_write_rate(folder / "sequential", nbytes))
                destination = folder / f"{arm}_{number}"
                rounds[arm].append(launch(arm, given.ranks, folder / "source", destination))
                for path in sorted(destination.rglob("*"), reverse=True):
                    path.unlink()
    result = {
        "benchmark": "checkpoint_io",
        "device": device_name(torch.device("cpu")),
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers", "safetensors")},
        "shape": {"width": given.width, "layers": given.layers, "vocabulary": VOCABULARY, "dtype": "bfloat16"},
        "ranks": given.ranks,
        "rounds": given.rounds,
        "checkpoint_bytes": nbytes,
        "largest_tensor_bytes": largest,
        "disk_write_MBps": round(statistics.median(disk) / 1e6, 1),
        **{arm: summary(rounds[arm], nbytes) for arm in given.arms},
    }
    ratio = None
    if "ours" in given.arms:
        load, export = result["ours"]["load"], result["ours"]["export"]
        ratio = load["bytes_read_ratio"]
        share = round(export["MBps"] / result["disk_write_MBps"], 3)
        bound = result["ours"]["partition_bytes"] + largest
        result["export_share_of_disk_write"] = share
        result["targets_hold"] = {
            f"bytes_read_ratio at most {LIMIT}": ratio <= LIMIT,
            "load's peak at most a partition and the largest tensor": load["peak_bytes_a_rank"] <= bound,
            "export's peak at most the largest tensor": export["peak_bytes_a_rank"] <= largest,
            f"export at least {DISK_SHARE} of the disk's sequential write": share >= DISK_SHARE,
        }
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if ratio is not None:
        print(f"bytes_read_ratio {ratio} (at most {LIMIT})")
    return int(ratio is not None and ratio > LIMIT)


def summary(rounds: list[list[dict]], nbytes: int) -> dict[str, Any]:
    """Medians over rounds; of the ranks' bytes the sum, of their memory the largest."""
    found: dict[str, Any] = {"partition_bytes": max(rank["partition_bytes"] for rank in rounds[0])}
    for part, moved in (("load", "rchar"), ("export", "wchar")):
        times = [max(rank[part]["seconds"] for rank in ranks) for ranks in rounds]
        seconds = statistics.median(times)
        found[part] = {
            "seconds": round(seconds, 2),
            "seconds_rounds": [round(value, 2) for value in times],
            "MBps": round(nbytes / seconds / 1e6, 1),
            "peak_bytes_a_rank": max(rank[part]["peak_bytes"] for ranks in rounds for rank in ranks),
            f"bytes_{'read' if part == 'load' else 'written'}_ratio": round(
                statistics.median(sum(rank[part][moved] for rank in ranks) / nbytes for ranks in rounds), 4
            ),
            "bytes_read_from_storage_ratio": round(
                statistics.median(sum(rank[part]["read_bytes"] for rank in ranks) / nbytes for ranks in rounds), 4
            ),
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
