"""nn.MultiheadAttention against the same attention written with four Linear layers, in float64."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from explicit import HEADS, E, ExplicitAttention
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dopr_lightning.preconditioner.layers import layers_of, not_covered

CASES = {
    "self": ({}, "self"),
    "self-batch-first": ({"batch_first": True}, "self"),
    "cross": ({"batch_first": True}, "cross"),
    "three": ({"batch_first": True}, "three"),
    "kdim-vdim": ({"batch_first": True, "kdim": 4, "vdim": 5}, "three"),
    "vdim": ({"batch_first": True, "vdim": 5}, "three"),
    "no-bias": ({"batch_first": True, "bias": False}, "self"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
def test_is_four_linear_layers(case: str, bias: bool, keyword: bool, precondition, backward) -> None:
    torch.manual_seed(0)
    options, sources = CASES[case]
    module = nn.MultiheadAttention(E, HEADS, **options).double()
    for p in module.parameters():
        nn.init.normal_(p)
    explicit = ExplicitAttention(module)
    query = torch.randn(5, 3, E, dtype=torch.double)
    memory = torch.randn(5, 4, E, dtype=torch.double)
    key = torch.randn(5, 4, module.kdim, dtype=torch.double)
    value = torch.randn(5, 4, module.vdim, dtype=torch.double)
    inputs = {"self": (query,) * 3, "cross": (query, memory, memory), "three": (query, key, value)}[sources]
    backward(explicit(*inputs))

    layers = {layer.part: layer for layer in layers_of("attn", module, conv="channel", bias=bias)}
    assert list(layers) == ["query", "key", "value", "output"]
    assert len({layer.name for layer in layers.values()}) == len({layer.key for layer in layers.values()}) == 4

    call = inputs if module.batch_first else tuple(x.transpose(0, 1) for x in inputs)
    kwargs = dict(zip(("query", "key", "value"), call, strict=True)) if keyword else {}
    args = () if keyword else call
    y = module(*args, **kwargs)[0]
    backward(y if module.batch_first else y.transpose(0, 1))
    for part in ("query", "key", "value"):
        precondition(layers[part], layers[part].input(args, kwargs))
    precondition(layers["output"], explicit.mixed.detach())

    fed = [*inputs, explicit.mixed.detach()]
    for (name, linear), x in zip(explicit.named_children(), fed, strict=True):
        (reference,) = layers_of(name, linear, conv="channel", bias=bias)
        precondition(reference, x)
    if module.in_proj_weight is None:
        projections = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        gradients = [p.grad for p in projections]
    else:
        gradients = list(module.in_proj_weight.grad.chunk(3))
    gradients.append(module.out_proj.weight.grad)
    for gradient, linear in zip(gradients, explicit.children(), strict=True):
        torch.testing.assert_close(gradient, linear.weight.grad)
    if module.in_proj_bias is not None:
        biases = [*module.in_proj_bias.grad.chunk(3), module.out_proj.bias.grad]
        for gradient, linear in zip(biases, explicit.children(), strict=True):
            torch.testing.assert_close(gradient, linear.bias.grad)


def test_only_the_output_is_functional() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    layers = layers_of("attn", module, conv="channel", bias=False)
    assert [layer.functional for layer in layers] == [False, False, False, True]
    assert all(layer.modules == [module] for layer in layers)
    assert layers[3].weight is module.out_proj.weight
    with pytest.raises(NotImplementedError):
        layers[3].input((torch.zeros(1, 1, E),) * 3, {})


def test_names_are_those_of_the_parameters() -> None:
    fused = layers_of("attn", nn.MultiheadAttention(E, HEADS), conv="channel", bias=True)
    assert [layer.parameter_names for layer in fused] == [["attn.in_proj_weight", "attn.in_proj_bias"]] * 3 + [
        ["attn.out_proj.weight", "attn.out_proj.bias"]
    ]
    separate = layers_of("attn", nn.MultiheadAttention(E, HEADS, kdim=4), conv="channel", bias=False)
    assert [layer.name for layer in separate] == [
        "attn.q_proj_weight",
        "attn.k_proj_weight",
        "attn.v_proj_weight",
        "attn.out_proj.weight",
    ]


def test_bias_rows_of_key_and_value_are_not_covered() -> None:
    module = nn.MultiheadAttention(E, HEADS, add_bias_kv=True)
    reasons = not_covered("attn", module, layers_of("attn", module, conv="channel", bias=True))
    assert reasons.keys() == {"attn.bias_k", "attn.bias_v"}
    without = not_covered("attn", module, layers_of("attn", module, conv="channel", bias=False))
    assert without.keys() == reasons.keys() | {"attn.in_proj_bias", "attn.out_proj.bias"}


def test_each_projection_writes_its_own_third() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    module.in_proj_weight.grad, module.in_proj_bias.grad = torch.zeros(3 * E, E), torch.zeros(3 * E)
    layers = layers_of("attn", module, conv="channel", bias=True)[:3]
    for number, layer in enumerate(layers, start=1):
        layer.write(torch.full_like(layer.gradient(), number))
    expected = torch.arange(1.0, 4.0).repeat_interleave(E)
    torch.testing.assert_close(module.in_proj_weight.grad, expected[:, None].expand(-1, E))
    torch.testing.assert_close(module.in_proj_bias.grad, expected)


@pytest.mark.parametrize("ranks", [2, 5])
def test_shards_cut_the_projections_anywhere(ranks: int) -> None:
    """18 rows on 2 ranks: the second starts within the key's; on 5: 4, 4, 4, 4 and 2."""
    module = nn.MultiheadAttention(E, HEADS).double()
    gradient, factors = torch.randn(3 * E, E, dtype=torch.double), [2.0, 3.0, 5.0]
    written = []
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (ranks,))
            mine = gradient.chunk(ranks)[rank].clone()
            shard = partial(DTensor.from_local, run_check=False, shape=(3 * E, E), stride=(E, 1))
            module.in_proj_weight = nn.Parameter(shard(torch.zeros_like(mine), mesh, [Shard(0)]))
            module.in_proj_weight.grad = shard(mine, mesh, [Shard(0)])
            layers = layers_of("attn", module, conv="channel", bias=False)[:3]
            for layer, factor in zip(layers, factors, strict=True):
                layer.write(factor * layer.gradient())
            written.append(module.in_proj_weight.grad.to_local())
        finally:
            dist.destroy_process_group()
    expected = gradient * torch.tensor(factors).double().repeat_interleave(E)[:, None]
    torch.testing.assert_close(torch.cat(written), expected)
