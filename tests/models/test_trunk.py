"""The trunk is the whole model up to layer ℓ, holds nothing beyond it, and models it cannot be cut from are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
)

from dcr_scale.config import ModelConfig
from dcr_scale.data.packing import Pack, pack
from dcr_scale.errors import UserError
from dcr_scale.models import attention
from dcr_scale.models.packing_check import check_packing
from dcr_scale.models.trunk import (
    Trunk,
    build_model,
    build_skeleton,
    decoder_layers,
    depth,
    read_config,
    truncated,
)
from dcr_scale.world import World

SETTINGS = {"attention": attention.SDPA, "dtype": torch.float32}
L = 4
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
PATTERN = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SHAPE, **HEADS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, **HEADS, use_sliding_window=True, sliding_window=3, layer_types=PATTERN),
    "gemma2": Gemma2Config(**SHAPE, **HEADS, sliding_window=3, layer_types=PATTERN),
    "gemma3": Gemma3TextConfig(**SHAPE, **HEADS, sliding_window=3, layer_types=PATTERN),
    # As many experts as layers: two lists of that length.
    "mixtral": MixtralConfig(**SHAPE, **HEADS, num_local_experts=L, num_experts_per_tok=2),
    # A dense layer among the sparse ones.
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS, num_experts=3, mlp_only_layers=[1]),
    "deepseek": DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4}, **LATENT, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1
    ),
    # Learned positions, a final norm of another name, layers of another name.
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=L, n_head=4, n_positions=64, n_inner=40),
    # Every block reads one layer norm for attention and feed-forward.
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
}


def whole_model(family: str, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = MODELS[family]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def trunk_of(model: nn.Module, layers: int) -> Trunk:
    """The trunk with the whole model's values, by the names it claims they have there."""
    trunk = Trunk(model.config, layers, **SETTINGS).eval()
    values = dict(model.named_parameters(remove_duplicate=False))
    prefix = trunk.name_prefix(values)
    with torch.no_grad():
        for name, parameter in trunk.decoder.named_parameters():
            parameter.copy_(values[prefix + name])
    return trunk


# --- what it computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_the_trunk_computes_what_the_next_layer_reads(family):
    model = whole_model(family)
    prompt = [5, 7, 11, 13, 2, 3]
    with torch.no_grad():
        hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layers in range(1, L):
            found = trunk_of(model, layers)(pack([prompt]))
            torch.testing.assert_close(found, hidden[layers][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_the_trunk_holds_the_embedding_and_its_layers_and_nothing_else(family):
    model = whole_model(family)
    stack = decoder_layers(model)
    in_layers = {id(p) for p in stack.parameters()}
    embedding = [p for p in model.get_input_embeddings().parameters()]
    if family == "gpt2":
        embedding.append(model.transformer.wpe.weight)
    for layers in (1, 3):
        trunk = trunk_of(model, layers)
        kept = [p for layer in stack[:layers] for p in layer.parameters()]
        assert sum(p.numel() for p in trunk.parameters()) == sum(p.numel() for p in [*embedding, *kept])
        assert [p.shape for p in trunk.embedding_parameters()] == [p.shape for p in embedding]
    assert not in_layers & {id(p) for p in embedding}


@pytest.mark.parametrize("family", MODELS)
def test_the_whole_model_is_tied_where_its_checkpoint_is(family):
    """The same parameters as those transformers itself would train."""
    built = build_model(MODELS[family], attention="eager", dtype=torch.float32)
    expected = whole_model(family)
    assert [name for name, _ in built.named_parameters()] == [name for name, _ in expected.named_parameters()]


def test_a_skeleton_takes_no_memory():
    assert {p.device.type for p in build_skeleton(MODELS["mixtral"]).parameters()} == {"meta"}


# --- the configuration of fewer layers -------------------------------------------------------------------------


def test_lists_that_speak_of_layers_are_cut_and_others_stay():
    config = MODELS["gemma2"]
    cut = truncated(config, 3)
    assert (depth(cut), cut.layer_types) == (3, PATTERN[:3])
    assert (depth(config), config.layer_types) == (L, PATTERN)
    assert truncated(MODELS["qwen3-moe"], 2).mlp_only_layers == [1]


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_the_names_prefix_is_what_the_whole_model_says(family, prefix):
    trunk = Trunk(MODELS[family], 2, **SETTINGS)
    assert trunk.name_prefix({name for name, _ in whole_model(family).named_parameters()}) == prefix
    # A checkpoint of the bare decoder has none.
    assert trunk.name_prefix({name for name, _ in trunk.decoder.named_parameters()}) == ""
    with pytest.raises(UserError, match="holds no parameter that ends in"):
        trunk.name_prefix({"head.weight"})


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # Its attention is chosen by name from a table of its own, and would fail or leak at the first pack.
        (FalconConfig(num_hidden_layers=L), "FalconForCausalLM does not compute its attention through"),
        (MambaConfig(num_hidden_layers=L), "MambaForCausalLM does not compute its attention through"),
        (ViTConfig(num_hidden_layers=L), "no causal language model can be built from a vit config"),
    ],
)
def test_a_model_that_packing_cannot_serve_is_refused_before_it_takes_memory(config, message):
    with pytest.raises(UserError) as caught:
        build_skeleton(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_whose_layers_lie_deeper_is_refused():
    config = OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=40, num_hidden_layers=L, num_attention_heads=4)
    with pytest.raises(UserError, match="OPTModel: its layers are not where a decoder's should be"):
        Trunk(config, 2, **SETTINGS)


