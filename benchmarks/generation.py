"""Greedy answers a second: ours against ``model.generate`` on the same prompts, as evaluations take them.

    python benchmarks/generation.py --prompts 48 --out benchmarks/results/generation_cpu.json

Prompts are the built-in contrast set's; the model is SmolLM2-135M-Instruct. The arms take turns. Seconds are those of
the process (user and system time), so that a machine that others share counts for little. All arms should give the same
answers: the benchmark says how many differ.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

from dcr_scale.config import ContrastSource, ModelConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.sources import read_rows
from dcr_scale.data.splitting import seeded_order
from dcr_scale.evaluation.generation import completions, dense_attention
from dcr_scale.models import attention
from dcr_scale.models.checkpoint import resolve
from dcr_scale.models.loading import open_source, read_tokenizer
from dcr_scale.models.trunk import build_model, read_config
from dcr_scale.models.weights import load_weights
from dcr_scale.world import World, device_name, versions

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generation_cpu.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)

    settings = ModelConfig()
    folder = resolve(settings)
    config = read_config(folder, settings)
    stored = open_source(folder, config, settings)
    model = build_model(config, attention=attention.SDPA, dtype=torch.float32).eval()
    load_weights(model, stored.checkpoint, stored.tensor_map)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = read_tokenizer(folder, settings)
    texts = [row.values["prompt"] for row in read_rows(ContrastSource(), kind="contrast")]
    encoder = ChatEncoder(tokenizer)
    encoded = [encoder.encode(text) for text in seeded_order(texts, str, seed=0, purpose="benchmark")[: given.prompts]]

    def ours(batch_size: int) -> dict[int, str]:
        found = completions(
            model,
            tokenizer,
            encoded,
            max_new_tokens=given.new_tokens,
            batch_size=batch_size,
            partitioned=False,
            world=ALONE,
        )
        return {done.index: done.text for batch in found for done in batch}

    def theirs(batch_size: int) -> dict[int, str]:
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=given.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=model.generation_config.eos_token_id,
        )
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found: dict[int, str] = {}
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            longest = max(len(encoded[i]) for i in batch)
            ids = torch.tensor([[0] * (longest - len(encoded[i])) + encoded[i] for i in batch])
            mask = torch.tensor([[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
            with dense_attention(model), torch.no_grad():
                output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
            texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            found.update(zip(batch, texts, strict=True))
        return found

    arms: dict[str, tuple[Callable[[int], dict[int, str]], int]] = {
        "model.generate, 16 at once": (theirs, 16),
        "model.generate, 64 at once": (theirs, 64),
        "ours, 64 at once": (ours, 64),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, dict[int, str]] = {}
    for _ in range(given.rounds):
        for name, (arm, batch_size) in arms.items():
            began = time.process_time()
            answers[name] = arm(batch_size)
            seconds[name].append(time.process_time() - began)
            print(f"{name}: {seconds[name][-1]:.1f} s of the processor", flush=True)
    tokens = sum(
        len(tokenizer(text, add_special_tokens=False).input_ids) for text in answers["ours, 64 at once"].values()
    )
    found = {
        "device": device_name(ALONE.device),
        **versions(),
        "model": folder.name,
        "dtype": "float32",
        "prompts": len(encoded),
        "prompt_tokens": sum(map(len, encoded)),
        "new_tokens": given.new_tokens,
        "generated_tokens": tokens,
        "processor_seconds": {name: [round(s, 2) for s in each] for name, each in seconds.items()},
        "tokens_per_second": {name: round(tokens / min(each), 1) for name, each in seconds.items()},
        "answers_unlike_ours": {
            name: sum(text != answers["ours, 64 at once"][i] for i, text in mine.items())
            for name, mine in answers.items()
        },
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    best = found["tokens_per_second"]
    for name, rate in best.items():
        print(f"{name:<28} {rate:>7} new tok/s   ours is {best['ours, 64 at once'] / rate:.2f} x")


if __name__ == "__main__":
    main()
