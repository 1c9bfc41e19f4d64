"""What muP does to every parameter, as a table for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dopr_lightning.mup import MupSpec, WeightDecayRule
from dopr_lightning.optim.bases import Choice, resolve
from dopr_lightning.optim.plan import Assignment, plan


def mup_table(
    model: nn.Module,
    base: Choice,
    mup: MupSpec,
    *,
    roles: Mapping[str, str] | None = None,
    weight_decay_rule: WeightDecayRule = "independent",
    lr_by_role: Mapping[str, float] | None = None,
    zero_readouts: bool = False,
    **options: Any,
) -> str:
    """A row per kind of parameter that muP treats alike; print it.

    Args:
        model: Of the width that is to be trained, on any device, the meta device too.
        base: As for :func:`~dopr_lightning.optim.make_optimizer`, like the remaining arguments.
        mup: The spec of the model's family.
        roles: Overrides of the parameters' roles.
        weight_decay_rule: See :func:`~dopr_lightning.mup.rules.weight_decay`.
        lr_by_role: Multipliers of the learning rate by role, which are shown multiplied with muP's.
        zero_readouts: Whether readouts start from 0, see :meth:`~dopr_lightning.MupSpec.initialize`.
        **options: The base's keywords, as far as its scaling hangs on them (``adjust_lr_fn`` of Muon).

    Returns:
        The table. Its columns are role; whether the base or AdamW steps it; how many parameters (tensors) and one of
        them; multipliers of learning rate, weight decay, eps and initial values.
    """
    chosen = resolve(base)
    zero = mup.last_readouts(model) if zero_readouts else set()
    kinds: dict[tuple[Any, ...], list[Assignment]] = {}
    for entry in plan(
        model, chosen, roles=roles, mup=mup, weight_decay_rule=weight_decay_rule, lr_by_role=lr_by_role, options=options
    ):
        decay = entry.weight_decay if entry.decays else 0.0
        initial = 0.0 if entry.name in zero else entry.initial_value
        kinds.setdefault((entry.role, entry.main, entry.lr, decay, entry.eps, initial), []).append(entry)
    name = base if isinstance(base, str) else chosen.algorithm.__name__
    rows = [("role", "by", "tensors", "for example", "lr", "weight decay", "eps", "initial value")]
    for (role, main, *multipliers), entries in sorted(kinds.items(), key=lambda kind: kind[0][:2]):
        first = entries[0]
        example = f"{first.name} {'x'.join(map(str, first.shape))}"
        row = (role, name if main else "rest", str(len(entries)), example, *(f"x {m:.4g}" for m in multipliers))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
