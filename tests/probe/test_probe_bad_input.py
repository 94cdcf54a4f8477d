"""What the probe refuses: one clear ValueError, the same on every rank, and the model is left as it was."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rank_pool import RankPool
from toy import toy_tokenizer
from toy_models import PROMPTS_A, PROMPTS_B, toy_model, zero3
from transformers import AutoModelForCausalLM, FalconConfig, Gemma2Config, LlamaConfig, PreTrainedModel

from dcr_scale.models import attention
from dcr_scale.probe import KernelProbe
from dcr_scale.probe.guard import borrowed


def with_dropout() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            attention_dropout=0.1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_probes": 1}, "output_probes must be at least 2; it is 1"),
        ({"groups": 0}, "rank and groups must be at least 1"),
        ({"groups": 1, "rank": 5}, "a single group's rank even"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1"),
        ({"parameters": "no_such_layer"}, "'no_such_layer' finds no parameter"),
        ({"parameters": "("}, "is no regular expression"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        KernelProbe(toy_model("llama"), **settings)


def test_trainable_of_a_frozen_model():
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        KernelProbe(toy_model("llama").requires_grad_(False), parameters="trainable")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts_a must be a list of prompts, at least one"),
        ("one string", "prompts_a must be a list of prompts"),
        (7, "prompts_a must be a list of prompts, at least one; it is 7"),
        ([[1, 2], []], r"prompts_a\[1\] has no tokens"),
        ([1, 2, 3], r"prompts_a\[0\] is neither text nor a list of token ids: 'int' object is not iterable"),
        ([[1, 2], [1.7, 2]], r"prompts_a\[1\] is neither text nor a list of token ids: 'float' object"),
        (["text"], r"prompts_a\[0\] is text: give the probe a tokenizer"),
        ([[1, 2], [3, 40]], r"prompts_a\[1\] has the token 40, and the model has 40"),
    ],
)
def test_prompts_that_are_none(prompts, message):
    with pytest.raises(ValueError, match=message):
        KernelProbe(toy_model("llama")).measure(prompts)


def test_dropout_left_on():
    model = with_dropout().train()
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: attention dropout of 0.1 is on"):
        KernelProbe(model).measure(PROMPTS_A)
    assert model.training
    KernelProbe(model.eval()).measure(PROMPTS_A)


def falcon() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        FalconConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, new_decoder_architecture=True,
            num_kv_heads=1, hidden_dropout=0.3,
        )
    )  # fmt: skip


def test_dropout_that_is_no_module():
    with pytest.raises(ValueError, match=r"transformer\.h\.0: hidden dropout of 0.3 is on"):
        KernelProbe(falcon().train()).measure(PROMPTS_A)


def test_layers_that_are_recomputed_drop_nothing():
    model = falcon().eval()
    settings = {"parameters": "ln_|norm", "packed": False}  # its linears are of a kind that no rule covers
    expected = KernelProbe(model, **settings).measure(PROMPTS_A).squared
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(KernelProbe(model, **settings).measure(PROMPTS_A).squared, expected)
    assert not any(module.training for module in model.modules())


def test_where_gradients_are_off_they_are_taken_all_the_same():
    probe = KernelProbe(toy_model("llama"))
    expected = probe.measure(PROMPTS_A)
    with torch.no_grad():
        assert torch.equal(probe.measure(PROMPTS_A).squared, expected.squared)
        assert not torch.is_grad_enabled()


def test_inference_mode():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode\(\) is on"):
        KernelProbe(toy_model("llama")).measure(PROMPTS_A)


def test_reentrant_checkpointing():
    model = toy_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant activation checkpointing"):
        KernelProbe(model).measure(PROMPTS_A)


def test_capped_logits():
    """Also where the cap bends them by less than bfloat16 rounds."""
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, final_logit_softcapping=30.0,
        ),
        dtype=torch.bfloat16,
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0 .* capped or scaled"):
        KernelProbe(model).measure(PROMPTS_A)


@pytest.mark.parametrize("exact", [False, True], ids=["sketched", "exact"])
def test_scaled_logits_that_no_setting_tells_of(exact):
    model = toy_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 1.1 * output)
    with pytest.raises(ValueError, match="capped or scaled"):
        KernelProbe(model).measure(PROMPTS_A, exact=exact)


def test_a_module_that_no_rule_covers_is_named():
    model = toy_model("llama")
    model.model.layers[1].mlp.extra = torch.nn.Conv1d(16, 16, 3)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.extra\.weight: no rule sketches .* Conv1d"):
        KernelProbe(model)


class Scaled(torch.nn.Module):
    """A factor for all features alike."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize("exact", [False, True], ids=["sketched", "exact"])
