"""SCANS steers each prompt by its own sign, from its last token on, however it is batched and decoded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import TOXIC, planted, planted_prompts
from test_residual import CONFIGS, PROMPTS, toy_model
from toy import toy_tokenizer
from transformers import DynamicCache, PreTrainedModel

from dcr_scale.baselines import scans
from dcr_scale.baselines.residual import left_padded, positions_of, residuals
from dcr_scale.baselines.scans import Scans, ScansApplied
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.evaluation import refusal_probability

CPU = torch.device("cpu")
LAYERS, WIDTH, FIRST = 3, 16, 1
AGREEMENT = [7, 30]


def random_scans(model: PreTrainedModel) -> Scans:
    """Random vectors for the toy models, with a threshold that gives :data:`PROMPTS` both signs."""
    draw = torch.Generator().manual_seed(2)
    steering = Scans(
        LAYERS,
        vectors=torch.randn(2, WIDTH, generator=draw),
        references=torch.randn(LAYERS - FIRST, WIDTH, generator=draw),
        first=FIRST,
        alpha=2.0,
        threshold=0.0,
    )
    found = steering.similarities(ScansApplied(steering, model, AGREEMENT).transitions(*left_padded(PROMPTS, CPU)))
    lowest, next_lowest = found.sort().values[:2].tolist()
    return replace(steering, threshold=(lowest + next_lowest) / 2)  # not at a prompt's own value, which rounding moves


class Steered:
    """A context of SCANS on a toy model, whose vocabulary is no tokenizer's."""

    def __init__(self, model: PreTrainedModel, steering: Scans):
        self.applied = ScansApplied(steering, model, AGREEMENT)

    def __enter__(self) -> ScansApplied:
        self.handles = self.applied.install()
        return self.applied

    def __exit__(self, *failure: object) -> None:
        for handle in self.handles:
            handle.remove()


def decode(model: PreTrainedModel, prompts: list[list[int]], steps: int) -> torch.Tensor:
    """Greedy tokens [B, steps] of a plain loop with a cache."""
    ids, mask = left_padded(prompts, CPU)
    cache, found = DynamicCache(config=model.config), []
    for _ in range(steps):
        positions = positions_of(mask)[:, -ids.shape[1] :]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        found.append(ids)
    return torch.cat(found, dim=1)


def test_the_vector_is_added_by_sign_from_the_last_token_on_and_at_no_other() -> None:
    model = toy_model(CONFIGS["llama"])
    steering = replace(random_scans(model), vectors=torch.randn(1, WIDTH))
    ids, mask = left_padded(PROMPTS, CPU)
    columns = list(range(ids.shape[1]))
    plain = residuals(model, ids, mask, columns)[:, :, FIRST + 1]
    with Steered(model, steering) as applied:
        steered = residuals(model, ids, mask, columns)[:, :, FIRST + 1]
        signs = applied.signs_B
    assert signs is not None and sorted(set(signs.tolist())) == [-1.0, 1.0]
    expected = plain.clone()
    expected[:, -1] += steering.alpha * signs[:, None] * steering.vectors
    assert torch.equal(steered, expected)


def test_signs_do_not_depend_on_padding_or_on_who_shares_the_batch() -> None:
    model = toy_model(CONFIGS["llama"])
    steering = random_scans(model)
    with Steered(model, steering) as applied:
        together = applied.signs(*left_padded(PROMPTS, CPU))
        alone = torch.cat([applied.signs(*left_padded([prompt], CPU)) for prompt in PROMPTS])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-moe"])
@torch.no_grad()
def test_a_left_padded_batch_decodes_what_its_prompts_do_alone(name: str) -> None:
    model = toy_model(CONFIGS[name])
    with Steered(model, random_scans(model)):
        together = decode(model, PROMPTS, 6)
        alone = torch.cat([decode(model, [prompt], 6) for prompt in PROMPTS])
    assert torch.equal(together, alone)
    assert not torch.equal(together, decode(model, PROMPTS, 6)), "the steering changes nothing"


@torch.no_grad()
def test_decoding_behind_a_cache_is_a_full_recompute() -> None:
    model = toy_model(CONFIGS["llama"])
    ids, mask = left_padded(PROMPTS, CPU)
    with Steered(model, random_scans(model)) as applied:
        answers = decode(model, PROMPTS, 6)
        whole = torch.cat([ids, answers], dim=1)
        seen = torch.cat([mask, torch.ones_like(answers)], dim=1)
        with applied.decided(ids, mask):
            logits = model(input_ids=whole, attention_mask=seen, position_ids=positions_of(seen)).logits
    assert torch.equal(logits[:, ids.shape[1] - 1 : -1].argmax(dim=-1), answers)


@torch.no_grad()
def test_generate_needs_no_help() -> None:
    model = toy_model(CONFIGS["llama"])
    ids, mask = left_padded(PROMPTS, CPU)
    with Steered(model, random_scans(model)):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(output[:, ids.shape[1] :], decode(model, PROMPTS, 6))


