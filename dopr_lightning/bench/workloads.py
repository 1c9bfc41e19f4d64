"""Which models are measured, on what data?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks import ConditionalUnet1d, ResidualMLP

Batch = tuple[tuple[Tensor | None, ...], Tensor]
"""Arguments of the model's forward, and the target."""

GOALS = {
    ("cpu", "mlp-512", 1024, 10): 1.08,
    ("cpu", "mlp-2048", 1024, 10): 1.10,
    ("cpu", "unet", 256, 10): 1.12,
    ("cpu", "unet", 1024, 10): 1.06,
    ("cuda", "unet", 1024, 32): 1.03,
    ("cuda", "gpt2-block", 64, 32): 1.01,
}
"""What a DoPr-AdamW step with the default solver may cost, in AdamW steps, by device, model, batch size and steps per
refresh: on two CPU cores, or in bfloat16 on an H100 or H200."""

ENOUGH = 1 << 30
"""Bytes of batches, of which two at least are drawn: sequences by the tens of thousands take long to draw."""

MLP_WIDTHS = (256, 512, 1024, 2048)

OBSERVATION, ACTION = 348, 17
"""Humanoid-v5's."""


@dataclass(frozen=True)
class Workload:
    """A model and its batches.

    Attributes:
        name: For the command line and the table.
        batch_size: Samples per step; of the transformer, sequences.
        build: Makes the model.
        draw: Makes a batch of a given size.
    """

    name: str
    batch_size: int
    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], Batch]

    def goal(self, device: str, update_every: int) -> float | None:
        """The ratio to stay below, where one was set."""
        return GOALS.get((device, self.name, self.batch_size, update_every))

    def model(self, device: torch.device | str) -> nn.Module:
        """The same model at every call."""
        torch.manual_seed(0)
        return self.build().to(device)

    def batches(self, count: int, device: torch.device | str) -> list[Batch]:
        """The same batches at every call, so many or :data:`ENOUGH`."""
        generator = torch.Generator().manual_seed(0)
        drawn: list[Batch] = []
        size = 0
        while len(drawn) < count and (len(drawn) < 2 or size < ENOUGH):
            inputs, target = self.draw(self.batch_size, generator)
            size += target.nbytes + sum(x.nbytes for x in inputs if x is not None)
            drawn.append((tuple(x if x is None else x.to(device) for x in inputs), target.to(device)))
        return drawn


def _attention(*projections: Tensor, heads: int) -> Tensor:
    """Causal attention of queries, keys and values (B, T, width)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projections)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class GPT2Block(nn.Module):
    """A block of GPT-2 small: attention of twelve heads with its maps in one, and an MLP, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        width = 768
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to (B, T, width)."""
        x = x + self.o(_attention(*self.qkv(self.norm1(x)).chunk(3, -1), heads=12))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TransformerBlock(nn.Module):
    """A pre-norm block of Llama's kind: attention of eight heads with its own linear maps, and a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to (B, T, width)."""
        h = self.norm1(x)
        x = x + self.o(_attention(self.q(h), self.k(h), self.v(h), heads=8))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def known() -> list[str]:
    """The names of all workloads."""
    return list(_makers())


def workloads(names: Sequence[str] | None, batch_sizes: Sequence[int] | None) -> list[Workload]:
    """The workloads of these names (None: all) at these batch sizes (None: each one's own).

    Raises:
        UserError: A name is unknown.
    """
    makers = _makers()
    chosen = []
    for name in makers if names is None else names:
        if name not in makers:
            raise UserError(f"unknown model {name!r}; choose from {', '.join(makers)}")
        sizes, build, draw = makers[name]
        chosen += [Workload(name, size, build, draw) for size in batch_sizes or sizes]
    return chosen


Maker = tuple[Sequence[int], Callable[[], nn.Module], Callable[[int, torch.Generator], Batch]]


def _makers() -> dict[str, Maker]:
    policies = (256, 1024)
    makers: dict[str, Maker] = {}
    for width in MLP_WIDTHS:
        makers[f"mlp-{width}"] = (policies, partial(_mlp, width), _draw_mlp)
    makers["unet"] = (policies, lambda: ConditionalUnet1d(20, 2, 2, 16, True, channels=(128, 256, 512)), _draw_unet)
    makers["transformer-512"] = ((8,), lambda: TransformerBlock(512), partial(_draw_sequences, 512, 256))
    makers["gpt2-block"] = ((1,), GPT2Block, partial(_draw_sequences, 768, 1024))
    makers["resnet18"] = ((64,), _resnet18, _draw_resnet)
    return makers


def _mlp(width: int) -> nn.Module:
    return ResidualMLP(OBSERVATION, ACTION, 1, 1, False, width=width, depth=3)


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=ACTION)


def _features(*shape: int, generator: torch.Generator) -> Tensor:
    """Gaussian, with eigenvalues that decay as 1 / j: as many of them above the damping as Humanoid's observations."""
    return torch.randn(*shape, generator=generator) * torch.arange(1, shape[-1] + 1) ** -0.5


# Targets can be learnt: on noise, layers come to need more directions than those of any policy we measured.


def _draw_mlp(size: int, generator: torch.Generator) -> Batch:
    observation = _features(size, 1, OBSERVATION, generator=generator)
    return (None, None, observation), torch.tanh(observation[..., :ACTION])


def _draw_unet(size: int, generator: torch.Generator) -> Batch:
    """Flow matching: a noisy chunk and the velocity towards a chunk that follows from the observations."""
    observation = _features(size, 2, 20, generator=generator)
    phase = torch.linspace(0, 3, 16)[:, None]
    action = torch.tanh(observation[:, :1, :2] + phase * observation[:, 1:, :2])
    noise, time = torch.randn(size, 16, 2, generator=generator), torch.rand(size, generator=generator)
    return (torch.lerp(noise, action, time[:, None, None]), time, observation), action - noise


def _draw_sequences(width: int, length: int, size: int, generator: torch.Generator) -> Batch:
    """Features that drift along the sequence; the target is the next position's."""
    x = _features(size, length + 1, width, generator=generator)
    x = torch.lerp(x, x.cumsum(1) / torch.arange(1, length + 2)[:, None].sqrt(), 0.5)
    return (x[:, :-1],), x[:, 1:]


def _draw_resnet(size: int, generator: torch.Generator) -> Batch:
    """Images in which neighbouring pixels are alike; the target is the brightness here and there."""
    coarse = torch.randn(size, 3, 21, 21, generator=generator)
    return (F.interpolate(coarse, scale_factor=4, mode="bilinear"),), torch.tanh(coarse[:, 0, 10, :ACTION])
