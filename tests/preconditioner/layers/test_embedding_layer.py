"""An embedding as the Linear layer of one-hot rows that it is: dense, sparse, padded, sharded."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dopr_lightning.preconditioner.layers import Layer, layers_of

TOKENS = torch.tensor([[0, 1, 1], [4, 4, 4]])


def only_layer(module: nn.Module) -> Layer:
    (layer,) = layers_of("emb", module, conv="channel", bias=True)
    return layer


def precondition(layer: Layer, x: Tensor, gamma: float) -> None:
    """What the preconditioner does, after backward."""
    tokens, counted = layer.tokens(x)
    counts = torch.zeros(layer.dim, dtype=torch.double).index_add_(0, tokens, counted.double())
    frequencies = counts / counted.sum()
    layer.scale(1 / (frequencies + gamma * frequencies.sum()))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_is_a_linear_layer_of_one_hot_rows(sparse: bool, index: torch.dtype, damped_solve, backward) -> None:
    module = nn.Embedding(6, 3, sparse=sparse).double()
    backward(module(TOKENS.to(index)))
    twin = nn.Linear(6, 3, bias=False).double()
    one_hot = F.one_hot(TOKENS, 6).double()
    backward(twin(one_hot))
    precondition(only_layer(module), TOKENS.to(index), 0.03)
    expected = damped_solve(twin.weight.grad, one_hot.reshape(-1, 6))
    assert module.weight.grad.is_sparse is sparse
    torch.testing.assert_close(module.weight.grad.to_dense(), expected.T)


def test_accumulated_sparse_gradients_may_name_a_token_twice(damped_solve, backward) -> None:
    module = nn.Embedding(6, 3, sparse=True).double()
    backward(module(TOKENS))
    backward(module(TOKENS.flip(0)))
    assert not module.weight.grad.is_coalesced()
    expected = damped_solve(module.weight.grad.to_dense().T, F.one_hot(TOKENS.flatten(), 6).double())
    precondition(only_layer(module), TOKENS, 0.03)
    torch.testing.assert_close(module.weight.grad.to_dense(), expected.T)


@pytest.mark.parametrize("sparse", [False, True])
def test_padding_tokens_are_no_rows(sparse: bool, damped_solve, backward) -> None:
    module = nn.Embedding(6, 3, padding_idx=4, sparse=sparse).double()
    backward(module(TOKENS))
    before = module.weight.grad.to_dense().clone()
    assert not before[4].any()
    precondition(only_layer(module), TOKENS, 0.03)
    expected = damped_solve(before.T, F.one_hot(torch.tensor([0, 1, 1]), 6).double())
    torch.testing.assert_close(module.weight.grad.to_dense(), expected.T)


def test_max_norm_and_scale_grad_by_freq_keep_their_meaning(backward) -> None:
    module = nn.Embedding(6, 3, max_norm=0.5, scale_grad_by_freq=True).double()
    backward(module(TOKENS))
    before = module.weight.grad.clone()
    precondition(only_layer(module), TOKENS, 0.03)
    factors = 1 / (torch.tensor([1, 2, 0, 0, 3, 0]).double() / 6 + 0.03)
    torch.testing.assert_close(module.weight.grad, before * factors[:, None])
    assert bool((module.weight.detach()[[0, 1, 4]].norm(dim=1) <= 0.5 + 1e-6).all())


@pytest.mark.parametrize("sparse", [False, True])
def test_gradient_is_a_matrix_over_the_tokens(sparse: bool, backward) -> None:
    module = nn.Embedding(6, 3, sparse=sparse).double()
    backward(module(TOKENS))
    torch.testing.assert_close(only_layer(module).gradient(), module.weight.grad.to_dense().T[None])


def test_embeddings_that_disagree_on_padding_do_not_pool_their_rows() -> None:
    first, second = nn.Embedding(6, 3), nn.Embedding(6, 3, padding_idx=1)
    second.weight = first.weight
    assert only_layer(first).key == only_layer(second).key
    assert only_layer(first).signature != only_layer(second).signature


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_shard_takes_the_factors_of_its_own_tokens(rank: int, placement: Shard) -> None:
    """Of 7 tokens on 3 ranks: 3, 3 and 1 rows. The other way, 4 columns: 2, 2 and none."""
    module = nn.Embedding(7, 4).double()
    whole, factors = torch.randn(7, 4, dtype=torch.double), torch.rand(7, dtype=torch.double)
    dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (3,))

        def shard(tensor: Tensor) -> DTensor:
            chunks = list(tensor.chunk(3, placement.dim))
            chunks += [tensor.narrow(placement.dim, 0, 0)] * (3 - len(chunks))
            mine = chunks[rank].clone()
            return DTensor.from_local(
                mine, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride()
            )

        module.weight = nn.Parameter(shard(module.weight.detach()))
        module.weight.grad = shard(whole)
        only_layer(module).scale(factors)
        expected = shard(whole * factors[:, None]).to_local()
        torch.testing.assert_close(module.weight.grad.to_local(), expected)
    finally:
        dist.destroy_process_group()
