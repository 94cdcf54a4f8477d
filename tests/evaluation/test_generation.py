"""Generation: token for token what transformers' own greedy search gives, whatever was saved on the way."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from toy import VOCABULARY, contrast_rows, toy_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dcr_scale.data.chat import ChatEncoder
from dcr_scale.evaluation.generation import Completion, batches, completions, generate
from dcr_scale.models import attention
from dcr_scale.world import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
NEW = 12
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load(folder: Path) -> Loaded:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["llama", "qwen3-moe"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(toy_checkpoint(tmp_path_factory.mktemp("toy"), request.param))


def chats(tokenizer: PreTrainedTokenizerBase, count: int = 18) -> list[list[int]]:
    """Prompts of uneven length behind one header."""
    encoder = ChatEncoder(tokenizer)
    return [encoder.encode(row["prompt"] * (1 + i % 3)) for i, row in enumerate(contrast_rows())][:count]


@cache
def by_transformers(model: PreTrainedModel, ids: tuple[int, ...], ends: tuple[int, ...]) -> list[int]:
    """At most NEW new tokens of one prompt alone, its end token included."""
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=[*ends], pad_token_id=0)
    prompt = torch.tensor([ids])
    output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return output[0, len(ids) :].tolist()


def common_tokens(model: PreTrainedModel, encoded: list[list[int]]) -> list[int]:
    """End tokens by which some answers stop early, at different places, and others never."""
    # No token has the last id.
    answers = [by_transformers(model, tuple(ids), (VOCABULARY,)) for ids in encoded]
    counts = {token: sum(token in answer for answer in answers) for answer in answers for token in answer}
    token = min(counts, key=lambda token: abs(counts[token] - len(answers) / 2))
    assert 0 < counts[token] < len(answers), "the toy model's answers are all alike"
    return [token]


def check_equal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, found: list[Completion], encoded: list[list[int]]
) -> None:
    ends = model.generation_config.eos_token_id
    ends = (*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id)
    assert sorted(done.index for done in found) == list(range(len(encoded)))
    for done in found:
        expected = by_transformers(model, tuple(encoded[done.index]), ends)
        ended = expected[-1] in ends
        expected = expected[:-1] if ended else expected
        assert done.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert (done.tokens, done.finished) == (len(expected), ended)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_it_is_greedy_search(loaded: Loaded, batch_size: int) -> None:
    """With rows that leave early and others that stay, a shared beginning, and padding."""
    model, tokenizer = loaded
    encoded = chats(tokenizer)
    model.generation_config.eos_token_id = common_tokens(model, encoded)
    found = completions(
        model, tokenizer, encoded, max_new_tokens=NEW, batch_size=batch_size, partitioned=False, world=ALONE
    )
    check_equal(model, tokenizer, [done for batch in found for done in batch], encoded)


def test_prompts_that_share_nothing_and_one_alone(loaded: Loaded) -> None:
    model, tokenizer = loaded
    encoded = [[7, 8, 9, 10], [11, 12], [13]]
    for prompts in (encoded, [[7], [7]], []):
        found = completions(model, tokenizer, prompts, max_new_tokens=NEW, batch_size=4, partitioned=False, world=ALONE)
        check_equal(model, tokenizer, [done for batch in found for done in batch], prompts)


@pytest.mark.parametrize("window", [16, 512])
def test_sliding_windows_and_capped_scores(tmp_path: Path, window: int) -> None:
    """A window shorter than the prompts must not count the padding behind a shared beginning as distance."""
    folder = toy_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=window, attn_logit_softcapping=5.0, bos_token_id=0,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    encoded = chats(tokenizer, 8)
    found = completions(model, tokenizer, encoded, max_new_tokens=NEW, batch_size=8, partitioned=False, world=ALONE)
    check_equal(model, tokenizer, [done for batch in found for done in batch], encoded)


class Signs:
    """Adds or subtracts a vector after a layer, by the sign that each row got when its prompt ran."""

    def __init__(self, layer: torch.nn.Module):
        self.signs = torch.empty(0)
        layer.register_forward_hook(self.steer)

    def steer(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] > 1:
            self.signs = output[:, -1, 0].sign()
        return output + 3 * self.signs[:, None, None]

    def keep(self, rows: torch.Tensor) -> None:
        self.signs = self.signs[rows]


def test_hooks_follow_their_rows(tmp_path: Path) -> None:
    model, tokenizer = load(toy_checkpoint(tmp_path))
    encoded = chats(tokenizer)
    hooks = Signs(model.model.layers[1])
    model.generation_config.eos_token_id = common_tokens(model, encoded)
    found = completions(
        model, tokenizer, encoded, max_new_tokens=NEW, batch_size=64, partitioned=False, world=ALONE, hooks=hooks
    )
    check_equal(model, tokenizer, [done for batch in found for done in batch], encoded)


def test_a_model_keeps_its_own_attention(loaded: Loaded) -> None:
    model, tokenizer = loaded
    model.set_attn_implementation(attention.SDPA)
    generate(model, tokenizer, chats(tokenizer, 3), max_new_tokens=2, batch_size=2, partitioned=False, world=ALONE)
    assert model.config._attn_implementation == attention.SDPA
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("prompts, batch_size, ranks", [(10, 4, 1), (10, 4, 2), (3, 64, 2), (65, 64, 2), (2, 4, 4)])
def test_ranks_get_equal_work_longest_first(prompts: int, batch_size: int, ranks: int) -> None:
    lengths = [(7 * i) % 31 for i in range(prompts)]
    plan = batches(lengths, batch_size, ranks)
    assert sorted(i for batch in plan for i in batch) == list(range(prompts))
    assert max(map(len, plan)) <= batch_size and max(map(len, plan)) - min(map(len, plan)) <= 1
    assert len(plan) % ranks == 0 or prompts < ranks
    ordered = [lengths[i] for batch in plan for i in batch]
    assert ordered == sorted(lengths, reverse=True)


def on_ranks(folder: str, partitioned: bool, prompts: int, ends: list[int]) -> list[str]:
    import os
    from unittest import mock

    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import EngineConfig, ModelConfig
    from dcr_scale.models.loading import Placement, open_source
    from dcr_scale.models.trunk import read_config

    settings = EngineConfig(persistence_threshold=0)
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        world = engines.start(settings)
    model_config = ModelConfig(path=folder)
    stored = open_source(Path(folder), read_config(Path(folder), model_config), model_config)
    placement = Placement(partitioned, attention.SDPA, torch.float32, settings, world)
    model = placement.load(stored, model_config)
    model.generation_config.eos_token_id = ends
    placement.runnable(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return generate(
        model,
        tokenizer,
        chats(tokenizer, prompts),
        max_new_tokens=NEW,
        batch_size=4,
        partitioned=partitioned,
        world=world,
    )


@pytest.mark.parametrize("partitioned, prompts", [(False, 11), (True, 11), (True, 1)])
def test_ranks_answer_as_one_process_does(tmp_path: Path, ranks: RankPool, partitioned: bool, prompts: int) -> None:
    """Whole on each rank, spread over both, and with fewer prompts than ranks: none waits for ever."""
    folder = toy_checkpoint(tmp_path / "toy")
    model, tokenizer = load(folder)
    encoded = chats(tokenizer, prompts)
    ends = common_tokens(model, chats(tokenizer))
    model.generation_config.eos_token_id = ends
    alone = generate(model, tokenizer, encoded, max_new_tokens=NEW, batch_size=3, partitioned=False, world=ALONE)
    for found in ranks.run(on_ranks, str(folder), partitioned, prompts, ends, world_size=2, timeout=300.0):
        assert [(done.text, done.finished) for done in found] == [(done.text, done.finished) for done in alone]
