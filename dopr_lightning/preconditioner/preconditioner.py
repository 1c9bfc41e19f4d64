r"""Capture activations, pool them over ranks, invert their covariance, rewrite the gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from logging import getLogger
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dopr_lightning.preconditioner.audit import GradientAudit
from dopr_lightning.preconditioner.capture import Capture
from dopr_lightning.preconditioner.covariance import DampingScale
from dopr_lightning.preconditioner.coverage import check_patterns, check_still_frozen, find_coverage
from dopr_lightning.preconditioner.distributed import Reduction, world_size
from dopr_lightning.preconditioner.failures import report, too_inexact, unseen
from dopr_lightning.preconditioner.joining import Joining
from dopr_lightning.preconditioner.layers import ConvCovariance, Layer
from dopr_lightning.preconditioner.lowrank import WARM_UP, LowRankStack
from dopr_lightning.preconditioner.masks import Masks
from dopr_lightning.preconditioner.options import check_options
from dopr_lightning.preconditioner.refresh import labelled, refresh
from dopr_lightning.preconditioner.replay import Replay
from dopr_lightning.preconditioner.sharding import local, reshard
from dopr_lightning.preconditioner.solvers import STACKS, Solver, make_stacks
from dopr_lightning.preconditioner.stack import LayerRecord, Stack, StackOptions
from dopr_lightning.preconditioner.summary import Alignment, Summary, SummaryRow, alignment, covered_rows, moments
from dopr_lightning.preconditioner.threads import ToHost
from dopr_lightning.preconditioner.woodbury import WoodburyStack

log = getLogger(__name__)

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that lack it."""

_in_use: WeakSet[ActivationPreconditioner] = WeakSet()
"""Those of whole models (no ``parameters=``) that were not removed: two of one layer both rewrite its gradient."""


