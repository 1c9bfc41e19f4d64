"""Trials as Ray Tune's: on this machine, or on a cluster that sees the same files."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dopr_lightning.errors import UserError, import_extra
from dopr_lightning.experiments.display import Display
from dopr_lightning.experiments.runner import KILLED, Engine, attempt, cores
from dopr_lightning.experiments.trial import Outcome, Trial, load_outcome

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # configurations and data are named relative to where the command was given
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every trial has a TensorBoard of its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, as it does without Ray
}

REPORT_SECONDS = 2.0
"""Between two reports of a trial: each is a message to the command."""

UNITS = 10_000
"""Of which Ray has one CPU, or one GPU, consist: it knows no finer fractions."""


def ray_engine(address: str | None, cpus: float, gpus: float) -> Engine:
    """An engine that runs trials as Ray Tune's.

    Ray decides when and where a trial runs; what it does there, and what it leaves in its folder, is the same as
    without Ray, so either engine goes on with what the other began.

    Args:
        address: Of a running cluster, ``"auto"`` or ``"host:port"``; None starts one on this machine, which ends with
            the command.
        cpus: Reserved per trial.
        gpus: Reserved per trial; a fraction lets trials share one.

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.update(ENVIRONMENT)
    import_extra("ray.tune", "sweep")
    return functools.partial(_run, address, cpus, gpus)


def _run(
    address: str | None, cpus: float, gpus: float, trials: Sequence[Trial], display: Display
) -> dict[str, Outcome]:
    import ray
    from ray import tune

    by_index = list(trials)
    show = _callback(by_index, display)

    def train(config: dict[str, Any]) -> None:
        _train(by_index[config["index"]], where, cpus)

    where = (os.getcwd(), [entry for entry in sys.path if entry])
    loggers = [logging.getLogger(name) for name in ("ray", "ray.tune", "ray.tune.tune")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # a trial that fails is our business to report
    started = not ray.is_initialized()
    try:
        if started:
            _connect(address)
        display.left.parallel = _parallel(cpus, gpus)
        # What Tune writes down of its own state is not needed: the trials' folders are what resumes.
        with tempfile.TemporaryDirectory() as scratch:
            tune.Tuner(
                tune.with_resources(train, {"cpu": cpus, "gpu": gpus}),
                param_space={"index": tune.grid_search(list(range(len(by_index))))},
                tune_config=tune.TuneConfig(reuse_actors=True),  # importing takes longer than many a trial
                run_config=tune.RunConfig(name="dopr", storage_path=scratch, verbose=0, callbacks=[show]),
            ).fit()
    finally:
        if started:
            ray.shutdown()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return show.outcomes


def _callback(trials: Sequence[Trial], display: Display) -> Any:
    """Tune's events, told to the display; collects ``outcomes``."""
    from ray import tune

    class Show(tune.Callback):
        def __init__(self, trials: Sequence[Trial], display: Display) -> None:
            self.trials, self.display = trials, display
            self.outcomes: dict[str, Outcome] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves its callbacks, and a display cannot be

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self.display.progress(self._ours(trial).name, 0, 1)

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            name = self._ours(trial).name
            if "outcome" in result:
                self.outcomes[name] = result["outcome"]
            else:
                self.display.progress(name, result["step"], result["steps"])

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self._end(self._ours(trial))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            # Exceptions are outcomes, so this is a worker's end.
            self._end(self._ours(trial))

        def _end(self, trial: Trial) -> None:
            self.display.finished(trial.name, self.outcomes.setdefault(trial.name, load_outcome(trial) or KILLED))

        def _ours(self, trial: Any) -> Trial:
            return self.trials[trial.config["index"]]

    return Show(trials, display)


def _connect(address: str | None) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address is None:
        # "local": never a cluster that happens to run here, unless it is named.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": cores()}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise UserError(f"--ray-address {address}: no Ray there ({error}); start one with: ray start --head") from error


def _parallel(cpus: float, gpus: float) -> int:
    """How many trials run at once.

    Raises:
        UserError: None can: Ray would wait for a machine that never comes.
    """
    import ray

    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if fitting := how_many_fit(nodes, {"CPU": cpus, "GPU": gpus}):
        return fitting
    key = "GPU" if gpus else "CPU"
    largest = max(nodes, key=lambda node: (node.get(key, 0), node.get("CPU", 0)), default={})
    raise UserError(
        f"--cpus-per-trial {cpus:g} --gpus-per-trial {gpus:g}: none of Ray's machines has as much, and a run has one "
        f"machine; the largest has {largest.get('CPU', 0):g} CPUs and {largest.get('GPU', 0):g} GPUs; ask for less"
    )


def how_many_fit(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many trials find room at once, each on one machine.

    Args:
        nodes: What each machine has, by kind.
        need: What a trial reserves, by kind; something of at least one.
    """
    # As Ray counts, in whole units: ten tenths are one.
    units = {kind: max(1, round(amount * UNITS)) for kind, amount in need.items() if amount}
    return sum(min(round(node.get(kind, 0) * UNITS) // unit for kind, unit in units.items()) for node in nodes)


def _train(trial: Trial, where: tuple[str, list[str]], cpus: float) -> None:
    """In a worker of Ray's."""
    import torch
    from ray import tune

    folder, paths = where
    os.chdir(folder)
    sys.path.extend(path for path in paths if path not in sys.path)
    torch.set_num_threads(max(1, int(cpus)))
    last = time.monotonic()

    def report(name: str, step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            tune.report({"step": step, "steps": steps})

    tune.report({"outcome": attempt(trial, report)})
