"""What is asked of autograd's engine and of the compiler, where torch has no public way (tested: 2.11 to 2.14)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch._library.effects import EffectType
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

ORDERED = EffectType.ORDERED
"""The effect of operators that must be neither dropped nor swapped."""


def _set_for_all_threads(config: Any, name: str, value: Any) -> None:
    """Change a setting of the compiler's: in torch 2.14 they are a thread's own, and a new one has the defaults."""
    setattr(config, name, value)
    config._config[name].default = value


# Hooks come and go with refreshes. So torch.compile is to ask at every call whether its modules have those that it
# traced; else it would go on with what it saw first, of another model of the same class too. Set here and not where
# hooks are made, so that it holds for a model that was compiled and run before.
_set_for_all_threads(torch._dynamo.config, "skip_nnmodule_hook_guards", False)
# So there are two graphs where there was one, in training as in evaluation, and for each kind of size.
_set_for_all_threads(torch._dynamo.config, "recompile_limit", 2 * torch._dynamo.config.recompile_limit)


def current_backward() -> int:
    """A number for the backward that this thread is in: one inside another has its own. -1 outside."""
    return torch._C._current_graph_task_id()


def at_the_end_of_backward(function: Callable[[], None]) -> None:
    """Let ``function`` be called when the backward under way has come to its end."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def gets_gradient(weight: nn.Parameter) -> bool:
    """Whether the backward under way, or a later one through its graph, adds to a weight's ``.grad``.

    ``torch.autograd.grad`` of an adversarial input does not, nor ``backward(inputs=...)`` of another network.
    """
    # A graph that is kept may be walked for the weights later (retain_graph, create_graph, zero-bubble pipelines). Of a
    # DTensor the graph has another tensor.
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(weight) is not nn.Parameter:
        return True
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(weight).node)
    except RuntimeError:  # torch.autograd.grad of the weight itself, or the weight was frozen after the forward
        return True


def is_batched(gradient: Tensor) -> bool:
    """Whether it is of many backwards in one (``torch.autograd.grad(..., is_grads_batched=True)``)."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)


def within_torch_func() -> bool:
    """Whether tensors are wrapped by a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def drop_modes(unwanted: Callable[[TorchFunctionMode], bool]) -> bool:
    """Take modes off this thread's stack that nothing will take off any more; returns whether there were some.

    After KeyboardInterrupt, and whatever else is no Exception, torch does not even call hooks of ``always_call=True``.
    """
    stack = _get_current_function_mode_stack()
    if not any(map(unwanted, stack)):
        return False
    for _ in stack:
        _pop_mode()
    for mode in stack:
        if not unwanted(mode):
            _push_mode(mode)
    return True


@contextmanager
def hooks_numbered_from(number: int) -> Iterator[None]:
    """Within this, hooks have consecutive numbers: compiled graphs ask for those that are always called by number."""
    following, RemovableHandle.next_id = RemovableHandle.next_id, number
    try:
        yield
    finally:
        RemovableHandle.next_id = max(following, RemovableHandle.next_id)


def keep_out_of_cuda_graphs(operator: str) -> None:
    """Say by name what an operator's tag says, which its effect hides from Inductor (torch 2.11 to 2.14).

    Recorded in a CUDA graph (``mode="reduce-overhead"``) it would make its buffers in the graph's memory, and never
    run again.
    """
    # Of all threads: a backward is compiled when it first runs, on a GPU by a thread of autograd's.
    config = torch._inductor.config
    if operator not in config.custom_should_partition_ops:
        _set_for_all_threads(config, "custom_should_partition_ops", [*config.custom_should_partition_ops, operator])
