"""How many directions does the low-rank solver need, and does its certificate tell the truth?

Trains policies by plain AdamW and follows, beside it, the leading subspaces of every layer's covariance at several
ranks, refreshed as the solver refreshes them: at steps 0, 1, 2 and then every ten. At a few steps it compares
M^ with the exact M of the same rows and the same gradients, and both with the certificate. Writes results.json and
rank.png into a folder.

    MINARI_DATASETS_PATH=../shared/data/minari python benchmarks/rank_and_error.py \
        --dataset-id mujoco/humanoid/expert-demos-v0 --pusht ../shared/data/pusht/pusht_cchi_v7_replay.zarr.zip \
        --output docs/results/rank
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopr_lightning.data import Minari, PushT
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.policies.algorithms import Algorithm, FlowMatching, Regression
from dopr_lightning.policies.networks import ActionNetwork, ConditionalUnet1d, ResidualMLP
from dopr_lightning.policies.normalizer import Normalizer
from dopr_lightning.preconditioner.capture import Capture
from dopr_lightning.preconditioner.certificate import Floats, coefficients, relative_error, required_rank
from dopr_lightning.preconditioner.covariance import damping_values
from dopr_lightning.preconditioner.layers import DenseLayer, Layer, layers_of, named_modules
from dopr_lightning.preconditioner.subspace import nystrom, probe, random_basis
from dopr_lightning.versions import versions

EVERY = 10
WARM_UP = 3
MEASURED = (0, 2, 10, 50, 100, 200, 300, 500, 1000, 1500)
TOLERANCES = (0.1, 0.15, 0.25)
SEED = 0


@dataclass(frozen=True)
class Run:
    """One training run. The width of the U-Net is that of its finest level; coarser ones have two and four times."""

    task: str
    width: int
    batch_size: int
    steps: int


FULL = [
    Run("humanoid", 256, 256, 1510),
    Run("humanoid", 256, 1024, 110),
    Run("humanoid", 512, 256, 310),
    Run("humanoid", 1024, 256, 310),
    Run("humanoid", 1024, 1024, 60),
    Run("humanoid", 2048, 256, 60),
    Run("humanoid", 4096, 256, 20),
    Run("pusht", 128, 64, 60),
]
QUICK = [Run("humanoid", 256, 256, 60), Run("humanoid", 512, 256, 20)]


class Tracker:
    """One layer's leading subspace at one rank."""

    def __init__(self, layer: Layer, rank: int) -> None:
        self.basis = random_basis(layer.blocks, layer.dim, rank, seed=SEED, dtype=torch.float32)
        self.refreshes = 0

    def refresh(self, rows: Tensor) -> None:
        vectors = probe(self.basis, seed=self.refreshes)
        n = rows.shape[1]
        self.trace = rows.square().sum((1, 2)) / n
        self.basis, self.eigenvalues, good = nystrom(vectors, rows.mT @ (rows @ vectors) / n, self.trace)
        assert good.all()
        self.refreshes += 1

    def apply(self, matrix: Tensor, damping: Tensor, *, rank: int | None = None, tail: bool = True) -> Tensor:
        """The approximate preconditioner on a matrix (blocks, m, d); without ``tail`` all other eigenvalues count 0."""
        values, basis = self.eigenvalues.double(), self.basis.double()
        trace = self.trace.double() if tail else values.sum(-1)
        known = values.numpy(), trace.numpy(), damping.numpy(), basis.shape[1]
        c, rest = map(torch.from_numpy, coefficients(*known, values.shape[-1] if rank is None else rank))
        return (matrix - (matrix @ basis * c[:, None]) @ basis.mT) / rest[:, None, None]

    def certificates(self, damping: Tensor) -> Floats:
        known = self.eigenvalues.double().numpy(), self.trace.double().numpy()
        return relative_error(*known, damping.numpy(), self.basis.shape[1])


