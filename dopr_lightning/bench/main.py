"""``dopr bench``: AdamW beside DoPr-AdamW in one run, split and beside its floor; or predicted, for any model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopr_lightning.errors import Parser, UserError, output_folder
from dopr_lightning.project import LIBRARY, Project

if TYPE_CHECKING:
    from dopr_lightning.preconditioner.solvers import Solver

SOLVERS = ("exact", "lowrank", "auto")

SECONDS = {"cpu": 60.0, "cuda": 15.0}
"""For the intervals of one comparison, of which a GPU makes as many in less time."""

HOST_BOUND = 0.9
"""Share of a step's time from which on the host has no time to spare."""

SHORT_TURN = 8
"""Steps in a row of each variant where the host has no time to spare: it may have neighbours, for seconds on end."""

LONGEST_TURN = 10
"""Steps in a row of variants that do the same at every step: enough for the host to run ahead of a GPU."""

QUICK = ("mlp-256", "mlp-512")
"""What ``--quick`` measures unless told otherwise, at the first of their batch sizes."""

MEASURING = ("models", "batch", "solver", "max_rows", "autocast", "compile", "quick")
"""Options that say nothing of a prediction, which is of one model, with every solver and all rows."""

PREDICTING = ("rows", "shards", "rates")
"""Options that say nothing of a measurement."""


