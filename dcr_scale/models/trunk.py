"""The part of a decoder that stage 1 trains: its embedding and first ℓ layers, and nothing above.

The contrastive loss ends at layer ℓ and everything above is frozen, so the layers above, the final norm and the head
are never built: memory and time fall by (L − ℓ) / L. Models are taken apart by structure, not by name.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dcr_scale.config import ModelConfig
from dcr_scale.data.packing import Pack
from dcr_scale.errors import UserError

# Layers whose tokens meet only in softmax attention, which packing controls. A recurrent layer would leak.
_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}


def read_config(folder: Path, model: ModelConfig) -> PretrainedConfig:
    """The checkpoint's transformers configuration. Raises UserError where there is none that can be used."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: config.json asks for Python code that comes with the checkpoint; give a model that "
                "transformers knows itself, or set model.trust_remote_code=true if you trust the source"
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: no usable config.json ({reason})") from None
    text = config.get_text_config()
    if config.is_encoder_decoder or not getattr(text, "num_hidden_layers", 0):
        raise UserError(f"{folder}: {config.model_type} is not a decoder-only language model")
    foreign = set(getattr(text, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if foreign:
        raise UserError(
            f"{folder}: layers of type {', '.join(sorted(foreign))} would let packed prompts see each other; "
            "only softmax attention, full or sliding, is supported"
        )
    return config


def depth(config: PretrainedConfig) -> int:
    """Number of decoder layers L."""
    return config.get_text_config().num_hidden_layers


def truncated(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of the configuration for the first ``layers`` layers; its per-layer lists are cut as well."""
    full = depth(config)
    values = copy.deepcopy(config.to_dict())
    for name, value in values.items():
        if isinstance(value, list) and len(value) == full:
            values[name] = value[:layers]
    values["num_hidden_layers"] = layers
    return type(config).from_dict(values)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of decoder layers: its largest list of modules of one kind."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    ]
    # The first of equals: experts and the like lie inside the stack, and parents come before their children.
    longest = max((len(stack) for stack in stacks), default=0)
    config = getattr(model, "config", None)
    expected = depth(config) if config is not None else longest
    for stack in stacks:
        if len(stack) == expected:
            return stack
    raise UserError(f"{type(model).__name__}: found no stack of {expected} decoder layers to take apart")


@contextlib.contextmanager
def _uninitialized(dtype: torch.dtype) -> Iterator[None]:
    """Build modules in ``dtype`` without drawing initial weights: a checkpoint's are read right after."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def build_model(
    config: PretrainedConfig, *, attention: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The whole causal language model with undefined weights, on the CPU (or wherever the caller's context says)."""
    with _uninitialized(dtype):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
        )
    # transformers ties weights where it initialises them, which is left out above.
    model.tie_weights()
    return model


def build_skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The whole causal language model on the meta device: names and shapes, no memory.

    Raises UserError where transformers has none for this configuration, or one whose attention packing cannot reach.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no causal language model can be built from a {config.model_type} config: {reason}") from None
    if not model._supports_attention_backend:
        raise UserError(
            f"{type(model).__name__} does not compute its attention through transformers' attention interface, so "
            "prompts packed together would see each other; this model cannot be trained here"
        )
    return model


class Trunk(nn.Module):
    """Embedding and layers [0, ℓ) of a decoder, final norm left out: a pack in, the residual stream out.

    The output is what layer ℓ would read, the residual stream after layer ℓ − 1.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layers: int,
        *,
        attention: str,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        with _uninitialized(dtype):
            self.decoder = AutoModel.from_config(
                truncated(config, layers),
                attn_implementation=attention,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
        self.layers = layers
        self._drop_what_follows_the_layers()

    def _drop_what_follows_the_layers(self) -> None:
        stack = decoder_layers(self.decoder)
        children = list(self.decoder.named_children())
        at = next((i for i, (_, child) in enumerate(children) if child is stack), None)
        if at is None:
            raise UserError(f"{type(self.decoder).__name__}: its layers are not where a decoder's should be")
        for name, child in children[at + 1 :]:
            shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in child.parameters()]
            if not shapes:
                continue  # rotary tables and the like hold no parameters and are still needed
            if any(len(shape) != 1 for shape in shapes):
                raise UserError(
                    f"{type(self.decoder).__name__}: {name} follows the layers and is no norm; this model cannot be cut"
                )
            setattr(self.decoder, name, nn.Identity())

    def forward(self, pack: Pack) -> Tensor:
        """Residual stream [T, D] after the last layer of the trunk, for every token of the pack."""
        output = self.decoder(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=None,
            use_cache=False,
            packing=pack.layout,
        )
        return output.last_hidden_state[0]

    def name_prefix(self, known: Container[str]) -> str:
        """What stands before this trunk's parameter names in the whole model: ``model.`` in most families."""
        name = next(name for name, _ in self.decoder.named_parameters())
        candidates = (f"{self.decoder.base_model_prefix}.", "")
        prefix = next((candidate for candidate in candidates if candidate + name in known), None)
        if prefix is None:
            raise UserError(f"{type(self.decoder).__name__}: the whole model holds no parameter that ends in {name}")
        return prefix

    def embedding_parameters(self) -> list[nn.Parameter]:
        """The parameters in front of the layers: the input embedding (and learned positions where there are any)."""
        in_layers = {id(p) for p in decoder_layers(self.decoder).parameters()}
        return [p for p in self.decoder.parameters() if id(p) not in in_layers]
