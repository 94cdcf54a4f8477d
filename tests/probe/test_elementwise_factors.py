"""∂y/∂v of norms: by formula where the module proves to be one over the root mean square, else by the module itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dcr_scale.probe.units import elementwise_factors

WIDTH = 6


class EpsilonOutside(nn.Module):
    """x / (root mean square + ε): with the attribute and the shape of an RMS norm, and another function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True).sqrt() + self.eps)


@pytest.mark.parametrize(
    ("module", "by_formula"),
    [
        (LlamaRMSNorm(WIDTH, eps=1e-5), True),
        (GemmaRMSNorm(WIDTH), True),
        (nn.LayerNorm(WIDTH), False),
        (EpsilonOutside(), False),
    ],
    ids=["Llama", "Gemma", "LayerNorm", "epsilon outside"],
)
@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["ordinary", "of epsilon's size"])
def test_is_the_derivative(module, by_formula, size):
    module = module.double()
    torch.manual_seed(0)
    x = size * torch.randn(4, WIDTH, dtype=torch.float64)
    vectors = {key: parameter.detach() for key, parameter in module.named_parameters()}
    expected = jacrev(lambda v: functional_call(module, v, (x,)))(vectors)
    factors = elementwise_factors(module, torch.arange(3.0 * WIDTH).view(3, WIDTH).sin())
    assert set(factors) == set(vectors)
    for key, factor in factors.items():
        values, scale = factor(x)
        assert (scale is not None) == by_formula
        found = values if scale is None else values * scale
        # transformers' norms compute in float32 whatever they are given.
        torch.testing.assert_close(torch.diag_embed(found.expand(4, -1)), expected[key], rtol=1e-6, atol=0)