class Exact:
    """The exact damped inverse from the rows, by an eigendecomposition of their smaller Gram matrix."""

    def __init__(self, rows: Tensor, gamma: float) -> None:
        rows = rows.double() / rows.shape[1] ** 0.5
        n, d = rows.shape[1:]
        self.spectrum, vectors = torch.linalg.eigh(rows @ rows.mT if n < d else rows.mT @ rows)
        self.spectrum = self.spectrum.clamp(min=0)
        self.damping = damping_values(self.spectrum.sum(-1), d, gamma, "trace")
        lam = self.damping[:, None]
        if n < d:  # Woodbury: 1 / sigma turns left into right singular vectors
            self.left, self.weight = rows.mT @ vectors, 1 / (self.spectrum + lam)
        else:
            self.left, self.weight = vectors, self.spectrum / (self.spectrum + lam)

    def apply(self, matrix: Tensor) -> Tensor:
        return (matrix - (matrix @ self.left * self.weight[:, None]) @ self.left.mT) / self.damping[:, None, None]

    def above(self, share: float) -> int:
        """Eigenvalues above a multiple of the damping, the largest number of any block."""
        return int((self.spectrum > share * self.damping[:, None]).sum(-1).max())


def relative(approximation: Tensor, truth: Tensor) -> float:
    return short(float((approximation - truth).norm() / truth.norm()))


def short(value: float) -> float:
    """Four digits, to keep the records small."""
    return float(f"{value:.4g}")


def make(run: Run, options: argparse.Namespace) -> tuple[DemonstrationData, ActionNetwork, Algorithm, float]:
    """Data, network, objective and learning rate of configs/humanoid.yaml and configs/pusht.yaml."""
    if run.task == "humanoid":
        data = DemonstrationData(
            Minari(options.dataset_id), batch_size=run.batch_size, episodes=10, validation_episodes=5, seed=SEED
        )
        network: ActionNetwork = ResidualMLP(data.observation_dim, data.action_dim, 1, 1, False, width=run.width)
        return data, network, Regression(), 3e-3 * 256 / run.width
    data = DemonstrationData(
        PushT(options.pusht),
        batch_size=run.batch_size,
        observe=2,
        horizon=16,
        act=8,
        validation_episodes=6,
        seed=SEED,
    )
    channels = [run.width, 2 * run.width, 4 * run.width]
    network = ConditionalUnet1d(data.observation_dim, data.action_dim, 2, 16, True, channels=channels)
    return data, network, FlowMatching(), 1e-4


def batches(data: DemonstrationData) -> Iterator[dict[str, Tensor]]:
    loader = data.train_dataloader()
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from loader