def test_a_model_that_projects_after_its_layers_is_refused(monkeypatch):
    original = LlamaModel.__init__

    def with_projection(self, config):
        original(self, config)
        self.project_out = nn.Linear(32, 16)

    monkeypatch.setattr(LlamaModel, "__init__", with_projection)
    with pytest.raises(UserError, match="project_out follows the layers and is no norm"):
        Trunk(MODELS["llama"], 2, **SETTINGS)


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match="Linear: found no stack of 0 decoder layers"):
        decoder_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "t5 is not a decoder-only language model"),
        (Lfm2Config(num_hidden_layers=L, layer_types=["conv", "full_attention"] * 2), "layers of type conv would let"),
        ({"model_type": "no-such-model"}, "no usable config.json"),
        ({}, "no usable config.json"),
        (None, "no usable config.json"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_says_why_in_one_line(tmp_path, config, message):
    if isinstance(config, PretrainedConfig):
        config.save_pretrained(tmp_path)
    elif config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path, ModelConfig())
    assert str(caught.value).startswith(f"{tmp_path}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


# --- the check before training ---------------------------------------------------------------------------------

PROMPTS = [[4, 5, 6, 7, 8], [4, 5, 9]]


class Mixing(nn.Module):
    """Each token also carries the mean of all before it, as a recurrent layer's would."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 32)

    def forward(self, batch: Pack) -> torch.Tensor:
        hidden_TD = self.embedding(batch.input_ids[0])
        counts = torch.arange(1, len(hidden_TD) + 1)[:, None]
        return hidden_TD + hidden_TD.cumsum(0) / counts


@pytest.mark.parametrize("prefix", [0, 2])
@torch.no_grad()
def test_a_model_that_mixes_tokens_outside_attention_is_found_out(prefix):
    with pytest.raises(UserError, match=r"activations move by \d+% when another prompt is put in front"):
        check_packing(Mixing(), PROMPTS, prefix, torch.device("cpu"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.no_grad()
def test_activations_that_are_not_finite_are_called_so(value):
    model = Mixing()
    model.embedding.weight[9, 3] = value
    with pytest.raises(UserError, match=r"activations are not finite, before anything has trained"):
        check_packing(model, PROMPTS, 0, torch.device("cpu"))


@pytest.mark.parametrize("off", [-math.inf, torch.finfo(torch.float32).min])
@torch.no_grad()
def test_tokens_that_a_head_switches_off_hide_no_leak(off):
    class Head(Mixing):
        def forward(self, batch):
            return torch.cat([super().forward(batch), torch.full((batch.layout.tokens, 4), off)], dim=-1)

    with pytest.raises(UserError, match="activations move by"):
        check_packing(Head(), PROMPTS, 0, torch.device("cpu"))


class BesideAnother(World):
    """The first of two ranks; the other's check has failed."""

    def gather(self, value):
        return [value, "the other's"]


@torch.no_grad()
def test_where_one_rank_fails_the_check_all_do():
    world = BesideAnother(0, 2, 0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="the other's") as caught:
        check_packing(trunk_of(whole_model("llama"), 2), PROMPTS, 0, world.device, world)
    assert caught.value.agreed


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_that_does_not_mix_passes_the_check(dtype, prefix):
    trunk = trunk_of(whole_model("mixtral"), 3).to(dtype)
    check_packing(trunk, PROMPTS, prefix, torch.device("cpu"))