@torch.no_grad()
def test_a_loop_that_drops_and_reorders_rows_says_so() -> None:
    model = toy_model(CONFIGS["llama"])
    steering = random_scans(model)
    ids, mask = left_padded(PROMPTS, CPU)
    order = [2, 0]

    def second_logits(keep: bool) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with Steered(model, steering) as applied:
            model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
            cache.batch_select_indices(torch.tensor(order))
            if keep:
                applied.keep(order)
            longer = torch.cat([mask[order], torch.ones(2, 1, dtype=torch.int64)], dim=1)
            last = torch.tensor([[9], [9]])
            return model(
                input_ids=last,
                attention_mask=longer,
                position_ids=positions_of(longer)[:, -1:],
                past_key_values=cache,
            ).logits

    with Steered(model, steering) as applied:
        whole = torch.cat([ids, torch.full((3, 1), 9)], dim=1)
        seen = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        with applied.decided(ids, mask):
            expected = model(input_ids=whole, attention_mask=seen, position_ids=positions_of(seen)).logits[order, -1:]
    torch.testing.assert_close(second_logits(keep=True), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"batch of 2 rows follows 3 prompts; .* applied\.keep"):
        second_logits(keep=False)


@torch.no_grad()
def test_rows_that_cannot_be_read_are_refused() -> None:
    model = toy_model(CONFIGS["llama"])
    ids, mask = left_padded(PROMPTS, CPU)
    with Steered(model, random_scans(model)):
        with pytest.raises(ValueError, match="pad on the left"):
            model(input_ids=ids.flip(1), attention_mask=mask.flip(1))
        with pytest.raises(ValueError, match="input_ids instead of inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)


@torch.no_grad()
def test_bfloat16_activations_keep_their_type() -> None:
    model = toy_model(CONFIGS["llama"], torch.bfloat16)
    with Steered(model, random_scans(model)):
        assert decode(model, PROMPTS, 3).shape == (3, 3)


class TestFit:
    @pytest.fixture(autouse=True)
    def one_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(refusal_probability, "REFUSAL_OPENINGS", ("Z",))

    def test_the_planted_direction_is_found_and_its_sign_is_the_class_s(self) -> None:
        model, tokenizer = planted()
        prompts = planted_prompts()
        encoder = ChatEncoder(tokenizer)
        fitted = scans.fit(model, encoder, prompts)
        steering = fitted.steering
        assert isinstance(steering, Scans)
        # Layers 10 to 19 of 32 are layer 1 of 4.
        assert (steering.first, len(steering.vectors), len(steering.references)) == (1, 1, 3)
        assert float(steering.vectors[0] @ TOXIC) > 0.999
        with steering.applied(model, tokenizer) as applied:
            assert isinstance(applied, ScansApplied)
            for name, divided in prompts.items():
                rows = [encoder.encode(text) for text in divided.validation]
                signs = applied.signs(*left_padded(rows, CPU))
                assert signs.tolist() == [1.0 if name == "toxic" else -1.0] * len(rows)
        after = fitted.facts["refusal_after"]
        assert fitted.facts["refusal_before"]["seemingly_toxic"] > 0.99
        assert after["seemingly_toxic"] < 0.01 and after["toxic"] > 0.99

    def test_strengths_over_the_limit_are_passed_over(self) -> None:
        tried = [
            {"alpha": 1.0, "kl": 0.01, "refusal": {"toxic": 0.9, "seemingly_toxic": 0.8}},
            {"alpha": 2.0, "kl": 0.15, "refusal": {"toxic": 0.9, "seemingly_toxic": 0.5}},
            {"alpha": 4.0, "kl": 0.90},
        ]
        assert scans.choose(tried, 0.2) == 1
        assert scans.choose(tried, 0.1) == 0
        with pytest.raises(UserError, match="none of 3 strengths"):
            scans.choose(tried, 0.001)

    def test_given_settings_are_taken_as_they_are(self) -> None:
        model, tokenizer = planted()
        fitted = scans.fit(model, ChatEncoder(tokenizer), planted_prompts(8), alpha=3.5, threshold=0.75)
        assert fitted.steering.settings() == {"first": 1, "alpha": 3.5, "threshold": 0.75}
        assert [candidate["alpha"] for candidate in fitted.tried] == [3.5]

    def test_the_threshold_lies_in_the_widest_gap_that_tells_the_sides_apart_best(self) -> None:
        toxic, others = torch.tensor([0.5, 0.95, 0.97]), torch.tensor([0.1, 0.2, 0.6])
        # Over .6 all others are right and one toxic is wrong; over .2 it is the other way round.
        assert scans.best_threshold(toxic, others) == pytest.approx(0.775)
        assert scans.best_threshold(torch.tensor([0.8]), torch.tensor([0.4, 0.1])) == pytest.approx(0.6)


def test_the_agreement_is_what_an_answer_would_open_with() -> None:
    encoder = ChatEncoder(toy_tokenizer())
    assert encoder.tokenizer.decode(encoder.encode_opening(scans.AGREEMENT)) == "Sure"
