"""What the kernel counts, cut into units: one for each weight whose gradient is sketched on its own.

Rules go by structure, not by model: a table of token vectors, a matrix applied through ``linear``, a stack of experts'
matrices, the vectors of an element-wise affine module. A counted parameter that no rule covers is an error: a kernel
that silently leaves a part out is worse than none.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dcr_scale.models.trunk import decoder_layers

Kind = Literal["linear", "experts", "embedding", "vector"]
# Of an input [..., D]: values [..., D], and what each row of them is multiplied by [..., 1]; None: by 1.
Factor = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Unit:
    """One sketched weight.

    ``name``: of its parameter, by which its projections are drawn. ``slice``: the decoder layer it belongs to, or the
    number of layers for what stands outside them. ``weight`` and ``bias`` say which of the two count (a linear's or an
    expert's gradient is that of the matrix [weight, bias]). ``shape``: rows and columns of the gradient's matrix, for
    experts of all of them on top of each other.
    """

    name: str
    kind: Kind
    slice: int
    module: nn.Module
    parameter: nn.Parameter
    shape: tuple[int, int]
    weight: bool = True
    bias: bool = False


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole parameter's shape, also where ZeRO-3 holds a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Inventory:
    """The units of a model, what its head is, and how many decoder layers it has."""

    units: list[Unit]
    layers: int
    head: nn.Linear
    tied: bool
    head_counts: bool
    head_bias_counts: bool

    @property
    def slices(self) -> int:
        """One for each decoder layer, and one for what stands outside them."""
        return self.layers + 1


def select(model: PreTrainedModel, parameters: str) -> set[int]:
    """Ids of the parameters that count: ``all``, ``trainable``, or those whose name the regular expression finds.

    Raises ValueError for a pattern that is none, or that finds nothing.
    """
    if parameters == "all":
        return {id(parameter) for parameter in model.parameters()}
    if parameters == "trainable":
        chosen = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if not chosen:
            raise ValueError('parameters="trainable": every parameter of the model is frozen')
        return chosen
    try:
        pattern = re.compile(parameters)
    except re.error as error:
        raise ValueError(f"parameters={parameters!r} is no regular expression: {error}") from None
    chosen = {id(parameter) for name, parameter in model.named_parameters() if pattern.search(name)}
    if not chosen:
        raise ValueError(f'parameters={parameters!r} finds no parameter; give "all", "trainable" or a name pattern')
    return chosen


def take_inventory(model: PreTrainedModel, counted: set[int]) -> Inventory:
    """Cut the counted parameters of a transformers causal language model into units.

    Raises ValueError that names the parameter which no rule covers, or which more than one module holds. A module may
    well be used in several places: it is one unit, and belongs to the first decoder layer that has it.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head, so it has no first token to probe")
    stack = decoder_layers(model)
    slice_of: dict[int, int] = {}
    for i, layer in enumerate(stack):
        for module in layer.modules():
            slice_of.setdefault(id(module), i)
    # What an adapter wraps keeps its name, and with it its projections.
    names = {id(parameter): name.replace(".base_layer.", ".") for name, parameter in model.named_parameters()}
    table = model.get_input_embeddings()
    tied = table is not None and table.weight is head.weight
    units: list[Unit] = []
    held: set[int] = set()
    for module in model.modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in counted}
        if not own or module is head:
            continue
        twice = next((names[id(p)] for p in own.values() if id(p) in held), None)
        if twice is not None:
            raise ValueError(
                f"{twice}: more than one module holds it, and no rule adds up what it is to each; leave it out by "
                'parameters="trainable" or a name pattern'
            )
        held.update(map(id, own.values()))
        where = slice_of.get(id(module), len(stack))
        units += _units_of(module, own, where, names)
    bias = getattr(head, "bias", None)
    return Inventory(
        units,
        len(stack),
        head,
        tied,
        head_counts=id(head.weight) in counted,
        head_bias_counts=bias is not None and id(bias) in counted,
    )


def _units_of(module: nn.Module, own: dict[str, nn.Parameter], where: int, names: dict[int, str]) -> list[Unit]:
    shapes = {key: shape_of(p) for key, p in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Embedding):
        weight = own["weight"]
        rows, columns = shapes["weight"]
        return [Unit(names[id(weight)], "embedding", where, module, weight, (columns, rows))]
    if is_experts(module):
        return _expert_units(module, own, where, names, shapes)
    if all(len(shape) == 1 for shape in shapes.values()) and not list(module.children()):
        return [
            Unit(names[id(parameter)], "vector", where, module, parameter, folded(shapes[key][0]))
            for key, parameter in own.items()
        ]
    if len(shapes.get("weight", ())) == 2 and set(shapes) <= {"weight", "bias"}:
        parameter = module.get_parameter("weight")
        rows, columns = shapes["weight"]
        return [
            Unit(
                names[id(parameter)], "linear", where, module, parameter, (rows, columns),
                weight="weight" in own, bias="bias" in own,
            )
        ]  # fmt: skip
    key, parameter = next(iter(own.items()))
    raise ValueError(
        f"{names[id(parameter)]}: no rule sketches the gradient of {key} {list(shapes[key])} in a "
        f'{type(module).__name__}; leave it out by parameters="trainable" or a name pattern'
    )


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def _expert_units(
    module: Any, own: dict[str, nn.Parameter], where: int, names: dict[int, str], shapes: dict[str, tuple[int, ...]]
) -> list[Unit]:
    units = []
    if module.has_post_expert_norm or module._is_expert_parallel:
        what = "a norm after each expert" if module.has_post_expert_norm else "experts spread over ranks"
        raise ValueError(f"{names[id(next(iter(own.values())))]}: {type(module).__name__} has {what}: not supported")
    for key in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        parameter, bias = getattr(module, key), getattr(module, f"{key}_bias", None)
        weight_counts, bias_counts = key in own, f"{key}_bias" in own
        if not (weight_counts or bias_counts):
            continue
        experts, rows, columns = shapes[key]
        if module.is_transposed:
            rows, columns = columns, rows
        name = names[id(parameter if weight_counts else bias)]
        units.append(
            Unit(name, "experts", where, module, parameter, (experts * rows, columns), weight_counts, bias_counts)
        )
    covered = {key for unit in ("gate_up_proj", "up_proj", "down_proj") for key in (unit, f"{unit}_bias")}
    for key, parameter in own.items():
        if key not in covered:
            raise ValueError(f"{names[id(parameter)]}: no rule sketches {key} of {type(module).__name__}")
    return units