@pytest.mark.parametrize("module", [Scaled, torch.nn.PReLU])
def test_numbers_that_are_broadcast_are_named(module, exact):
    model = toy_model("llama")
    model.model.layers[1].mlp.act_fn = module()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.\w+: its 1 numbers are broadcast over 24 features"):
        KernelProbe(model).measure(PROMPTS_A, exact=exact)


class Gated(torch.nn.Module):
    """A norm of two inputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x, gate):
        return self.weight * x * gate


class Shifted(torch.nn.Embedding):
    """A table that is looked up by more than ids."""

    def forward(self, ids, past):
        return super().forward(ids + past)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (Gated(), r"^model\.layers\.1\.extra\.weight: no rule sketches it in a Gated .*missing 1 .*'gate'"),
        (Shifted(9, 16), r"^model\.layers\.1\.extra\.weight: no rule sketches the table of a Shifted.*'past'"),
    ],
    ids=["norm of two inputs", "table with an offset"],
)
def test_a_module_whose_forward_pass_wants_more_is_named(extra, message):
    model = toy_model("llama")
    model.model.layers[1].extra = extra
    with pytest.raises(ValueError, match=message):
        KernelProbe(model)


def test_a_weight_that_takes_no_part_is_named():
    model = toy_model("llama")
    model.model.layers[1].mlp.extra = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.extra\.weight: its Linear took part .* not at all"):
        KernelProbe(model).measure(PROMPTS_A)


def test_adapters_that_have_been_switched_off_since_are_named():
    model = get_peft_model(toy_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    probe = KernelProbe(model, parameters="trainable")
    probe.measure(PROMPTS_A)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.lora_A.* not at all"):
        probe.measure(PROMPTS_A)


class RootOfPositive(torch.nn.Module):
    """Finite for every number, with a gradient that is for positive ones only."""

    def forward(self, x):
        return torch.where(x > 0, x.sqrt(), 0)


def breaks(model: PreTrainedModel, where: str) -> None:
    if where == "gradient":
        model.model.layers[1].mlp.act_fn = RootOfPositive()
        return
    with torch.no_grad():
        # Of the embeddings the one that only the second prompt has.
        model.get_parameter(where)[30 if "embed" in where else 0] = torch.nan


@pytest.mark.parametrize("exact", [False, True], ids=["sketched", "exact"])
@pytest.mark.parametrize(
    ("parameters", "where", "named"),
    [
        ("lm_head", "model.embed_tokens.weight", r"model\.embed_tokens"),
        (r"layers\.0\.mlp", "model.layers.3.mlp.down_proj.weight", r"model\.layers\.3"),
        (r"layers\.0\.mlp", "model.norm.weight", "model"),
        ("all", "lm_head.weight", "the output head"),
        (r"layers\.1\.mlp", "gradient", r"model\.layers\.1\.mlp\.gate_proj\.weight"),
    ],
)
def test_the_first_module_with_numbers_that_are_not_finite_is_named(parameters, where, named, exact):
    """Whatever counts, and in whichever of a micro-batch's prompts."""
    model = toy_model("llama")
    breaks(model, where)
    with pytest.raises(ValueError, match=rf"^{named}: .* not finite$"):
        KernelProbe(model, parameters=parameters).measure(PROMPTS_A, exact=exact)


def test_packed_prompts_keep_the_attention_that_the_model_was_loaded_with():
    """Where it packs; `auto` here would take another. Padded rows need an ordinary one."""
    model = toy_model("llama")
    for before, packed, within in (
        (attention.TORCH_VARLEN, True, attention.TORCH_VARLEN),
        (attention.TORCH_VARLEN, False, "sdpa"),
        ("eager", True, attention.SDPA),
        ("eager", False, "eager"),
    ):
        model.set_attn_implementation(before)
        with borrowed(model, packed, torch.float32):
            assert model.config._attn_implementation == within
        assert model.config._attn_implementation == before


