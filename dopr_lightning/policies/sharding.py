"""How is a policy's network cut up over processes, and put together again? FSDP2 under Lightning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from dopr_lightning.policies.networks.base import ActionNetwork


class FSDP2(ModelParallelStrategy):
    """Every process holds a part of each weight, its gradient and its optimizer state.

    Lightning's ``ModelParallelStrategy`` over all processes at once, without tensor parallelism. Checkpoints are single
    files, which any number of processes resumes, and of which ``dopr test --ckpt`` and ``load_policy`` make a policy.

    Args:
        options: Further keywords of ``ModelParallelStrategy``: ``timeout``, ``process_group_backend``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Start the processes' communication, all of them in one group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(network: ActionNetwork, mesh: DeviceMesh) -> None:
    """Cut a network up, in place: each block's weights are gathered when it computes, the others for the whole pass.

    Args:
        network: Whole.
        mesh: The processes, in one dimension.
    """
    columns = {weight for module in network.modules() if (weight := _of_transpose(module, mesh)) is not None}

    def place(weight: nn.Parameter) -> Shard | None:
        return Shard(1) if weight in columns else None

    for block in _blocks(network):
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    # Always cut up between two passes: whoever reads the weights there (an average, a checkpoint) reads shards.
    fully_shard(network, mesh=mesh, shard_placement_fn=place, reshard_after_forward=True)
    register_fsdp_forward_method(network, "encode")


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of it."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def outline(network: ActionNetwork) -> ActionNetwork:
    """A copy whose weights have no values, for :func:`gathered`: once cut up, a network cannot be copied."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(weight.to("meta"), requires_grad=False))
    return copied


def gathered(network: ActionNetwork, outline: ActionNetwork) -> ActionNetwork:
    """A whole copy, on every process. All must ask for it at once.

    Args:
        network: Cut up.
        outline: What it was before.
    """
    whole, state = copy.deepcopy(outline), network.state_dict()
    whole.load_state_dict({name: _full(value) for name, value in state.items()}, assign=True)
    return whole.to(next(iter(state.values())).device).train(network.training)


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _of_transpose(module: nn.Module, mesh: DeviceMesh) -> nn.Parameter | None:
    """The weight of a transposed convolution, whose outputs, along which DoPr wants weights cut, are its columns."""
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return None
    weight = cast(nn.Parameter, module.weight)
    # FSDP2 cuts columns into equal parts only.
    return weight if weight.shape[1] % mesh.size() == 0 else None


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts that are called as one and have parts of their own."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or type(child) is nn.Sequential:
            yield from _blocks(child)
        elif any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child
