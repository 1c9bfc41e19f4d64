"""What is read in the terminal: of a run, its evaluations and its end, with a bar or without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toy_project import Manual, PassesOver
from toy_task import CONFIG

from dopr_lightning.cli import main
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.project import Project

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

FIT = ["fit", "--config", CONFIG, "--trainer.callbacks+=dopr_lightning.DoPr", "--trainer.check_val_every_n_epoch=2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_says_what_it_does_how_far_it_is_and_how_good(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: no bar, no table of raw digits, no warning."""
    assert main(FIT) == 0
    out, err = capfd.readouterr()
    run = here / "lightning_logs" / "version_0"
    first = out.splitlines()[:4]
    assert first[0] == (
        "task:      DoprToy-v0, judged by return over at most 8 steps; 5 demonstrations (60 steps), 1 more held out, "
        "from toy"
    )
    assert re.fullmatch(r"policy:    FlowMatching, ResidualMLP of [\d,]+ parameters; observes 2, .* steps", first[1])
    assert first[2] == "optimizer: DoPr-adamw, learning rate 0.01, 20 steps of 12 windows on 1 x cpu"
    assert first[3] == f"results:   {run}"
    assert [line.partition(":")[0] for line in out.splitlines() if " of 20: training loss" in line] == [
        f"step {step} of 20" for step in range(2, 21, 2)
    ]
    judged = r"held-out loss \S+, return \S+ in {} rollouts \(seeds {}\), 95 % interval \S+ \.\. \S+"
    chosen = judged.format(2, "1000040 to 1000041")
    assert [step for step in (8, 16) if re.search(f"^step {step}: {chosen}$", out, re.M)] == [8, 16]
    assert re.search(f"^reported: {judged.format(3, '40 to 42')}$", out, re.M)
    assert f"checkpoint: {run / 'checkpoints' / 'last.ckpt'}   curves: tensorboard --logdir {run}" in out
    assert "━" not in out
    assert "arn" not in err
    assert len(err.splitlines()) <= 1, err  # that it has stopped


def test_of_other_loggers_than_tensorboards_it_names_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    csv = ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=.")
    assert main([*FIT, "--trainer.max_steps=4", *csv]) == 0
    out = capsys.readouterr().out
    assert f"   logged: {Path('lightning_logs', 'version_0')}" in out.replace("./", "")
    assert "tensorboard" not in out


def test_of_several_loggers_tensorboards_has_the_curves(capsys: pytest.CaptureFixture[str]) -> None:
    csv, curves = (
        f"{{class_path: lightning.pytorch.loggers.{name}Logger, init_args: {{save_dir: {name}}}}}"
        for name in ("CSV", "TensorBoard")
    )
    assert main([*FIT, "--trainer.max_steps=4", f"--trainer.logger=[{csv}, {curves}]"]) == 0
    assert f"curves: tensorboard --logdir {Path('TensorBoard', 'lightning_logs')}" in capsys.readouterr().out


def test_a_fast_dev_run_names_no_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes nothing."""
    assert main([*FIT, "--trainer.fast_dev_run=true"]) == 0
    out = capsys.readouterr().out
    assert "reported: " in out
    assert str(here) not in out
    assert not list(here.iterdir())


def test_a_run_that_time_ends_has_no_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    constant = "--model.optimizer.schedule=constant", "--model.optimizer.warmup_steps=0"
    assert main([*FIT, "--trainer.max_steps=-1", "--trainer.max_time=00:00:00:01", *constant]) == 0
    assert ", any number of steps of 12 windows on 1 x cpu" in capsys.readouterr().out


def test_a_bar_runs_over_all_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--trainer.enable_progress_bar=true"]) == 0
    out = capsys.readouterr().out
    assert "20/20" in out
    assert "Epoch" not in out
    assert "v_num" not in out
    assert "training loss" not in out
    assert "reported: " in out


def test_a_step_is_said_once_however_many_batches_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=3"]) == 0
    said = re.findall(r"^step (\d+) of 4: training loss", capsys.readouterr().out, re.M)
    assert said == ["1", "2", "3", "4"]


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.parametrize("policy", [PassesOver, Manual])
def test_a_batch_need_not_have_a_loss(policy: type[PolicyModule], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--trainer.max_steps=4"], Project(policy=policy)) == 0
    assert re.search(r"^step 1 of 4: about .* left$", capsys.readouterr().out, re.M)


def test_the_last_checkpoint_is_named_beside_another_savers(capsys: pytest.CaptureFixture[str]) -> None:
    other = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    assert main([*FIT, other, "--trainer.max_steps=4"]) == 0
    assert re.search(r"^checkpoint: .*last\.ckpt ", capsys.readouterr().out, re.M)


def test_going_on_in_the_middle_of_an_epoch_is_no_reason_to_warn(
    here: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, "--trainer.max_steps=6", "--checkpoint.dirpath=saved"]) == 0
    assert main([*FIT, "--trainer.max_steps=8", "--ckpt_path=saved/last.ckpt"]) == 0
    assert "step 7 of 8" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "resum" in str(warning.message)]