def folded(length: int) -> tuple[int, int]:
    """A vector as a matrix: rows and columns, near square, whose product is at least ``length``.

    So it is projected on two sides as any other gradient, at p(rows + columns) entries instead of p² · length.
    """
    columns = max(1, round(length**0.5))
    return -(-length // columns), columns


def lookup_scale(unit: Unit) -> Tensor:
    """What an embedding module multiplies its vectors by (Gemma's do): its forward pass over a table of ones.

    Raises ValueError where the module does more than look up and scale.
    """
    module = unit.module
    ones = torch.ones(1, unit.shape[0], device=unit.parameter.device)
    clone = copy.copy(module)
    clone.__dict__ = {**module.__dict__, "_parameters": {"weight": ones}, "padding_idx": None}
    try:
        scaled = type(module).forward(clone, torch.zeros(1, dtype=torch.long, device=ones.device))
    except Exception as error:  # a model's own code, which may want more than token ids
        raise ValueError(
            f"{unit.name}: no rule sketches the table of a {type(module).__name__}, whose forward pass takes more than "
            f'token ids ({error}); leave it out by parameters="trainable" or a name pattern'
        ) from error
    if scaled.shape != ones.shape or not torch.allclose(scaled, scaled[0, 0]):
        raise ValueError(f"{unit.name}: {type(module).__name__} does more than look up and scale its vectors")
    return scaled[0, 0]


def elementwise_factors(module: nn.Module, example: Tensor) -> dict[str, Factor]:
    """For each vector parameter v of an affine element-wise module, the factor ∂y/∂v as a function of its input.

    Norms come in several forms (weight · x̂, (1 + weight) · x̂, with and without a bias). All are affine in their
    vectors, so the factor is the module's output with v = 1, less that with v = 0, every other vector zero. The
    module itself computes it, through a copy that holds those constants; for a factor that proves to be the input over
    its root mean square, that formula does, in one read of the input. ``example``: any input [..., D].

    Raises ValueError where the module's output is not affine in its vectors, element by element.
    """
    keys = list(dict(module.named_parameters(recurse=False)))
    sizes = {key: shape_of(getattr(module, key)) for key in keys}

    def output(x: Tensor, vectors: Mapping[str, Tensor | float]) -> Tensor:
        clone = copy.copy(module)
        constants = {
            key: torch.as_tensor(vectors.get(key, 0.0), dtype=x.dtype, device=x.device).expand(sizes[key])
            for key in keys
        }
        clone.__dict__ = {**module.__dict__, "_parameters": constants}
        return type(module).forward(clone, x)

    def factor(key: str, x: Tensor, zero: bool) -> Tensor:
        ones = output(x, {key: 1.0})
        return ones if zero else ones - output(x, {})

    with torch.no_grad():
        x = example.float()
        base = output(x, {})
        zero = not base.any().item()
        # No random numbers: whoever probes a training run must not disturb its draws.
        values = {key: 1.5 + torch.arange(sizes[key][0], device=x.device).add(i).cos() for i, key in enumerate(keys)}
        try:
            expected = base + sum(values[key] * factor(key, x, zero) for key in keys)
            affine = torch.allclose(output(x, values), expected, rtol=1e-4, atol=1e-5)
        except RuntimeError:  # shapes that do not broadcast
            affine = False
    if not affine:
        raise ValueError(f"{type(module).__name__} is not an element-wise affine function of its {' and '.join(keys)}")

    def by_module(key: str, x: Tensor) -> tuple[Tensor, None]:
        return factor(key, x, zero), None

    rules: dict[str, Factor] = {key: partial(by_module, key) for key in keys}
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if epsilon is not None:
        by_formula = partial(_over_root_mean_square, epsilon)
        # Small inputs tell where epsilon goes, and how large it is.
        inputs = torch.stack([x, epsilon**0.5 * x])
        normalised = torch.mul(*by_formula(inputs))
        for key in keys:
            if torch.allclose(normalised, factor(key, inputs, zero), rtol=1e-5, atol=1e-6):
                rules[key] = by_formula
    return rules


def _over_root_mean_square(epsilon: float, x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square() / x.shape[-1]
    return x, (mean_square + epsilon).rsqrt()
