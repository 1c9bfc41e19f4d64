"""A job that SLURM takes off its machine goes on where it was: real processes, a faked scheduler."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from test_training import assert_same
from toy_task import CONFIG, DOPR

from dopr_lightning.preemption import Preemption

PATIENCE = 120
# A step takes long enough to be interrupted in.
CODE = """
import sys, time
from toy_task import ToyTask
from dopr_lightning.policies.module import PolicyModule
step = PolicyModule.training_step
def slowly(self, batch, batch_idx):
    print("step", self.trainer.global_step, flush=True)
    time.sleep(0.05)
    return step(self, batch, batch_idx)
PolicyModule.training_step = slowly
from dopr_lightning.cli import main
sys.exit(main(sys.argv[1:]))
"""
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "toy",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def job(folder: Path, scheduler: Path) -> subprocess.Popen[str]:
    """What ``srun`` starts."""
    paths = [str(Path(CONFIG).parent), str(Path(__file__).parent), *sys.path]
    environment = (
        os.environ
        | SLURM
        | {
            "PATH": f"{scheduler}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "DOPR_TRACEBACK": "1",
        }
    )
    options = [
        f"--config={CONFIG}",
        "--config=trainer/slurm.yaml",
        *DOPR,
        f"--trainer.default_root_dir={folder}",
        f"--checkpoint.dirpath={folder}/checkpoints",
        "--trainer.enable_model_summary=false",
        "--rollout.report_episodes=1",
    ]
    command = [sys.executable, "-c", CODE, "fit", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    said = []
    for text in process.stdout:
        said.append(text)
        if text.strip() == line:
            return
    pytest.fail("".join(said))


def reported(folder: Path) -> list[str]:
    (file,) = folder.rglob("rollouts.jsonl")
    return [line for line in file.read_text().splitlines() if '"stage": "test"' in line]


@pytest.fixture
def scheduler(tmp_path: Path) -> Path:
    """A ``scontrol`` that notes what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    return folder


def test_it_leaves_between_steps_not_between_micro_batches() -> None:
    left: list[int] = []
    preemption, trainer, module = Preemption(), L.Trainer(accumulate_grad_batches=3, logger=False), L.LightningModule()
    preemption._signal = signal.SIGUSR1
    for batch in range(7):
        if batch == 1:
            preemption._note(signal.SIGUSR1, None)
        preemption._leave = lambda *_, batch=batch: left.append(batch)
        preemption.on_train_batch_start(trainer, module, None, batch)
    assert left == [3]


def test_a_preempted_run_ends_as_the_uninterrupted_one(tmp_path: Path, scheduler: Path) -> None:
    whole = job(tmp_path / "whole", scheduler)
    part = job(tmp_path / "part", scheduler)
    until(part, "step 6")  # in the middle of the second epoch
    earlier, held = (tmp_path / "part" / f"hpc_ckpt_{number}.ckpt" for number in (9, 10))
    earlier.touch()
    part.send_signal(signal.SIGUSR1)
    until_left = time.monotonic() + PATIENCE
    while earlier.exists() and time.monotonic() < until_left:
        time.sleep(0.05)
    assert (scheduler / "asked").read_text() == "requeue 4711\n"
    assert list((tmp_path / "part").glob("hpc_*")) == [held]
    part.kill()  # as SLURM does with a job that it requeues
    part.wait()
    step = torch.load(held, weights_only=True)["global_step"]
    assert 6 <= step < 20

    again = job(tmp_path / "part", scheduler)
    until(again, f"step {step}")  # not from the beginning
    for process in (again, whole):
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, out
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "part")
    )
    assert one["global_step"] == 20
    assert_same(one, other)
    assert [path.name for path in (tmp_path / "part").glob("hpc_*")] == ["hpc_ckpt_11.ckpt"]
    # The report, too, is of the weights at the end.
    assert reported(tmp_path / "whole") == reported(tmp_path / "part")
