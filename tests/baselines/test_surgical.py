"""Surgical finds the direction that was planted, spares true refusals, and keeps to its limit."""

from __future__ import annotations

import math

import pytest
import torch
from planted import ALARM, TOXIC, planted, planted_prompts
from toy import toy_tokenizer

from dcr_scale.baselines import surgical
from dcr_scale.baselines.surgical import Surgical
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.evaluation import refusal_probability


@pytest.fixture(autouse=True)
def one_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_probability, "REFUSAL_OPENINGS", ("Z",))


def test_the_fit_finds_the_planted_alarm_and_true_refusals_stay() -> None:
    """Seemingly toxic prompts hold a little of what makes toxic ones refused: only its orthogonal rest is ablated."""
    model, tokenizer = planted()
    fitted = surgical.fit(model, ChatEncoder(tokenizer), planted_prompts(), positions=2)
    assert isinstance(fitted.steering, Surgical)
    assert fitted.steering.vector.norm() == pytest.approx(1.0)
    assert float(fitted.steering.vector @ ALARM) > 0.999
    assert fitted.facts["refusal_before"]["seemingly_toxic"] > 0.99
    assert fitted.facts["refusal_after"]["seemingly_toxic"] < 0.01
    assert fitted.facts["refusal_after"]["toxic"] > 0.99
    # Depth 0 is the template's own tokens, the same in all prompts: no candidates there.
    assert {(c["depth"], c["position"]) for c in fitted.tried} == {(d, p) for d in (1, 2, 3) for p in (-2, -1)}


def test_without_orthogonalisation_true_refusals_go_too() -> None:
    model, tokenizer = planted()
    fitted = surgical.fit(model, ChatEncoder(tokenizer), planted_prompts(), positions=1, orthogonal=0.0)
    assert isinstance(fitted.steering, Surgical)
    assert abs(float(fitted.steering.vector @ TOXIC)) > 0.1


def test_the_layers_at_the_top_give_no_candidates() -> None:
    model, tokenizer = planted()
    fitted = surgical.fit(model, ChatEncoder(tokenizer), planted_prompts(8), positions=1, deepest=0.5)
    assert {candidate["depth"] for candidate in fitted.tried} == {1}


def test_the_least_refusing_candidate_over_the_limit_is_passed_over() -> None:
    tried = [
        {"kl": 0.5},
        {"kl": 0.19, "refusal": 0.3},
        {"kl": 0.05, "refusal": 0.4},
        {"screening": 0.9},
    ]
    assert surgical.choose(tried, 0.2) == 1
    assert surgical.choose(tried, 0.1) == 2
    with pytest.raises(UserError, match=r"none of 4 candidates .* \(the nearest: 0\.05\)"):
        surgical.choose(tried, 0.01)


def test_a_vector_that_harmless_prompts_need_is_not_ablated() -> None:
    """One alarm is not enough for a refusal, but the next token's distribution shows it."""
    model, tokenizer = planted()
    prompts = planted_prompts(8, alarms_in_harmless=1)
    kept = surgical.fit(model, ChatEncoder(tokenizer), prompts, positions=1, kl_limit=0.5)
    assert kept.facts["kl"] > 1e-6
    with pytest.raises(UserError, match="none of 3 candidates"):
        surgical.fit(model, ChatEncoder(tokenizer), prompts, positions=1, kl_limit=kept.facts["kl"] / 2)


def test_orthogonalised_removes_the_given_share_of_the_true_vector() -> None:
    false, true = torch.tensor([3.0, 4.0, 0.0]).double(), torch.tensor([0.0, 2.0, 0.0]).double()
    expected = {1.0: [1.0, 0.0, 0.0], 0.5: [3 / math.sqrt(13), 2 / math.sqrt(13), 0.0], 0.0: [0.6, 0.8, 0.0]}
    for share, vector in expected.items():
        found = surgical.orthogonalised(false, true, share)
        torch.testing.assert_close(found, torch.tensor(vector).double())
    assert surgical.orthogonalised(true * 3, true, 1.0) is None, "a vector parallel to the true one"
    assert surgical.orthogonalised(false * 0, true, 1.0) is None


@pytest.mark.parametrize("template", [True, False])
def test_the_shared_suffix_is_what_stands_behind_the_user_s_words(template: bool) -> None:
    tokenizer = toy_tokenizer()
    if not template:
        tokenizer.chat_template = None
    encoder = ChatEncoder(tokenizer)
    suffix = surgical.shared_suffix(encoder)
    text = tokenizer.decode(encoder.encode("Why is the sky blue")[-suffix:])
    assert text == ("<|end|>\n<|start|>assistant\n" if template else "\n\n")


def test_prompts_of_the_wrong_fate_are_left_out_unless_they_are_needed() -> None:
    prompts = [[i] for i in range(100)]
    refused = surgical._drawn(prompts, [0.9 if i % 2 else 0.1 for i in range(100)], refused=True)
    assert refused == [[i] for i in range(1, 100, 2)]
    few = surgical._drawn(prompts, [i / 1000 for i in range(100)], refused=True)
    assert sorted(few) == [[i] for i in range(68, 100)]
