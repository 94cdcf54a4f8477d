"""The residual stream is found, watched and kept clear in every family, by structure alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from dcr_scale.baselines.residual import ablated, backbone, left_padded, on_output, positions_of, residual_writers
from dcr_scale.baselines.residual import residuals as residuals_at
from dcr_scale.errors import UserError
from dcr_scale.models.trunk import decoder_layers

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
}
NEOX = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, query_pre_attn_scalar=4),
    "granite": GraniteConfig(**SHAPE, residual_multiplier=0.22),
    "neox": GPTNeoXConfig(**NEOX),
    "olmo2": Olmo2Config(**SHAPE),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16),
}
WRITERS = {
    "llama": {"self_attn", "mlp"},
    "gemma2": {"post_attention_layernorm", "post_feedforward_layernorm"},
    "granite": {"self_attn", "mlp"},
    # Its dropouts pass on what attention and MLP give.
    "neox": {"attention", "mlp", "post_attention_dropout", "post_mlp_dropout"},
    "olmo2": {"post_attention_layernorm", "post_feedforward_layernorm"},
    "qwen3-moe": {"self_attn", "mlp"},
}
PROMPTS = [[5, 9, 20, 33, 7, 41], [3, 8], [11, 2, 60, 19]]


def toy_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


def direction() -> Tensor:
    return torch.randn(SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1)) * 3


def all_hidden_states(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What the layers read and return, and the input of each norm within them: every place where the stream is."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        if output is not None:
            found.append(output[0] if isinstance(output, tuple) else output)

    handles = []
    for layer in decoder_layers(model):
        handles.append(layer.register_forward_hook(keep, with_kwargs=True))
        for name in ("input_layernorm", "post_attention_layernorm"):
            handles.append(layer.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_that_write_to_the_residual_stream_are_found_by_arithmetic(name: str) -> None:
    model = toy_model(CONFIGS[name])
    expected = [layer.get_submodule(part) for layer in decoder_layers(model) for part in WRITERS[name]]
    assert {id(module) for module in residual_writers(model)} == {id(module) for module in expected}


def test_writers_are_found_through_bfloat16_s_rounding_and_channels_of_huge_activations() -> None:
    model = toy_model(CONFIGS["llama"], torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = 500.0
    expected = [layer.get_submodule(part) for layer in decoder_layers(model) for part in WRITERS["llama"]]
    assert {id(module) for module in residual_writers(model)} == {id(module) for module in expected}


def test_a_layer_that_is_no_sum_of_its_parts_is_refused() -> None:
    model = toy_model(CONFIGS["llama"])
    handle = on_output(decoder_layers(model)[1], lambda hidden: hidden.roll(1, dims=-1))
    with pytest.raises(UserError, match="layer 1 does not add its parts"):
        residual_writers(model)
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ablated_direction_is_nowhere_in_the_residual_stream(name: str, dtype: torch.dtype) -> None:
    model = toy_model(CONFIGS[name], dtype)
    ids, mask = left_padded(PROMPTS, torch.device("cpu"))
    unit = direction() / direction().norm()

    def share() -> float:
        states = all_hidden_states(model, lambda: model(input_ids=ids, attention_mask=mask))
        return max(float((h.float() @ unit).abs().max() / h.float().norm(dim=-1).max()) for h in states)

    before = share()
    with ablated(model, direction(), residual_writers(model)):
        # A few roundings of the numbers that a state is made of.
        assert share() < 8 * torch.finfo(dtype).eps
    assert share() == before > 0.1


def test_ablation_within_layers_is_that_of_a_model_whose_weights_cannot_write_the_direction() -> None:
    """An independent way to the same model: the direction is projected out of every matrix that writes."""
    model, edited = toy_model(CONFIGS["llama"]), toy_model(CONFIGS["llama"])
    unit = direction() / direction().norm()
    with torch.no_grad():
        embedding = edited.get_input_embeddings().weight
        embedding -= torch.outer(embedding @ unit, unit)
        for layer in decoder_layers(edited):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight -= torch.outer(unit, unit @ linear.weight)
        ids = torch.tensor([PROMPTS[0]])
        with ablated(model, direction(), residual_writers(model)):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, edited(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_residuals_are_those_of_each_prompt_alone(name: str) -> None:
    model = toy_model(CONFIGS[name])
    together = residuals_at(model, *left_padded(PROMPTS, torch.device("cpu")), [-2, -1])
    for row, prompt in enumerate(PROMPTS):
        states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        # The last of transformers' states is normed.
        expected = torch.stack([state[0, -2:] for state in states[:-1]], dim=1)
        torch.testing.assert_close(together[row, :, :-1], expected, rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_after_an_exception() -> None:
    model = toy_model(CONFIGS["llama"])
    with pytest.raises(RuntimeError, match="stop"), ablated(model, direction(), residual_writers(model)):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_peft_model_is_steered_like_the_model_in_it() -> None:
    plain = toy_model(CONFIGS["llama"])
    wrapped = get_peft_model(toy_model(CONFIGS["llama"]), LoraConfig(target_modules=["q_proj"])).eval()
    ids, mask = left_padded(PROMPTS, torch.device("cpu"))
    assert backbone(wrapped)[0] is wrapped.get_base_model().model
    found = []
    for model in (plain, wrapped):
        with ablated(model, direction(), residual_writers(model)), torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1])
    torch.testing.assert_close(found[0], found[1])
