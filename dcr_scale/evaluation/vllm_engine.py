"""Answers and perplexity by vLLM, where it is installed: an optional engine for GPUs, in one process.

vLLM spreads a model over the process's GPUs itself. What it generates differs from transformers' answers by the
rounding of its kernels, so that two models are compared by one engine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dcr_scale.data.chat import EncodedExample
from dcr_scale.errors import UserError
from dcr_scale.evaluation.generation import Completion
from dcr_scale.evaluation.perplexity import Perplexity
from dcr_scale.world import World

# Prompts handed over at once: vLLM batches them by itself, and what is done is stored after each.
_HANDED_OVER = 1024


def check_usable(world: World) -> None:
    """Raise UserError where vLLM is missing, or ranks were started beside it."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm needs vLLM: pip install -e '.[vllm]' in the repository, or leave out --engine")
    if world.size > 1:
        raise UserError(
            f"--engine vllm spreads the model over the GPUs itself, and {world.size} ranks were started; start it "
            "with python launchers/evaluate.py"
        )


class VllmEngine:
    """A checkpoint folder loaded by vLLM. ``dtype`` is its name, such as bfloat16."""

    def __init__(self, folder: Path, *, dtype: str, trust_remote_code: bool):
        from vllm import LLM

        self.engine = LLM(
            model=str(folder),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
        )

    def completions(self, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[list[Completion]]:
        """Greedy completions, as :func:`~dcr_scale.evaluation.generation.completions` gives them."""
        for at in range(0, len(encoded), _HANDED_OVER):
            outputs = self._run(encoded[at : at + _HANDED_OVER], temperature=0.0, max_tokens=max_new_tokens)
            yield [
                _completion(i, output) for i, output in enumerate((request.outputs[0] for request in outputs), start=at)
            ]

    def perplexity(self, examples: Sequence[EncodedExample]) -> Perplexity:
        """As :func:`~dcr_scale.evaluation.perplexity.perplexity`, from the log-probabilities of prompts."""
        outputs = self._run([example.ids for example in examples], max_tokens=1, prompt_logprobs=0)
        losses = [
            -sum(
                request.prompt_logprobs[at][example.ids[at]].logprob
                for at in range(example.response_start, len(example.ids))
            )
            for example, request in zip(examples, outputs, strict=True)
        ]
        return Perplexity.of(losses, [len(example.ids) - example.response_start for example in examples])

    def _run(self, encoded: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(ids)} for ids in encoded]
        return self.engine.generate(prompts, SamplingParams(**sampling), use_tqdm=False)


def _completion(index: int, output: Any) -> Completion:
    finished = output.finish_reason == "stop"
    # The end token is among them.
    return Completion(index, output.text, len(output.token_ids) - finished, finished)