class ActivationPreconditioner:
    r"""Double Preconditioning's first half: multiply gradients by the inverse covariance of the layer's inputs.

    For a layer y = W z it keeps :math:`\Sigma = \frac{1}{n} \sum_i z_i z_i^\top` over the rows z that a backward pass
    went through, and :meth:`step` replaces

    .. math:: \nabla_W \;\leftarrow\; M = \nabla_W (\Sigma + \lambda I)^{-1}.

    Any optimizer then takes its step with M in place of the gradient ("Double Preconditioning (DoPr)", arXiv
    2606.06418, Section 4). Use optimizers whose update does not depend on the gradient's scale (AdamW, Muon, ...): M's
    scale is that of a gradient divided by a covariance, so plain SGD needs a learning rate of its own.

    Rows are counted when a backward pass goes through the layer. So each training row counts exactly once, also under
    gradient accumulation, activation checkpointing and ``torch.compile``, and forwards without a backward (validation,
    rollouts, target networks) and frozen layers count not at all. A weight used without its module
    (``F.linear(h, embedding.weight)``) adds a gradient whose rows are not seen: that is reported once, as a warning.

    Args:
        model: Linear, convolution, Embedding and MultiheadAttention modules in it are covered, and what
            :func:`~dopr_lightning.preconditioner.layers.register_layer` added; :meth:`summary` says what is not, and
            why. May be wrapped in DistributedDataParallel, compiled, or sharded by ``fully_shard``.
        damping: :math:`\gamma > 0`, relative to the covariance, see ``damping_scale``. With the default 0.01 and the
            trace scale, fewer than 100 directions per layer are whitened, whatever the width.
        damping_scale: ``"trace"`` for :math:`\lambda = \gamma \operatorname{tr} \Sigma`, which keeps its meaning when
            the width grows; ``"mean"`` for :math:`\lambda = \gamma \operatorname{tr} \Sigma / d`.
        update_every: Refresh statistics and inverses every this many :meth:`step` calls. Steps between refreshes
            capture nothing and send nothing. 1 is the paper's choice; 10 costs a fraction of it, and wants an ``ema``
            where a batch has few rows for the width (docs/results).
        ema: Weight of past covariances at a refresh, in [0, 1). 0, this refresh's rows alone, is the paper's choice;
            0.9 goes well with ``update_every=10``.
        overlap: Finish a refresh in the next step, so that host and GPU need not wait for each other: low-rank layers
            (and Woodbury's) have new inverses a step later. Ignored where every step refreshes, in the first steps, and
            where a layer with a gradient waits for its first inverse. The same on every device, but only GPUs gain.
        solver: ``"exact"``; ``"lowrank"``, whose share of a step does not grow with the width; or ``"auto"``, per size
            of layer the cheaper of the two that keeps to ``max_error``.
        max_error: Relative error of M that the low-rank solver's certificate may show; it takes as many directions as
            that needs. Ignored by ``"exact"``.
        conv: ``"channel"`` or ``"patch"`` covariance for convolutions, see
            :class:`~dopr_lightning.preconditioner.layers.Convolution`.
        bias: Precondition each bias with its weight, as the weight of a homogeneous coordinate 1.
        max_dim: Split larger covariances into equal blocks on the diagonal, none larger than this, which share the
            damping of the whole. None: never.
        max_rows: Use at most so many rows of each input, evenly spread over it. None: all. 16 times the width leaves
            little noise, whatever the batch.
        max_failures: Raise after so many failed refreshes of one layer in a row.
        include: Globs on whole module names (``"blocks.*"``); only matching modules are covered. None: all. Each must
            match a module of the model that has parameters.
        exclude: Globs on whole module names that are left alone. Likewise.
        parameters: Only these parameters are covered, those of one optimizer. None: all.
        process_group: The ranks that hold the model, over which statistics are pooled; needed where pipeline stages
            hold different layers. None: the default group where one exists. Ranks that see the same rows
            (tensor parallelism) may be among them: sums and counts multiply alike.

    Attributes:
        bytes_sent: Bytes this rank has handed to collectives so far.
        steps: Calls of :meth:`step` so far.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, a pattern matches nothing, a weight is sharded in a way that would need
            its gradient gathered, or nothing in ``model`` is left to cover.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ap = ActivationPreconditioner(model)
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> ap.step()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float = 0.01,
        damping_scale: DampingScale = "trace",
        update_every: int = 1,
        ema: float = 0.0,
        overlap: bool = False,
        solver: Solver = "auto",
        max_error: float = 0.2,
        conv: ConvCovariance = "channel",
        bias: bool = False,
        max_dim: int | None = None,
        max_rows: int | None = None,
        max_failures: int = 10,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        parameters: Collection[nn.Parameter] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_options(
            damping=damping,
            damping_scale=damping_scale,
            update_every=update_every,
            ema=ema,
            overlap=overlap,
            solver=solver,
            max_error=max_error,
            conv=conv,
            bias=bias,
            max_dim=max_dim,
            max_rows=max_rows,
            max_failures=max_failures,
            include=include,
            exclude=exclude,
        )
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a module, whose layers are looked at, got {type(model).__name__}; pass the model itself"
            )
        self.bytes_sent = 0
        self._update_every = update_every
        self._solver: Solver = solver
        self._max_failures = max_failures
        self.steps = 0
        self._due = False
        self._overlap = overlap
        self._pending: _Pending | None = None
        self._unused: set[str] = set()  # layers without an inverse for which an early refresh was in vain
        reshard(model)
        if process_group is None:  # else the model may be one stage of several, and they share their patterns
            check_patterns(model, include or (), exclude)
        self._coverage = find_coverage(
            model, conv=conv, bias=bias, max_dim=max_dim, include=include, exclude=exclude, parameters=parameters
        )
        layers = self._coverage.layers
        if (kind := layers[0].weight.device.type) in WITHOUT_FLOAT64:
            raise ValueError(
                f"inverses are found in float64, which {kind} devices lack; train on the CPU (Lightning: "
                "accelerator='cpu') or on CUDA"
            )
        self._group = process_group
        options = StackOptions(
            damping=damping,
            damping_scale=damping_scale,
            ema=ema,
            max_rows=max_rows,
            max_error=max_error,
            update_every=update_every,
        )
        self._stacks = make_stacks(layers, options, solver, pooled=world_size(process_group) > 1)
        self._stack_of = {layer: stack for stack in self._stacks for layer in stack.layers}
        self._masks = Masks()
        self._alignment: dict[str, Alignment] = {}
        self._watch()
        self._removed = False
        self._whole = parameters is None  # optimizers that share a layer may each step after a backward of its own
        if self._whole:
            self._look_for_others()
            _in_use.add(self)

    def _watch(self) -> None:
        """Hook the layers."""
        self._joining = Joining(self._stack_of, self._count)
        self._replay = Replay()
        self._audit = GradientAudit(self._coverage.layers)
        self._capture = Capture(self._coverage.layers, self._take, self._audit)
        self._lock = RLock()  # of a model on several devices each has a thread in the backward

    @property
    def update_every(self) -> int:
        """Steps per refresh; may be changed between steps."""
        return self._update_every

    @update_every.setter
    def update_every(self, update_every: int) -> None:
        check_options(update_every=update_every)
        self._update_every = update_every
        self._capture.listen(self.collecting)

    @property
    def collecting(self) -> bool:
        """Whether rows are being counted, that is, whether the next :meth:`step` refreshes the inverses."""
        if self.steps % self._update_every == 0 or self._due:
            return True
        return self.steps < WARM_UP and any(isinstance(stack, LowRankStack) for stack in self._stacks)

    @property
    def covered(self) -> set[str]:
        """The names of the parameters whose gradients are rewritten."""
        return {name for layer in self._coverage.layers for name in layer.parameters}

    @property
    def frozen(self) -> Sequence[Layer]:
        """Layers left out because their weight is frozen; :meth:`step` raises if one is unfrozen later."""
        return self._coverage.frozen

    @torch.no_grad()
    def step(self, *, measure: bool = False) -> None:
        """Rewrite the gradients of the covered parameters in place: call between backward and the optimizer's step.

        Under data parallelism all ranks must call it equally often; it communicates on refresh steps only.

        Args:
            measure: Compare each gradient with its rewrite for the next :meth:`summary`; costs a copy of each, and
                where weights are sharded four numbers per parameter, summed over ranks: all measure at the same step.

        Raises:
            RuntimeError: A covered layer has a gradient although no row reached it, so its inverse would be missing;
                or its inverse has failed ``max_failures`` times in a row; or :meth:`remove` was called before.
        """
        if self._removed:
            raise RuntimeError("this preconditioner was removed, and sees no rows any more; make a new one")
        check_still_frozen(self._coverage.frozen)
        refreshed = self.collecting
        self.settle()
        with torch.autocast(self._stacks[0].device.type, enabled=False):
            if refreshed:
                self._refresh()
                self._audit.report()
                self._masks.report()
            if measure:
                before = {name: gradient.clone() for name, gradient in self._gradients()}
            with labelled("dopr::apply"):
                self._replay.apply(self._stacks)
            if measure:
                self._alignment = self._compare(before)
        self._plan(refreshed)
        self.steps += 1
        self._capture.listen(self.collecting)

    def discard(self) -> None:
        """Forget the rows counted since the last step, instead of :meth:`step` when the optimizer skips its own.

        ``torch.amp.GradScaler`` skips steps whose gradients overflowed. Nothing of such a step may remain: the next
        one counts anew, and refreshes if this one would have.
        """
        self._joining.clear()
        for stack in self._stacks:
            stack.discard()
        self._masks.clear()

    @torch.inference_mode(False)  # what a validation's end makes, training changes in place
    @torch.no_grad()
    def settle(self) -> None:
        """Finish a refresh that overlaps with the next step, now instead of then; otherwise do nothing.

        To be called before the model leaves its device. Which inverses a step uses does not depend on it.

        Raises:
            RuntimeError: What the :meth:`step` that began it would have raised without ``overlap``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with torch.autocast(self._stacks[0].device.type, enabled=False), labelled("dopr::solve"):
            found = pending.finish()
            *done, gradients = pending.download.wait()
            self._accept(found | dict(zip(pending.done, done, strict=True)), pending.step)
        seen = {layer for layer, record in self._records() if record.rows_seen}
        suspects = zip(pending.suspects, gradients.tolist(), strict=True)
        self._raise_unseen([layer for layer, gradient in suspects if gradient and layer not in seen], pending.masked)

    def mask(self, mask: Tensor) -> AbstractContextManager[None]:
        """A context for forwards in which some rows do not count, such as padding tokens.

        Args:
            mask: Boolean, True for rows that count, shaped like the positions of the layers' inputs: (B, T) for inputs
                (B, T, d), (T, B) for inputs (T, B, d). Layers that see another number of rows, after pooling for
                example, count all of theirs.

        Raises:
            TypeError: The mask is not boolean.
            ValueError: In the backward: a layer's input has the mask's positions in another order.

        Example:
            >>> with ap.mask(tokens != PADDING):  # doctest: +SKIP
            ...     loss = loss_function(model(tokens), targets)
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a boolean tensor, True for rows that count, got {found}; write mask.bool()")
        return self._capture.mask(mask)

    def share_masks(self, others: Iterable[ActivationPreconditioner]) -> None:
        """Warn of a mask only if it fits no layer of the others either, which are all given the same masks."""
        together = [self._masks, *(other._masks for other in others)]
        for masks in together:
            masks.shared = together

    def remove(self) -> None:
        """Take the hooks off the model; the preconditioner is of no use afterwards."""
        self._removed = True
        self._pending = None
        _in_use.discard(self)
        self._joining.clear()
        self._replay = Replay()
        self._capture.remove()
        self._audit.remove()

    def summary(self) -> Summary:
        """One row per parameter: covered, with the size and spectrum of its covariance, or why not.

        Costs an eigenvalue decomposition per exactly solved layer: for a person to look at, not for every step.
        """
        self.settle()
        rows = [SummaryRow(name, reason=reason) for name, reason in self._coverage.reasons.items()]
        for stack in self._stacks:
            rows += covered_rows(stack, self._alignment)
        return Summary(sorted(rows, key=lambda row: self._coverage.order(row.parameter)))

    def __getstate__(self) -> dict[str, Any]:
        """For copies of model and preconditioner at once: the copy hooks its own model."""
        self.settle()
        watching = ("_joining", "_replay", "_audit", "_capture", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in watching}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()
        self._capture.listen(self.collecting)
        if self._removed:
            self.remove()
        elif self._whole:
            _in_use.add(self)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on bit for bit, with any number of ranks."""
        self.settle()
        layers = {name: state for stack in self._stacks for name, state in stack.state_dict().items()}
        return {"steps": self.steps, "due": self._due, "unused": sorted(self._unused), "layers": layers}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Rows counted since the last step are forgotten, and a refresh under way.

        Raises:
            ValueError: The state was saved for other layers, shapes or solvers.
        """
        saved = state["layers"]
        known = {layer.name for layer in self._stack_of}
        if saved and saved.keys() != known:
            differences = {
                "it lacks, so exclude their modules or start the preconditioner afresh": known - saved.keys(),
                "not covered here": saved.keys() - known,
            }
            listed = "; ".join(f"{said}: {', '.join(sorted(names))}" for said, names in differences.items() if names)
            raise ValueError(f"the preconditioner's state was saved for other layers; {listed}")
        if saved:
            loaded = [self._loaded(stack, saved) for stack in self._stacks]
        else:  # from before the first refresh
            options, pooled = self._stacks[0].options, world_size(self._group) > 1
            loaded = make_stacks(self._coverage.layers, options, self._solver, pooled=pooled)
        self.steps, self._due, self._unused = state["steps"], state["due"], set(state["unused"])
        self._pending = None
        self.discard()
        self._replay.forget()
        self._stacks = loaded
        self._stack_of.update({layer: stack for stack in loaded for layer in stack.layers})
        self._capture.listen(self.collecting)

    def _loaded(self, stack: Stack, saved: Mapping[str, Any]) -> Stack:
        """A stack of the same layers in the state of the saved one, which another solver may have had."""
        kind = STACKS[saved[stack.layers[0].name]["solver"]]
        if self._solver != "auto" and isinstance(stack, LowRankStack) != (kind is LowRankStack):
            raise ValueError(
                f"{stack.layers[0].name}: the preconditioner's state was saved by solver={kind.solver!r}, this one "
                f"has solver={self._solver!r}; take the same, or solver='auto'"
            )
        loaded = kind(stack.layers, stack.options)
        loaded.load_state_dict(saved)
        return loaded.to_exact() if isinstance(loaded, WoodburyStack) and world_size(self._group) > 1 else loaded

    def _look_for_others(self) -> None:
        """Point out a weight that an earlier preconditioner goes on rewriting."""
        # By modules, since an earlier one's weights may have been replaced, or be computed no more.
        theirs = {id(module) for other in _in_use for layer in other._coverage.layers for module in layer.modules}
        shared = [layer.name for layer in self._coverage.layers if theirs & {*map(id, layer.modules)}]
        if shared:
            log.warning(
                "%s%s: another preconditioner covers it too, and if both step, its gradient is rewritten twice; call "
                "remove() of the other one, or give each an include of its own",
                shared[0],
                f" (and {len(shared) - 1} more)" if shared[1:] else "",
            )

    def _plan(self, refreshed: bool) -> None:
        """A layer first used between refreshes must not wait for the next one."""
        if self.steps % self.update_every == 0:
            self._unused.clear()
        without = [layer for layer, record in self._records() if self._waits(layer, record)]
        if refreshed:  # in vain: a gradient of zeros, which some wrappers give to unused layers
            self._unused.update(layer.name for layer in without)
        self._due = any(layer.name not in self._unused for layer in without)

    @staticmethod
    def _waits(layer: Layer, record: LayerRecord) -> bool:
        """Whether a layer has a gradient and no inverse yet, and not for want of a usable covariance."""
        return record.refreshed_at is None and record.failures == 0 and layer.has_gradient

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of every gradient that is rewritten, by the parameter's public name."""
        for layer in self._stack_of:
            for name, parameter in layer.parameters.items():
                if parameter.grad is not None:
                    gradient = local(parameter.grad)
                    yield name, gradient.to_dense() if gradient.is_sparse else gradient

    def _compare(self, before: Mapping[str, Tensor]) -> dict[str, Alignment]:
        """Every gradient with its rewrite, shards put together."""
        after = dict(self._gradients())
        names = list(dict.fromkeys(name for layer in self._stack_of for name in layer.parameters))
        device = self._stacks[0].device
        nothing = torch.zeros(4, dtype=torch.double, device=device)
        sums = [moments(before[name], after[name]).to(device) if name in after else nothing for name in names]
        together = torch.stack(sums)
        if any(isinstance(parameter, DTensor) for layer in self._stack_of for parameter in layer.parameters.values()):
            # What is replicated counts once per rank, in all four sums alike.
            reduction = Reduction([together], self._group)
            reduction.wait(0)
            self.bytes_sent += reduction.bytes
        return {name: alignment(of) for name, of in zip(names, together, strict=True) if name in after}

    def _records(self) -> Iterator[tuple[Layer, LayerRecord]]:
        for stack in self._stacks:
            yield from zip(stack.layers, stack.records, strict=True)

    def _replace(self, old: Stack, new: Stack) -> None:
        self._replay.forget()
        self._stacks[self._stacks.index(old)] = new
        self._stack_of.update(dict.fromkeys(new.layers, new))

    def _take(self, layer: Layer, x: Tensor, mask: Tensor | None, lasts: bool) -> None:
        """Capture's sink: hold one input to count it with others, or count it now."""
        with self._lock:
            if self._pending is not None:  # the number of directions must not change in an open window
                self.settle()
            if not (lasts and mask is None and self._joining.hold(layer, x)):
                self._count([layer], x, mask)

    def _count(self, layers: Sequence[Layer], x: Tensor, mask: Tensor | None = None) -> None:
        with labelled("dopr::statistics"):
            stack = self._stack_of[layers[0]]
            stack.add(layers, x, mask)
            if mask is not None:
                self._masks.note(mask, stack.mask_fits)
            if isinstance(stack, WoodburyStack) and stack.too_many_rows:
                self._replace(stack, stack.to_exact())

    def _refresh(self) -> None:
        """Pool the sums over ranks and renew the inverses; where this may overlap, leave the end to :meth:`settle`."""
        self._joining.flush()  # of a backward that failed
        if world_size(self._group) > 1:  # init_process_group may have been called after this was made
            for stack in list(self._stacks):
                if isinstance(stack, WoodburyStack):
                    self._replace(stack, stack.to_exact())
        stacks = self._stacks
        deferred = self._may_overlap()
        refreshed = refresh(stacks, self._group, deferred=deferred)
        self.bytes_sent += refreshed.bytes_sent
        outcomes = refreshed.outcomes
        if deferred:
            suspects = [layer for stack in stacks for layer in stack.without_rows() if layer.has_gradient]
            found = [_has_entries(layer).to(self._stacks[0].device) for layer in suspects]
            gradients = torch.stack(found) if found else torch.zeros(0, device="cpu")
            download = ToHost(*outcomes.values(), gradients)
            self._pending = _Pending(
                refreshed.finish, tuple(outcomes), suspects, download, self.steps, self._masks.fitted
            )
            return
        self._accept(outcomes, self.steps)
        without = [
            layer
            for layer, record in self._records()
            if record.rows_seen == 0 and layer.has_gradient and bool(_has_entries(layer))
        ]
        self._raise_unseen(without, self._masks.fitted)

    def _raise_unseen(self, layers: Sequence[Layer], masked: bool) -> None:
        if not layers:
            return
        layer, *others = sorted(layers, key=lambda layer: self._coverage.order(layer.name))
        stack = self._stack_of[layer]
        before = stack.records[stack.index_of[layer]].refreshed_at is not None
        raise RuntimeError(unseen(layer, others, masked=masked, before=before))

    def _may_overlap(self) -> bool:
        """Whether this refresh may be finished in the next step, which is none itself."""
        if not self._overlap or self._due or self.update_every == 1 or self.steps < WARM_UP:
            return False
        return not any(self._waits(layer, record) for layer, record in self._records())

    def _accept(self, outcomes: Mapping[Stack, Tensor], step: int) -> None:
        self._replay.forget()
        for stack in list(self._stacks):
            # Here the host waits for the device, if it has not before: once per stack, whatever the number of layers.
            for failure in stack.accept(outcomes[stack].tolist(), step):
                report(failure, self._max_failures)
            if isinstance(stack, LowRankStack) and stack.unattainable:
                self._fall_back(stack)

    def _fall_back(self, stack: LowRankStack) -> None:
        """The tolerance needs too many directions: the exact solver takes over, where it may."""
        if self._solver == "auto":
            self._replace(stack, stack.to_exact())
            log.info("%s", too_inexact(stack, "solver='auto' goes on with the exact solver"))
        elif not stack.warned:
            stack.warned = True
            log.warning("%s", too_inexact(stack, "raise max_error or damping, or take solver='auto'"))


def _has_entries(layer: Layer) -> Tensor:
    """Whether the gradient is other than 0 here, on its device; without a copy of it, as its matrix may be."""
    gradient = layer.gradient() if layer.homogeneous else layer.weight_gradient
    return (gradient._values() if gradient.is_sparse else gradient).any()


@dataclass(frozen=True)
class _Pending:
    """A refresh that is finished in the next step.

    Attributes:
        finish: Gives the outcomes of the stacks that are not done.
        done: The others.
        suspects: Layers with a gradient that no row of this rank has reached.
        download: The outcomes of ``done``, and whether the gradients of ``suspects`` are other than 0.
        step: When it began.
        masked: Whether a mask may have left out rows.
    """

    finish: Callable[[], dict[Stack, Tensor]]
    done: Sequence[Stack]
    suspects: Sequence[Layer]
    download: ToHost
    step: int
    masked: bool
