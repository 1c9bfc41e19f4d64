"""The transformer: its attention, its modulation, and how its gradients come alive."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks import ActionTransformer
from dopr_lightning.policies.networks.transformer import Attention, Block
from dopr_lightning.preconditioner import ActivationPreconditioner

OBS, A, TO, T, B = 5, 3, 2, 8, 4
both_modes = pytest.mark.parametrize("denoise", [True, False])


def transformer(denoise: bool = True, **options: Any) -> ActionTransformer:
    torch.manual_seed(0)
    return ActionTransformer(OBS, A, TO, T, denoise, **({"width": 16, "depth": 2, "heads": 2} | options)).double()


def perturbed(network: nn.Module) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(denoise: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    action = torch.randn(B, T, A, generator=generator, dtype=torch.float64)
    time = torch.rand(B, generator=generator, dtype=torch.float64)
    observation = torch.randn(B, TO, OBS, generator=generator, dtype=torch.float64)
    return (action, time, observation) if denoise else (None, None, observation)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("width", "heads"), [(16, 2), (16, 4), (256, 2)])
def test_attention_is_softmax_of_8_over_d(width: int, heads: int) -> None:
    attention = perturbed(Attention(width, heads).double())
    x, d = 3 * normal(B, T, width), width // heads
    w_q, w_k, w_v = attention.qkv.weight.split(width)
    b_q, b_k, b_v = attention.qkv.bias.split(width)
    mixed = []
    for head in range(heads):
        of = slice(head * d, (head + 1) * d)
        q, k, v = (x @ w[of].T + b[of] for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        logits = torch.einsum("bid,bjd->bij", q, k) * 8 / d
        mixed.append(torch.softmax(logits, dim=2) @ v)
    expected = torch.cat(mixed, dim=2) @ attention.output.weight.T + attention.output.bias
    torch.testing.assert_close(attention(x), expected, atol=1e-12, rtol=1e-12)


def test_attention_at_64_features_per_head_is_the_usual_one() -> None:
    attention = perturbed(Attention(128, 2).double())
    usual = nn.MultiheadAttention(128, 2, batch_first=True, dtype=torch.float64)
    usual.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.output.weight,
            "out_proj.bias": attention.output.bias,
        }
    )
    x = 3 * normal(B, T, 128)
    torch.testing.assert_close(attention(x), usual(x, x, x)[0], atol=1e-12, rtol=1e-12)


def test_block_is_that_of_dit() -> None:
    """x + g1 Attention(s1 LN(x) + h1), then the same around the MLP; scales s are counted from 1."""
    block = perturbed(Block(16, 2, 4).double())
    x, condition = normal(B, T, 16), normal(B, 1, 16)
    h1, s1, g1, h2, s2, g2 = (
        condition @ w.T + b
        for w, b in zip(block.modulation.weight.split(16), block.modulation.bias.split(16), strict=True)
    )

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    first, _, second = block.mlp
    y = x + g1 * block.attention(norm(x) * (1 + s1) + h1)
    hidden = F.gelu((norm(y) * (1 + s2) + h2) @ first.weight.T + first.bias)
    expected = y + g2 * (hidden @ second.weight.T + second.bias)
    assert hidden.shape[-1] == 64
    torch.testing.assert_close(block(x, condition), expected, atol=1e-12, rtol=1e-12)


@both_modes
def test_starts_at_zero_with_blocks_that_do_nothing(denoise: bool) -> None:
    network = transformer(denoise)
    assert (network(*inputs(denoise)) == 0).all()
    x = normal(B, T, 16)
    assert torch.equal(network.blocks[0](x, normal(B, 1, 16)), x)


@both_modes
def test_gradients_arrive_in_three_steps(denoise: bool) -> None:
    """As the docstring says: what multiplies a zero has no gradient yet. No weight waits longer."""
    network = transformer(denoise)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    alive = []
    for _ in range(3):
        optimizer.zero_grad()
        (network(*inputs(denoise)) - normal(B, T, A)).square().mean().backward()
        optimizer.step()
        alive.append({name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()})
    everything = {name for name, _ in network.named_parameters()}
    assert alive[0] == {"readout.weight", "readout.bias"}
    assert alive[1] > alive[0] | {"input.weight", "modulation.weight", "blocks.0.modulation.weight"}
    assert alive[1] < everything
    assert alive[2] == everything


def test_tokens_see_each_other_and_know_their_place() -> None:
    network = perturbed(transformer())
    action, time, observation = inputs()
    assert action is not None
    out = network(action, time, observation)
    changed = action.clone()
    changed[:, -1] += 1
    moved = (network(changed, time, observation) - out).abs().amax(dim=(0, 2))
    assert (moved > 1e-6).all()
    # Without the code of the position, swapping two tokens would swap their outputs.
    order = torch.arange(T)
    order[[0, 5]] = order[[5, 0]]
    assert (network(action[:, order], time, observation)[:, order] - out).abs().max() > 1e-3


def test_preconditioning_covers_every_matrix_and_survives_the_zeros() -> None:
    """The first gradients of most layers are zero; their covariances are not."""
    network = transformer()
    preconditioner = ActivationPreconditioner(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    moments = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            (network(*inputs()) - normal(B, T, A)).square().mean().backward()
            plain = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
            preconditioner.step()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
            moments.append({name for name, p in network.named_parameters() if not torch.equal(p.grad, plain[name])})
            optimizer.step()
            optimizer.zero_grad()
    matrices = {name for name, p in network.named_parameters() if p.ndim == 2}
    assert {row.parameter for row in preconditioner.summary() if row.covered} == matrices
    assert all(row.failures == 0 for row in preconditioner.summary() if row.covered)
    assert moments[0] == {"readout.weight"}
    assert moments[2] == matrices


def test_default_heads_have_the_usual_size() -> None:
    with torch.device("meta"):
        network = ActionTransformer(OBS, A, TO, T, True)
    attention = network.blocks[0].attention
    assert isinstance(attention, Attention)
    assert attention.qkv.in_features == 64 * attention.heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 18, "heads": 4}, "width 18 is not a multiple of heads 4; change width"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        transformer(**arguments)
