"""What would it cost elsewhere: another model, more ranks, other GPUs? Counted, not measured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dopr_lightning.bench.machine import Rates, measure_rates
from dopr_lightning.bench.plan import RANK, Planned, count_rows, plan
from dopr_lightning.bench.predict import PHASES, predict
from dopr_lightning.bench.report import COLOURS
from dopr_lightning.bench.workloads import known, workloads
from dopr_lightning.errors import UserError
from dopr_lightning.preconditioner.solvers import Solver

LLAMA = "llama-3.1-8b"
"""A model that is asked about and never measured."""

H100 = Rates(
    square=50e12,
    skinny=30e12,
    touch=6e-12,
    read=1.6e-12,
    factor=6e12,
    inverse=10e12,
    nystrom=5e12,
    small=2e-4,
    bandwidth=2.5e12,
    strided=1.2e12,
    rearranged=1.2e12,
    call=5e-6,
    network=40e9,
    latency=1e-3,
    overlap=True,
)
"""Assumed, not measured: three quarters of 67 TFLOP/s for float32 products without TF32 (the statistics' dtype), skinny
products bound by a memory of 3.35 TB/s, which rearranging copies use by a third, 400 Gb/s of network per GPU, a
millisecond per collective of 512 ranks."""

H100_MODEL_SPEED = 400e12
"""FLOP/s of the model's own bfloat16 forward and backward, assumed: 40 % of the peak."""

ROWS = 8192
"""Per step and rank, of a model whose batch is not known."""


class Llama8B(nn.Module):
    """The weights of Llama-3.1-8B (arXiv 2407.21783, Table 3), without a forward: sizes are all that is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        width, hidden, keys, vocabulary = 4096, 14336, 1024, 128256
        self.embed_tokens = nn.Embedding(vocabulary, width)
        sizes = {
            "q": (width, width),
            "k": (width, keys),
            "v": (width, keys),
            "o": (width, width),
            "gate": (width, hidden),
            "up": (width, hidden),
            "down": (hidden, width),
        }
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()}) for _ in range(32)
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)


def main(options: Any) -> None:
    """Predict for ``options.model`` with each solver; print, and write prediction.json and a plot.

    Raises:
        UserError: The model cannot be found or made, or has rows of its own.
    """
    from dopr_lightning.experiments.trial import write_json

    if options.rates == "measured" and options.ranks > 1:
        raise UserError("--rates measured knows no network; with --ranks take --rates h100")
    model, rows, flops = resolve(options.model, options.rows)
    rates = H100 if options.rates == "h100" else measure_rates(torch.device(options.device))
    speed = H100_MODEL_SPEED if options.rates == "h100" else rates.square
    base = flops / speed
    every, ranks = options.update_every, options.ranks
    table = []
    for solver in get_args(Solver):
        planned = plan(model, rows, solver=solver, update_every=every, ranks=ranks, shards=options.shards)
        prediction = predict(planned, rates, update_every=every, ranks=ranks, overlap=options.overlap)
        table.append(
            {
                "solver": solver,
                "phases": prediction.seconds,
                "seconds": prediction.total,
                "flops": prediction.flops,
                "held_bytes": prediction.held,
                "bytes_per_step": prediction.sent,
            }
        )
    results = {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows_per_rank": rows,
        "ranks": ranks,
        "shards": options.shards,
        "update_every": every,
        "overlap": options.overlap,
        "rates": vars(rates),
        "base": {"flops": flops, "speed": speed, "seconds": base},
        "solvers": table,
    }
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    write_json(results, output / "prediction.json")
    _plot(results, output / "prediction.png")
    _print(results)
    print(f"plot: {output / 'prediction.png'}   numbers: {output / 'prediction.json'}")


def resolve(name: str, rows: int | None) -> tuple[nn.Module, Mapping[str, int] | int, float]:
    """A model on the meta device, its rows per step, and the FLOPs of its forward and backward.

    Args:
        name: ``"llama-3.1-8b"``, the name of a workload, or ``"package.module:function"``.
        rows: Per step and rank, its batch's tokens, say; None for :data:`ROWS`. A workload has a batch of its own.

    Raises:
        UserError: There is no such model, or it is a workload and rows are given.
    """
    if name == LLAMA or ":" in name:
        rows = rows or ROWS
        with torch.device("meta"):
            model = Llama8B() if ":" not in name else _call(name)
        planned = plan(model, rows)
        return model, rows, 6.0 * rows * sum(_weights(layer) for layer in planned)
    if name not in known():
        raise UserError(
            f"unknown model {name!r}; choose from {LLAMA}, {', '.join(known())}, or package.module:function"
        )
    if rows is not None:
        raise UserError(f"--rows: {name} has a batch of its own; leave it out")
    workload = workloads([name], None)[0]
    model = workload.model("meta")
    ((inputs, target),) = workload.batches(1, "meta")
    counts = count_rows(model, lambda model: model(*inputs))
    with FlopCounterMode(display=False) as counter:
        F.mse_loss(model(*inputs), target).backward()
    return model, counts, counter.get_total_flops()


def _weights(layer: Planned) -> int:
    if layer.method.solver == "diagonal":
        return 0  # a lookup
    return layer.size.blocks * layer.size.m * layer.size.dim


def _call(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"--model {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {name}: makes no torch.nn.Module but a {type(model).__name__}")
    return model


def _print(results: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    base = results["base"]["seconds"]
    table = Table(
        title=f"{results['model']}: {results['parameters'] / 1e9:.3g}B parameters, {results['ranks']} ranks, "
        f"gradients in {results['shards']} shards, update_every={results['update_every']}; "
        f"a step without: {1e3 * base:.4g} ms (predicted; low-rank layers use {RANK} directions)",
        title_justify="left",
    )
    for heading in ("solver", *PHASES, "added ms", "share", "held GiB", "sent MiB / step"):
        table.add_column(heading, justify="left" if heading == "solver" else "right")
    for row in results["solvers"]:
        table.add_row(
            row["solver"],
            *(f"{1e3 * row['phases'][phase]:.3g}" for phase in PHASES),
            f"{1e3 * row['seconds']:.4g}",
            f"{100 * row['seconds'] / base:.1f} %",
            f"{row['held_bytes'] / 2**30:.3g}",
            f"{row['bytes_per_step'] / 2**20:.4g}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def _plot(results: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    rows, base = results["solvers"], results["base"]["seconds"]
    bottoms = [0.0] * len(rows)
    for phase in PHASES:
        heights = [row["phases"][phase] / base for row in rows]
        axes.bar([row["solver"] for row in rows], heights, bottom=bottoms, color=COLOURS[phase], label=phase)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("added time / step without (predicted)")
    axes.set_title(f"{results['model']}, {results['ranks']} ranks", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
