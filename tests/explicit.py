"""Layers written as the Linear layers that they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

E, HEADS = 6, 2


class ExplicitAttention(nn.Module):
    """Attention over (B, L, E) as in "Attention Is All You Need", with an ordinary Linear layer for every map."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        bias = source.in_proj_bias is not None
        self.query = nn.Linear(E, E, bias=bias)
        self.key = nn.Linear(source.kdim, E, bias=bias)
        self.value = nn.Linear(source.vdim, E, bias=bias)
        self.output = nn.Linear(E, E, bias=bias)
        self.double()
        projections = [self.query, self.key, self.value]
        if source.in_proj_weight is None:
            weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        else:
            weights = source.in_proj_weight.chunk(3)
        for linear, weight in zip([*projections, self.output], [*weights, source.out_proj.weight], strict=True):
            linear.weight.data = weight.detach().clone()
        if bias:
            for linear, b in zip(projections, source.in_proj_bias.chunk(3), strict=True):
                linear.bias.data = b.detach().clone()
            self.output.bias.data = source.out_proj.bias.detach().clone()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear, x in [(self.query, query), (self.key, key), (self.value, value)]
        )
        weights = (q @ k.mT / (E // HEADS) ** 0.5).softmax(-1)
        self.mixed = (weights @ v).transpose(1, 2).flatten(2)
        return self.output(self.mixed)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Patches (n, C_in * K) read out of the convolution itself: one identity kernel per (channel, tap)."""
    c, k = module.in_channels, math.prod(module.kernel_size)
    probe = type(module)(
        c, c * k, module.kernel_size, module.stride, module.padding, module.dilation, 1, False, module.padding_mode
    )
    probe.weight.data = torch.eye(c * k).reshape(c * k, c, *module.kernel_size)
    return probe.double()(x).detach().flatten(2).transpose(1, 2).reshape(-1, c * k)
