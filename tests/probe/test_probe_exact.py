"""The exact kernel against full Jacobians: every kind of weight is counted, once, and with the right gradient."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toy_models import FAMILIES, PROMPTS_A, PROMPTS_B, VOCABULARY, jacobian, reference, toy_model
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from dcr_scale.probe import KernelProbe
from dcr_scale.probe.philox import derive_key, normals


def assert_exact(model, counted=None, **settings) -> None:
    squared, by_layer = reference(model, PROMPTS_A, PROMPTS_B, counted)
    result = KernelProbe(model, **settings).measure(PROMPTS_A, PROMPTS_B, exact=True)
    torch.testing.assert_close(result.squared, squared, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.by_layer, by_layer, rtol=1e-6, atol=1e-6 * squared.max().item())
    assert not result.stderr.any()
    assert torch.equal(result.interval()[0], result.squared)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_full_jacobians(family, tied, packed):
    assert_exact(toy_model(family, tied=tied, dtype=torch.float64), packed=packed)


def test_activation_checkpointing_changes_nothing():
    model = toy_model("gemma3", dtype=torch.float64)
    before = KernelProbe(model).measure(PROMPTS_A, PROMPTS_B, exact=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    after = KernelProbe(model).measure(PROMPTS_A, PROMPTS_B, exact=True)
    torch.testing.assert_close(after.by_layer, before.by_layer, rtol=1e-10, atol=0)
    assert not model.training


@pytest.mark.parametrize(
    "pattern",
    ["layers.1", r"self_attn\.q_proj\.bias", "norm", "lm_head", "embed_tokens", r"layers\.(0|3)\.mlp"],
)
def test_a_pattern_counts_what_it_finds(pattern):
    model = toy_model("llama", dtype=torch.float64)
    counted = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    assert_exact(model, counted, parameters=pattern)


def test_the_backward_pass_ends_at_the_lowest_counted_weight():
    """Below it nothing is kept for a backward pass; where layers are recomputed, all of them take part."""
    model = toy_model("llama")
    reached: dict[int, bool] = {}

    def note(number):
        return lambda module, args, output: reached.__setitem__(number, output.requires_grad)

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(note(number))
    KernelProbe(model, parameters=r"layers\.(1|2)\.").measure(PROMPTS_A)
    assert reached == {0: False, 1: True, 2: True, 3: True}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    KernelProbe(model, parameters=r"layers\.(1|2)\.").measure(PROMPTS_A)
    assert all(reached.values())


def test_trainable_counts_adapters_alone():
    model = toy_model("qwen3", dtype=torch.float64)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    counted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert counted
    assert_exact(model, counted, parameters="trainable")


def test_the_head_s_bias_counts():
    model = toy_model("llama", dtype=torch.float64)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape[0], dtype=torch.float64))
    assert_exact(model)


def shares_a_layer_s_parts() -> PreTrainedModel:
    model = toy_model("qwen3-moe", dtype=torch.float64)
    model.config.use_cache = False  # it has one place for a module's keys
    layers = model.model.layers
    layers[1].mlp, layers[2].self_attn = layers[0].mlp, layers[0].self_attn
    layers[3].post_attention_layernorm = layers[3].input_layernorm
    return model


def test_a_module_used_twice_is_counted_with_both_uses():
    assert_exact(shares_a_layer_s_parts())


def test_sketches_count_both_uses_of_a_module_too():
    """A vector no longer than its sketch is its own, so that nothing is random but the probes."""
    model, name = shares_a_layer_s_parts(), "model.layers.3.input_layernorm.weight"
    probes_RV = torch.stack([normals(derive_key(0, "output", probe), VOCABULARY, "cpu") for probe in range(4)]).double()
    left_RD, right_RD = (probes_RV @ jacobian(model, ids, [name])[name] for ids in PROMPTS_A)
    expected = (left_RD @ right_RD.T)[~torch.eye(4, dtype=torch.bool)].square().mean()
    result = KernelProbe(model, parameters=name).measure(PROMPTS_A)
    assert result.squared[0, 1] == pytest.approx(expected.item(), rel=1e-4)


def test_a_norm_used_twice_in_a_recomputed_layer_is_named():
    model = shares_a_layer_s_parts()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match=r"layers\.3\.input_layernorm\.weight: used twice in a layer"):
        KernelProbe(model).measure(PROMPTS_A)
    # Used twice in different layers, its inputs are told apart.
    model.model.layers[3].post_attention_layernorm = model.model.layers[2].post_attention_layernorm
    assert_exact(model)


def test_a_parameter_that_two_modules_hold_is_named():
    model = toy_model("llama", dtype=torch.float64)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: more than one module holds it"):
        KernelProbe(model)
    KernelProbe(model, parameters="self_attn")


def test_a_parameter_without_a_rule_is_named():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=2)
    ).eval()
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn\.weight: .*Conv1D"):
        KernelProbe(model, packed=False).measure([[1, 2, 3]], exact=True)
    # What does have a rule can be measured: learned positions and norms with a bias.
    counted = [name for name, _ in model.named_parameters() if "ln_" in name or "wpe" in name]
    squared, _ = reference(model.double(), PROMPTS_A, PROMPTS_B, counted)
    result = KernelProbe(model, packed=False, parameters="ln_|wpe").measure(PROMPTS_A, PROMPTS_B, exact=True)
    torch.testing.assert_close(result.squared, squared, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_known_without_a_draw_is_the_head_s_part(tied: bool):
    """(h'·h)² V, and an interval never leaves it out where what is estimated is above zero."""
    model = toy_model("llama", tied=tied)
    found = KernelProbe(model).measure(PROMPTS_A, PROMPTS_B)
    with torch.no_grad():
        left, right = (
            torch.stack([model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]).double()
            for prompts in (PROMPTS_A, PROMPTS_B)
        )
    torch.testing.assert_close(found.known, (left @ right.T) ** 2 * VOCABULARY, rtol=1e-4, atol=1e-8)
    low, high = found.interval(0.95)
    above = found.squared > found.known
    assert above.any()
    assert (high[above] > found.squared[above]).all() and (low[above] < found.squared[above]).all()
    # The logarithm is that of what is estimated: where its jackknife holds, the interval begins above what is known.
    logarithmic = above & (low > found.known)
    assert logarithmic.any()
    ratio = (high - found.known) / (found.squared - found.known)
    mirrored = (found.squared - found.known) / (low - found.known)
    torch.testing.assert_close(ratio[logarithmic], mirrored[logarithmic])


def test_an_exact_kernel_that_does_not_fit_is_refused_before_its_passes(monkeypatch: pytest.MonkeyPatch):
    model = toy_model("llama", tied=False)
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr("dcr_scale.probe.exact.psutil.virtual_memory", lambda: free)
    probe = KernelProbe(model)
    with pytest.raises(ValueError, match=r"^the exact kernel keeps .* tokens in all, .* and 9\.31e-07 GiB are free"):
        probe.measure(PROMPTS_A, exact=True)
    probe.measure(PROMPTS_A)