def measure(run: Run, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per layer and measured step, and one more per layer nine steps later for the age of the inverse."""
    torch.manual_seed(SEED)
    data, network, algorithm, lr = make(run, options)
    mode = "standard" if run.task == "humanoid" else "minmax"
    fitted = data.statistics()
    observation, action = Normalizer(data.observation_dim, mode), Normalizer(data.action_dim)
    observation.fit(fitted["observation"])
    action.fit(fitted["action"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-5)
    noise = torch.Generator().manual_seed(SEED)

    layers = [
        layer
        for name, module in named_modules(network)
        for layer in layers_of(name, module, conv="channel", bias=False)
        if isinstance(layer, DenseLayer) and layer.dim > max(options.ranks)
    ]
    trackers = {layer: {rank: Tracker(layer, rank) for rank in options.ranks} for layer in layers}
    rows: dict[Layer, Tensor] = {}
    wanted = False
    capture = Capture(layers, lambda layer, x, *_: rows.__setitem__(layer, layer.rows(x)), lambda: wanted)

    records: list[dict[str, Any]] = []
    exact: dict[Layer, Exact] = {}
    started = time.monotonic()
    for step, batch in zip(range(run.steps), batches(data), strict=False):
        refresh, measured, aged = step < WARM_UP or step % EVERY == 0, step in MEASURED, step - EVERY + 1 in MEASURED
        wanted = refresh or (aged and step > EVERY)
        optimizer.zero_grad()
        loss = algorithm.loss(network, observation(batch["observation"]), action(batch["action"]), noise)
        loss.backward()
        for layer in layers if wanted else ():
            for tracker in trackers[layer].values() if refresh else ():
                tracker.refresh(rows[layer])
            if not (measured or aged):
                continue
            gradient, now = layer.gradient().double(), Exact(rows[layer], options.gamma)
            truth = now.apply(gradient)
            record = {"step": step, "layer": layer.name, "dim": layer.dim, "rows": rows[layer].shape[1]}
            if measured:
                white = rows[layer].double()
                white_truth = now.apply(white)
                record |= {"above": now.above(1), "above_tenth": now.above(0.1), "ranks": {}}
                for rank, tracker in trackers[layer].items():
                    record["ranks"][rank] = {
                        "error": relative(tracker.apply(gradient, now.damping), truth),
                        "without_tail": relative(tracker.apply(gradient, now.damping, tail=False), truth),
                        "white": relative(tracker.apply(white, now.damping), white_truth),
                        "certificate": short(float(tracker.certificates(now.damping)[:, -1].max())),
                    }
                tracker = trackers[layer][options.tracked]
                certificates = tracker.certificates(now.damping)
                for tolerance in TOLERANCES:
                    used = min(int(required_rank(certificates, tolerance).max()), options.tracked)
                    error = relative(tracker.apply(gradient, now.damping, rank=used), truth)
                    record[f"tolerance {tolerance}"] = {"rank": used, "error": error}
                exact[layer] = now
            else:
                record["nine_steps_old"] = relative(exact[layer].apply(gradient), truth)
            records.append(record)
        rows.clear()
        optimizer.step()
        if measured or step == run.steps - 1:
            print(f"  step {step}: loss {loss.item():.3g}, {time.monotonic() - started:.0f} s", flush=True)
    capture.remove()
    return records


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def print_summary(run: Run, records: Sequence[dict[str, Any]], ranks: Sequence[int]) -> None:
    print(f"  {'step':>5} {'above':>7} " + "".join(f"{f'rank {r}: error, certificate':>32}" for r in ranks))
    for step in sorted({r["step"] for r in records if "ranks" in r}):
        now = [r for r in records if r["step"] == step]
        line = f"  {step:5d} {min(r['above'] for r in now):3d}-{max(r['above'] for r in now):3d} "
        for rank in ranks:
            error, certificate = ([r["ranks"][rank][key] for r in now] for key in ("error", "certificate"))
            line += f"    {statistics.median(error):.3f} .. {max(error):.3f}, {statistics.median(certificate):.2f} .. "
            line += f"{max(certificate):.2f}"
        print(line)
    # The first refreshes start from random subspaces.
    settled = [r for r in records if "ranks" in r and r["step"] >= EVERY]
    for tolerance in TOLERANCES:
        used, error = ([r[f"tolerance {tolerance}"][key] for r in settled] for key in ("rank", "error"))
        print(
            f"  tolerance {tolerance}: rank {quantile(used, 0.1)} .. {statistics.median(used):.0f} .. {max(used)}, "
            f"error {statistics.median(error):.3f} .. {max(error):.3f}"
        )
    old = [r["nine_steps_old"] for r in records if "nine_steps_old" in r]
    if old:
        print(f"  the exact inverse nine steps later: {quantile(old, 0.1):.2f} .. {quantile(old, 0.9):.2f}")


def plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    by_rank, honest, over_time = figure.subplots(1, 3)
    ranks = results["ranks"]
    for entry in results["runs"]:
        run = entry["run"]
        settled = [r for r in entry["records"] if "ranks" in r and r["step"] >= EVERY]
        if not settled:
            continue
        errors = [[r["ranks"][rank]["error"] for r in settled] for rank in ranks]
        name = f"{run['task']} {run['width']}, batch {run['batch_size']}"
        by_rank.plot(ranks, [statistics.median(e) for e in errors], "o-", ms=3, label=name)
    by_rank.set(xlabel="rank", ylabel="relative error of M, median of layers and steps", yscale="log")
    by_rank.legend(fontsize="x-small")
    for rank in ranks:
        pairs = [
            (r["ranks"][rank]["error"], r["ranks"][rank]["certificate"])
            for entry in results["runs"]
            for r in entry["records"]
            if "ranks" in r and r["step"] >= WARM_UP - 1
        ]
        honest.plot(*zip(*pairs, strict=True), ".", ms=4, alpha=0.6, label=f"rank {rank}")
    for tolerance in TOLERANCES:
        errors = [
            r[f"tolerance {tolerance}"]["error"]
            for entry in results["runs"]
            for r in entry["records"]
            if "ranks" in r and r["step"] >= WARM_UP - 1
        ]
        label = f"of {results['tracked']}, as many as needed" if tolerance == TOLERANCES[0] else None
        honest.plot(errors, [tolerance] * len(errors), "k+", ms=5, label=label)
    honest.plot([1e-3, 1], [1e-3, 1], "k-", lw=0.8)
    honest.set(xlabel="relative error of M", ylabel="certificate, or tolerance", xscale="log", yscale="log")
    honest.set(xlim=(1e-3, 1), ylim=(1e-3, 1))
    honest.legend(fontsize="x-small")
    longest = max(results["runs"], key=lambda entry: entry["run"]["steps"])
    measured = [r for r in longest["records"] if "ranks" in r]
    steps = sorted({r["step"] for r in measured})
    for rank in ranks:
        worst = [max(r["ranks"][rank]["error"] for r in measured if r["step"] == step) for step in steps]
        over_time.plot([step + 1 for step in steps], worst, "o-", ms=3, label=f"rank {rank}")
    old = [(r["step"] + 1, r["nine_steps_old"]) for r in longest["records"] if "nine_steps_old" in r]
    if old:
        over_time.plot(*zip(*old, strict=True), "kx", ms=4, label="exact, nine steps old")
    over_time.set(xlabel="step + 1", ylabel="relative error of M, worst layer", xscale="log", yscale="log")
    over_time.set_title(f"{longest['run']['task']}, width {longest['run']['width']}", fontsize="medium")
    over_time.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and rank.png")
    parser.add_argument("--dataset-id", default="mujoco/humanoid/expert-v0", help="Minari's id of the demonstrations")
    parser.add_argument("--pusht", help="PushT's archive; default: what `dopr demos pusht` registered")
    parser.add_argument("--ranks", type=lambda text: [int(r) for r in text.split(",")], default=[16, 32, 48, 64, 96])
    parser.add_argument("--tracked", type=int, default=64, help="the rank whose certificate chooses how many to use")
    parser.add_argument("--gamma", type=float, default=0.01, help="damping relative to the trace")
    parser.add_argument("--quick", action="store_true", help="two short runs, under a minute")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    if options.tracked not in options.ranks:
        parser.error(f"--tracked {options.tracked} is not among --ranks {options.ranks}")
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)

    results: dict[str, Any] = {
        "gamma": options.gamma,
        "ranks": options.ranks,
        "tracked": options.tracked,
        "versions": versions(),
        "runs": [],
    }
    plan = QUICK if options.quick else FULL
    for number, run in enumerate(plan, 1):
        print(f"{number}/{len(plan)} {run}", flush=True)
        records = measure(run, options)
        print_summary(run, records, options.ranks)
        results["runs"].append({"run": asdict(run), "records": records})
        (options.output / "results.json").write_text(json.dumps(results) + "\n")
    plot(results, options.output / "rank.png")
    print(f"wrote {options.output / 'results.json'} and {options.output / 'rank.png'}")


if __name__ == "__main__":
    main()
