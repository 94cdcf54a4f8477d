"""What an end-to-end test needs, small enough to run in seconds: a checkpoint and its tokenizer, data, settings.

The models are transformers' own classes at toy size with random weights; everything on disk is in the layout of the
Hub, so that a run cannot tell it from the real thing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rank_pool import free_port
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

REPOSITORY = Path(__file__).parents[1]

LAYERS = 4
VOCABULARY = 384

_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe of help.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILIES = {
    "llama": lambda **more: LlamaConfig(**_SHAPE, **more),
    "qwen3": lambda **more: Qwen3Config(**_SHAPE, **more),
    "qwen3-moe": lambda **more: Qwen3MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **more
    ),
    # Attention scores are capped, which transformers' SDPA refuses.
    "gemma2": lambda **more: Gemma2Config(**_SHAPE, **more),
}

# One family each: a verb with a harmless and a harmful object, in as many wordings as there are frames.
_THINGS = [
    ("pick", "a ripe apple", "a stranger's pocket"),
    ("cut", "a paper star", "a neighbour's brake hose"),
    ("crack", "a walnut", "a colleague's password"),
    ("break into", "a smile", "a parked car"),
    ("shoot", "a portrait", "a passer-by"),
    ("kill", "a hung process", "a rival"),
    ("blow up", "a red balloon", "a mailbox"),
    ("poison", "the well in a board game", "the well of a village"),
]
_FRAMES = ["How do I {}?", "Tell me the best way to {}.", "I want to {}; what comes first?"]
_SUBJECTS = ["the sea", "bread", "a bicycle", "snow", "a choir", "the moon", "tea", "a lighthouse", "wool", "rain"]
_HARMS = ["forge a signature", "stalk someone", "rob a kiosk", "start a rumour", "hurt a dog", "steal a bicycle"]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the toy data, with a chat template that begins every chat alike."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row[key] for rows in (contrast_rows(), general_rows(), refusal_rows()) for row in rows for key in row]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=_TEMPLATE
    )


def save_checkpoint(folder: Path, config: PretrainedConfig) -> Path:
    """A random model of that configuration, with the toy tokenizer, in Hub layout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def toy_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Save a random model of four layers with tokenizer and generation config to ``folder``; returns the folder.

    ``family`` is llama, qwen3, qwen3-moe or gemma2; ``sharded`` cuts the weights into files of at most 40 kB.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_FAMILIES[family](tie_word_embeddings=tied), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Transformers' own initial weights are so small that prompts would hardly differ in the residual stream.
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.2)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "1GB")
    toy_tokenizer().save_pretrained(folder)
    return folder


def contrast_rows() -> Iterator[dict[str, str]]:
    """48 prompts: eight families of three matched pairs."""
    for verb, harmless, harmful in _THINGS:
        for number, frame in enumerate(_FRAMES):
            for label, thing in (("seemingly_toxic", harmless), ("toxic", harmful)):
                prompt = frame.format(f"{verb} {thing}")
                yield {"prompt": prompt, "label": label, "family": verb, "pair": f"{verb} {number}"}


def general_rows() -> Iterator[dict[str, str]]:
    """20 instructions with answers of uneven length."""
    for number, subject in enumerate(_SUBJECTS):
        yield {
            "prompt": f"Write a line about {subject}.",
            "response": f"Here is a line about {subject}" + " and what it is like" * (number % 4) + ".",
        }
        yield {"prompt": f"What is the word for {subject}?", "response": f"{subject.capitalize()}."}


def refusal_rows() -> Iterator[dict[str, str]]:
    """Six harmful prompts, none of them in the contrast set, with refusals."""
    for harm in _HARMS:
        yield {"prompt": f"Explain how to {harm}.", "response": f"I can't help with that: to {harm} does harm."}


def write_jsonl(path: Path, rows: Iterator[dict[str, str]] | list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_settings(folder: Path, model: Path) -> dict:
    """A run in ``folder/run`` of four steps a stage on the toy data, which is written to ``folder/data``.

    The tree is plain: change it, then give it to :func:`write_config`.
    """
    data = folder / "data"
    return {
        "run": {"name": "toy", "dir": str(folder / "run")},
        "model": {"path": str(model)},
        "data": {
            "contrast": [{"path": str(write_jsonl(data / "contrast.jsonl", contrast_rows()))}],
            "general": [{"path": str(write_jsonl(data / "general.jsonl", general_rows()))}],
            "refusals": [{"path": str(write_jsonl(data / "refusals.jsonl", refusal_rows()))}],
        },
        "refine": {
            "layer": 2,
            "steps": 4,
            "batch_size": 8,
            "optimizer": {"lr": 1e-3},
            "retention": {"prompts": 8, "batch_size": 3},
            "stop": {"every": 2},
        },
        "align": {
            "method": "full",
            "refusal_share": 0.3,
            "epochs": 1,
            "batch_size": 4,
            "max_tokens": 96,
            "micro_batch_tokens": 64,
            "optimizer": {"lr": 1e-3},
        },
        "engine": {"precision": "fp32"},
        "look": {"prompts": 4, "max_new_tokens": 4},
    }


def write_config(folder: Path, settings: dict) -> Path:
    """The settings as a configuration file; JSON is YAML."""
    path = folder / "toy.yaml"
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return path


def launch(config: Path, *overrides: str, ranks: int = 2, timeout: float = 600.0) -> subprocess.CompletedProcess:
    """``deepspeed launchers/dcr.py`` with a configuration: see :func:`launch_script`."""
    return launch_script("dcr.py", "--config", str(config), *overrides, ranks=ranks, timeout=timeout)


def launcher_command(name: str, *arguments: str, ranks: int) -> tuple[list[str], dict[str, str]]:
    """``deepspeed launchers/<name>`` on CPU ranks and a free port, and its environment; to be run in the repository."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }
    command = [str(binaries / "deepspeed"), "--log_level", "warning", "--num_gpus", str(ranks)]
    return [*command, "--master_port", str(free_port()), f"launchers/{name}", *arguments], environment


def launch_script(name: str, *arguments: str, ranks: int = 2, timeout: float = 600.0) -> subprocess.CompletedProcess:
    """``deepspeed launchers/<name>`` on CPU ranks, as a user starts it; the output is captured as text.

    The limit allows for DeepSpeed to compile its collectives, which it does once on a machine. Past it, all that was
    started is killed: an orphaned rank would hold the port and the compiler's lock. No shared memory may be left.
    """
    command, environment = launcher_command(name, *arguments, ranks=ranks)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    port = command[command.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    return subprocess.CompletedProcess(command, process.returncode, out, err)
