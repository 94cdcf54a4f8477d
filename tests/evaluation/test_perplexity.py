"""Perplexity: exp of the mean −log p over answers alone, whatever shares a batch."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from toy import general_rows, toy_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.evaluation.perplexity import Perplexity, perplexity
from dcr_scale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = toy_checkpoint(tmp_path_factory.mktemp("toy"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = ChatEncoder(tokenizer)
    examples = [encoder.encode_example(row["prompt"], row["response"], max_tokens=96) for row in general_rows()]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer, [example for example in examples if example is not None]


@torch.no_grad()
def one_by_one(model: torch.nn.Module, examples: list[EncodedExample]) -> tuple[float, int]:
    loss, tokens = 0.0, 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        for at in range(example.response_start, len(example.ids)):
            loss -= float(logits[at - 1, example.ids[at]])
            tokens += 1
    return loss, tokens


def test_it_is_that_of_answers_one_by_one(loaded: tuple) -> None:
    model, tokenizer, examples = loaded
    found = perplexity(model, tokenizer, examples, partitioned=False, world=ALONE)
    loss, tokens = one_by_one(model, examples)
    assert found.interval.estimate == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert (found.examples, found.tokens) == (len(examples), tokens)
    assert found.interval.low < found.interval.estimate < found.interval.high


def test_a_steering_is_told_where_the_prompts_end(loaded: tuple) -> None:
    """Answers are taught, not generated, so that hooks cannot tell a prompt's end by themselves."""
    model, tokenizer, examples = loaded
    told: list[list[list[int]]] = []

    class Applied:
        @contextmanager
        def decided(self, ids, mask):
            rows = zip(ids.tolist(), mask.tolist(), strict=True)
            told.append([[t for t, own in zip(*row, strict=True) if own] for row in rows])
            yield

    class Steering:
        @contextmanager
        def applied(self, model, tokenizer):
            yield Applied()

    perplexity(model, tokenizer, examples, partitioned=False, world=ALONE, steering=Steering())  # type: ignore[arg-type]
    prompts = [example.ids[: example.response_start] for example in examples]
    assert sorted(row for batch in told for row in batch) == sorted(prompts)


def test_long_answers_count_by_their_tokens() -> None:
    found = Perplexity.of([2.0, 30.0], [2, 10])
    assert found.interval.estimate == pytest.approx(math.exp(32 / 12))