def test_the_model_is_given_back_as_it_was():
    model = toy_model("qwen3-moe")
    model.train()
    model.model.layers[2].eval()
    model.model.layers[0].requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    linear, before = torch.nn.functional.linear, torch.get_rng_state()
    implementations = model.config._attn_implementation, model.config._experts_implementation
    KernelProbe(model).measure(PROMPTS_A)
    with pytest.raises(ValueError, match="not finite"):
        broken(model, 1)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (model.config._attn_implementation, model.config._experts_implementation) == implementations
    assert torch.nn.functional.linear is linear
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "lm_head.weight")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def broken(model, layer: int) -> None:
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[0, 0, 0] = torch.nan
    KernelProbe(model).measure(PROMPTS_A)


# --- one rank's fault is every rank's error --------------------------------------------------------------------------

# For the first of them, which starts the ranks on a busy machine.
SECONDS = 240.0


class SelectsTokens(torch.nn.Linear):
    """Applied to all tokens but the last."""

    def forward(self, x):
        return torch.nn.functional.pad(super().forward(x[..., :-1, :]), (0, 0, 0, 1))


class FoldsHeads(torch.nn.Module):
    """A norm that sees [tokens, heads, D] under no batch, where no rule looks for the tokens."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.flatten(0, 1)[:, None].repeat(2, 1, 1))[: x.shape[0] * x.shape[1]].view_as(x)


def faulty_measurement(fault: str, exact: bool) -> str:
    """What a rank is told where only rank 1 has the fault."""
    has_it = torch.distributed.get_rank() == 1
    prompts = PROMPTS_A + PROMPTS_B
    model, tokenizer = toy_model("llama"), None
    if fault == "dropout":
        model = with_dropout().train(has_it)
    elif fault == "reentrant":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": has_it})
    elif fault == "no tokens":
        model.resize_token_embeddings(384)
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"
        prompts = ["one", "two", "" if has_it else "three"]
    elif fault == "template":
        model.resize_token_embeddings(384)
        tokenizer = toy_tokenizer()
        if has_it:
            tokenizer.chat_template = "{{ raise_exception('no such role') }}"
        prompts = ["one", "two"]
    elif fault == "unknown token" and has_it:
        prompts = [*prompts, [40]]
    elif fault == "no list" and has_it:
        prompts = [*prompts, 7]
    elif fault == "nan" and has_it:
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    elif fault == "selects tokens" and has_it:
        model.model.layers[1].mlp.up_proj.__class__ = SelectsTokens
    elif fault == "folds heads" and has_it:
        model.model.layers[1].post_attention_layernorm = FoldsHeads(model.model.layers[1].post_attention_layernorm)
    elif fault == "other prompts" and has_it:
        prompts = [*prompts[:-1], [1, 2, 3, 4, 5]]
    elif fault == "no rule" and has_it:
        model.model.layers[1].extra = Gated()
    with pytest.raises(ValueError) as caught:
        KernelProbe(model, tokenizer).measure(prompts, exact=exact)
    # They are still in step.
    KernelProbe(toy_model("llama")).measure(PROMPTS_A)
    return str(caught.value)


FAULTS = {
    "dropout": r"^model\.layers\.0\.self_attn: attention dropout of 0\.1 is on",
    "reentrant": "^reentrant activation checkpointing runs no hooks",
    "no tokens": r"^prompts_a\[2\] has no tokens$",
    "template": "^the tokenizer's chat template failed: no such role",
    "unknown token": r"^prompts_a\[5\] has the token 40, and the model has 40$",
    "no list": r"^prompts_a\[5\] is neither text nor a list of token ids: 'int' object is not iterable$",
    "nan": r"^model\.layers\.2\.mlp\.down_proj\.weight: .* not finite$",
    "selects tokens": r"^model\.layers\.1\.mlp\.up_proj\.weight: met \d+ rows where the micro-batch has \d+ tokens",
    "other prompts": "^rank 1 was given other prompts or settings than rank 0; every rank takes all of them alike$",
    "no rule": r"^model\.layers\.1\.extra\.weight: no rule sketches it in a Gated",
    "folds heads": r"^model\.layers\.1\.post_attention_layernorm\.norm\.weight: met values of shape \[\d+, 1, 16\]",
}


@pytest.mark.parametrize("exact", [False, True], ids=["sketched", "exact"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_rank_s_fault_is_told_on_all(ranks: RankPool, fault: str, exact: bool):
    told = ranks.run(faulty_measurement, fault, exact, world_size=2, timeout=SECONDS)
    assert told[0] == told[1]
    assert re.search(FAULTS[fault], told[0]), told[0]


def too_few_prompts() -> str:
    with pytest.raises(ValueError) as caught:
        KernelProbe(toy_model("llama")).measure([[1, 2], [1, 2]])
    return str(caught.value)


def test_fewer_prompts_than_ranks(ranks: RankPool):
    told = ranks.run(too_few_prompts, world_size=2, timeout=SECONDS)
    assert told == ["1 different prompts are fewer than the 2 ranks"] * 2


# --- under ZeRO ------------------------------------------------------------------------------------------------------


def told(engine) -> str:
    try:
        KernelProbe(engine).measure(PROMPTS_A)
    except ValueError as error:
        return str(error)
    return "measured"


def accumulate(engine) -> None:
    ids = torch.tensor([PROMPTS_A[0]])
    engine.backward(engine(input_ids=ids, labels=ids).loss)


def measured_between_micro_steps(stage: int) -> list[str]:
    """Attempts at every point of an update of two micro-steps, and at the same where the caller sets the boundary."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
    engine = zero3(toy_model("llama"), gradient_accumulation_steps=2, zero_optimization=zero)
    attempts = [told(engine)]
    for _ in range(2):
        accumulate(engine)
        attempts.append(told(engine))
        engine.step()
        attempts.append(told(engine))
    engine.destroy()
    engine = zero3(toy_model("llama"), zero_optimization=zero)
    engine.set_gradient_accumulation_boundary(False)
    accumulate(engine)
    engine.step()
    attempts.append(told(engine))
    engine.set_gradient_accumulation_boundary(True)
    ids = torch.tensor([PROMPTS_A[0]])
    loss = engine(input_ids=ids, labels=ids).loss
    attempts.append(told(engine))
    engine.backward(loss)
    engine.step()
    attempts.append(told(engine))
    accumulate(engine)
    if torch.distributed.get_rank() == 0:
        # It alone forgets its gradients: the fault is the other rank's only.
        engine.optimizer.zero_grad()
    attempts.append(told(engine))
    engine.destroy()
    return attempts


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_in_the_middle_of_an_accumulation(ranks: RankPool, stage: int):
    attempts = ranks.run(measured_between_micro_steps, stage, world_size=2, timeout=SECONDS)
    assert attempts[0] == attempts[1]
    begun = "the engine has taken 1 of the 2 micro-steps of an update"
    holds = "the engine holds gradients of an update that it has not made"
    expected = ["measured", holds, begun, begun, "measured", holds, holds, "measured", holds]
    assert [text.split(";")[0] for text in attempts[0]] == expected


def one_rank_s_prompt_is_not_finite() -> list[str]:
    """Weights are spread over the ranks and alike; the prompt whose token is broken runs on one of them."""
    model = toy_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[12] = torch.nan
    engine = zero3(model)
    attempts = []
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            KernelProbe(engine, micro_batch_tokens=1).measure([[3, 4, 5], [12, 3]])
        attempts.append(str(caught.value))
    attempts.append(told(engine))
    engine.destroy()
    return attempts


@pytest.mark.slow
def test_under_zero3_one_rank_s_activations_that_are_not_finite(ranks: RankPool):
    attempts = ranks.run(one_rank_s_prompt_is_not_finite, world_size=2, timeout=SECONDS)
    assert attempts[0] == attempts[1]
    assert attempts[0][0] == attempts[0][1]
    assert "not finite" in attempts[0][0]
    assert attempts[0][2] == "measured"