def main(arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Measure, or with ``--model`` predict.

    Raises:
        UserError: A mistake in the arguments, found before anything is measured.
    """
    parser = _parser(project.command)
    options = parser.parse_args(arguments)
    for name in PREDICTING if options.model is None else MEASURING:
        if getattr(options, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            if options.model is None:
                raise UserError(f"{flag} is for predictions; add --model, or leave it out")
            raise UserError(f"{flag} is for measurements, --model predicts; leave one of them out")
    for name in ("update_every", "max_rows", "threads", "ranks", "rows", "shards"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    # Read when torch is loaded: its profiler talks on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from dopr_lightning.experiments.runner import cores
    from dopr_lightning.preconditioner.threads import threads

    measured = options.model is None or options.rates == "measured"
    if options.device == "cuda" and measured and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that PyTorch can use")
    if options.tf32 and options.device != "cuda":
        raise UserError("--tf32: only GPUs have it; add --device cuda")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    options.threads = options.threads or cores()
    with threads(options.threads):
        if options.model is None:
            _measure(options)
        else:
            from dopr_lightning.bench.elsewhere import main as predict

            predict(options)


def _measure(options: Any) -> None:
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dopr_lightning.bench.report import plot, print_tables
    from dopr_lightning.bench.workloads import workloads
    from dopr_lightning.experiments.trial import earlier_results, write_json
    from dopr_lightning.versions import versions

    output: Path = options.output
    earlier_results(output / "results.json", "rows")
    names = options.models.split(",") if options.models else QUICK if options.quick else None
    chosen = workloads(names, _sizes(options.batch) if options.batch else None)
    if options.quick:  # the smallest batch of each
        chosen = list({workload.name: workload for workload in reversed(chosen)}.values())[::-1]
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "settings": {
            "solver": options.solver,
            "update_every": options.update_every,
            "max_rows": options.max_rows,
            "overlap": options.overlap,
            "threads": options.threads,
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "autocast": options.autocast,
            "tf32": options.tf32,
            "compile": options.compile,
            "quick": options.quick,
        },
        "versions": versions(),
        "rows": [],
        "communication": [],
    }
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress:
        everything = progress.add_task("bench", total=len(chosen) + (options.ranks > 1))
        for workload in chosen:
            task = progress.add_task(f"{workload.name}, batch {workload.batch_size}", total=None)
            row = _row(workload, options, partial(progress.advance, task))
            results["rows"].append(row)
            write_json(results, output / "results.json")  # an interrupted run keeps what it has
            progress.remove_task(task)
            progress.advance(everything)
            ratio = row["ratio"]["median"]
            progress.console.print(f"{workload.name}, batch {workload.batch_size}: {ratio:.3f} x AdamW")
        if options.ranks > 1:
            results["communication"] = _communicate(chosen[0], options)
            progress.advance(everything)
    write_json(results, output / "results.json")
    plot(results, output / "bench.png")
    print_tables(results)
    print(f"plot: {output / 'bench.png'}   numbers: {output / 'results.json'}")


def _row(workload: Any, options: Any, advance: Any) -> dict[str, Any]:
    """Everything about one workload."""
    import torch

    from dopr_lightning.bench.machine import measure_rates
    from dopr_lightning.bench.measure import Limits, Quartiles, Variant, paired_intervals, peak_bytes, phases
    from dopr_lightning.bench.plan import held_bytes, observed
    from dopr_lightning.bench.predict import predict
    from dopr_lightning.preconditioner import ActivationPreconditioner

    device = torch.device(options.device)
    autocast = torch.bfloat16 if options.autocast == "bf16" else None
    batches = workload.batches(16, device)
    variant = partial(Variant, workload, device, autocast)
    limits = Limits(2, 3, 0.0) if options.quick else Limits(3, 100, SECONDS[device.type])

    every = options.update_every
    given = {"solver": options.solver, "update_every": every, "max_rows": options.max_rows, "overlap": options.overlap}
    dopr = variant(lambda model: ActivationPreconditioner(model, **given), options.compile)
    base = variant(None, options.compile)
    host_share = base.host_share(batches)
    times = []
    turn = _turn(device, every, host_share)
    for pair in paired_intervals([base, dopr], batches, every, limits, turn=turn):
        times.append(pair)
        advance()
    preconditioner = dopr.preconditioner
    assert isinstance(preconditioner, ActivationPreconditioner)
    planned = observed(preconditioner)
    rates = measure_rates(device, max(layer.size.dim for layer in planned))
    split = phases(dopr, batches, length=every)
    held = held_bytes(preconditioner)  # a whole number of intervals has passed: the next step is a refresh
    base_peak, dopr_peak = peak_bytes(base, batches[0], 0), peak_bytes(dopr, batches[0], held)
    overhead = Quartiles.of([after - before for before, after in times])
    split["other"] = overhead.median - sum(split.values())
    prediction = predict(
        planned, rates, update_every=every, host_bound=host_share > HOST_BOUND, overlap=options.overlap
    )
    del base, dopr, preconditioner

    turn = min(turn, LONGEST_TURN)  # every step is a refresh
    exact = _exact(variant, batches, replace(limits, most=10 * limits.most), turn, advance)
    return {
        "model": workload.name,
        "batch": workload.batch_size,
        "goal": workload.goal(device.type, every) if options.solver == "auto" else None,
        "intervals": len(times),
        "host_share": host_share,
        "base_seconds": asdict(Quartiles.of([before for before, _ in times])),
        "dopr_seconds": asdict(Quartiles.of([after for _, after in times])),
        "ratio": asdict(Quartiles.of([after / before for before, after in times])),
        "overhead_seconds": asdict(overhead),
        "phases": split,
        "rates": asdict(rates),
        "flops": prediction.flops,
        "floor_seconds": prediction.floor,
        "base_peak_bytes": base_peak,
        "dopr_peak_bytes": dopr_peak,
        "held_bytes": held,
        "predicted": {
            "seconds": prediction.total,
            "phases": prediction.seconds,
            "held_bytes": prediction.held,
        },
        "layers": [asdict(layer.size) | asdict(layer.method) for layer in planned],
        "exact": exact,
    }


def _exact(variant: Any, batches: Sequence[Any], limits: Any, turn: int, advance: Any) -> dict[str, Any]:
    """The exact solver at every step, beside plain Cholesky and beside nothing."""
    from dopr_lightning.bench.cholesky import PlainCholesky
    from dopr_lightning.bench.measure import Quartiles, paired_intervals
    from dopr_lightning.bench.plan import held_bytes, observed
    from dopr_lightning.preconditioner import ActivationPreconditioner

    three = [
        variant(None),
        variant(PlainCholesky),
        variant(lambda model: ActivationPreconditioner(model, solver="exact", update_every=1)),
    ]
    times = []
    for triple in paired_intervals(three, batches, turn, limits, turn=turn):
        times.append(triple)
        advance()
    exact = three[2].preconditioner
    assert isinstance(exact, ActivationPreconditioner)
    base, plain, own = zip(*times, strict=True)
    return {
        "steps": len(times),
        "base_seconds": asdict(Quartiles.of(base)),
        "plain_seconds": asdict(Quartiles.of(plain)),
        "exact_seconds": asdict(Quartiles.of(own)),
        "ratio": asdict(Quartiles.of([after / before for _, before, after in times])),
        "over_base": asdict(Quartiles.of([after / before for before, _, after in times])),
        "held_bytes": held_bytes(exact),
        "goal_bytes": _goal_bytes(observed(exact)),
    }


def _turn(device: Any, every: int, host_share: float) -> int:
    """Steps in a row of each variant, see :func:`~.measure.paired_intervals`."""
    if device.type == "cpu":
        return 1
    longest = SHORT_TURN if host_share > HOST_BOUND else every
    return max(turn for turn in range(1, longest + 1) if every % turn == 0)


def _goal_bytes(planned: Sequence[Any]) -> int:
    """One packed copy of all covariances, one copy of their inverses."""
    from dopr_lightning.preconditioner.packed import packed_size

    dense = [layer.size for layer in planned if layer.method.solver != "diagonal"]
    return sum(4 * shape.blocks * (packed_size(shape.dim) + shape.dim**2) for shape in dense)


def _communicate(workload: Any, options: Any) -> list[dict[str, Any]]:
    """Bytes between ranks, with either solver."""
    from dopr_lightning.bench.communication import bytes_per_step
    from dopr_lightning.bench.elsewhere import H100
    from dopr_lightning.bench.predict import predict

    every, ranks = options.update_every, options.ranks
    solvers: tuple[Solver, ...] = ("exact", "lowrank")
    measured = bytes_per_step(workload, ranks=ranks, solvers=solvers, update_every=every)
    return [
        {
            "model": workload.name,
            "ranks": ranks,
            "solver": solver,
            "bytes_per_step": sent,
            # The rates do not enter the bytes.
            "predicted": predict(planned, H100, update_every=every, ranks=ranks).sent,
            "tracked": max(layer.method.tracked for layer in planned),
        }
        for solver, (sent, planned) in zip(solvers, measured, strict=True)
    ]


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError(f"--batch {text}: give sizes separated by commas, 256,1024")
    return sizes


def _parser(command: str) -> Parser:
    parser = Parser(
        prog=f"{command} bench",
        allow_abbrev=False,
        description="Measure what preconditioning adds to a step of AdamW, on two copies of a model that step in turn: "
        "medians over whole intervals between refreshes, split into statistics, reduce, solve, apply, beside the "
        "FLOP floor and a prediction; and the exact solver at every step beside plain Cholesky. With --model only "
        "this machine is measured: a prediction for any model, ranks, solver and cadence.",
        epilog=f"example: {command} bench --quick, or {command} bench --model llama-3.1-8b --ranks 512 --rates h100",
    )
    parser.add_argument(
        "--models",
        help="comma-separated; default: all (mlp-256 .. mlp-2048, unet, transformer-512, gpt2-block, resnet18)",
    )
    parser.add_argument("--batch", help="comma-separated batch sizes; default: each model's own, 256,1024 for policies")
    parser.add_argument("--solver", choices=SOLVERS, default="auto", help="default: %(default)s")
    parser.add_argument("--update-every", type=int, default=10, help="steps per refresh; default: %(default)s")
    parser.add_argument("--overlap", action="store_true", help="finish each refresh in the next step")
    parser.add_argument("--max-rows", type=int, help="of each input that statistics are taken of; default: all")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--autocast", choices=("none", "bf16"), default="none", help="of the forward; default: %(default)s"
    )
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="let products of float32 matrices use a GPU's tensor cores, as torch.set_float32_matmul_precision('high')",
    )
    parser.add_argument(
        "--compile",
        choices=("default", "reduce-overhead"),
        help="torch.compile the model, in this mode; exact beside plain Cholesky is measured without",
    )
    parser.add_argument("--quick", action="store_true", help="small models, few intervals: seconds, and noisy")
    parser.add_argument(
        "--ranks", type=int, default=1, help="count bytes between so many processes too; default: %(default)s"
    )
    parser.add_argument("--output", type=output_folder, default=Path("runs/bench"), help="default: %(default)s")
    prediction = parser.add_argument_group("prediction")
    prediction.add_argument(
        "--model", help="llama-3.1-8b, a name as in --models, or package.module:function that makes one"
    )
    prediction.add_argument(
        "--rows",
        type=int,
        help="per rank and step, tokens say, of a model that is not one of --models; default: 8192",
    )
    prediction.add_argument(
        "--shards", type=int, default=1, help="ranks that share each gradient; default: %(default)s"
    )
    prediction.add_argument("--rates", choices=("measured", "h100"), default="measured", help="default: this machine's")
    return parser
