"""Runs as ``dopr fit`` makes them: reproducible, resumed bit for bit, alike on two processes; and the shipped files."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toy_environment import Toy
from toy_task import CONFIG, DOPR, FIRST_SEED, STEPS, train

from dopr_lightning import configs
from dopr_lightning.cli import main
from dopr_lightning.configuration import find_config
from dopr_lightning.errors import UserError
from dopr_lightning.policies.ema import EMA
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.rollout import callback as rollout_callback
from dopr_lightning.rollout.callback import SELECTION_OFFSET
from dopr_lightning.saving import LastCheckpoint
from dopr_lightning.training import resolve

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

REGRESSION = ("--model.algorithm=dopr_lightning.policies.algorithms.Regression", "--model.optimizer.base=muon")


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in pairs for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: value}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Trained weights, their average, and all that the next step depends on."""
    for checkpoint in (one, other):  # where the files lie, not what was learnt
        checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "LastCheckpoint" not in k}
    parts = ("epoch", "global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states")
    for part in (*parts, "lr_schedulers", "callbacks"):
        a, b = flat(one[part], part), flat(other[part], part)
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


class KilledError(Exception):
    pass


class Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


EPOCHS = ("--trainer.max_epochs=5", "--trainer.max_steps=1000")
AFTER_VALIDATION = "--checkpoint.save_on_train_epoch_end=false"


@pytest.mark.parametrize(
    "options",
    [DOPR, (*DOPR, AFTER_VALIDATION), (*DOPR, *EPOCHS), (*DOPR, *EPOCHS, AFTER_VALIDATION), REGRESSION],
    ids=["steps", "steps, saved in validation", "epochs", "epochs, saved in validation", "regression with muon"],
)
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Stopped in the third epoch and again in the fourth; covariances are refreshed at steps 0, 3, 6, 9..."""
    train(tmp_path / "whole", *options)
    whole = saved(tmp_path / "whole")
    assert whole["global_step"] == 5 * STEPS

    part, resume = tmp_path / "part", None
    for finished in (2, 3):
        with pytest.raises(KilledError):
            train(part, *options, callbacks=[Kill(finished * STEPS + 1)], resume=resume)
        resume = part / "last.ckpt"
        halfway = saved(part)
        assert halfway["global_step"] == finished * STEPS
    train(part, *options, resume=resume)
    end = saved(part)
    assert_same(whole, end)
    assert end["loops"]["fit_loop"]["epoch_progress"] == whole["loops"]["fit_loop"]["epoch_progress"]

    # None of this is equal by standing still, or by an average that is no average.
    for name, value in whole["current_model_state"].items():
        if name.startswith("network."):
            assert not torch.equal(value, halfway["current_model_state"][name]), name
            assert not torch.equal(value, whole["state_dict"][name]), name
    assert ("DoPr" in whole["callbacks"]) == (DOPR[0] in options)
    assert whole["lr_schedulers"][0]["_last_lr"][0] < 1e-2


@pytest.mark.parametrize("options", [(), (AFTER_VALIDATION,), EPOCHS], ids=["steps", "saved in validation", "epochs"])
@pytest.mark.parametrize("simulator", [True, False], ids=["simulator", "policy"])
def test_rollouts_that_fail_lose_no_training(
    simulator: bool, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations are every second epoch, so that the third epoch's and fourth's training is not in a checkpoint."""
    options = (*DOPR, *options, "--trainer.check_val_every_n_epoch=2")
    train(tmp_path / "whole", *options)

    fails, owner, method = 4 * STEPS, *((Toy, "step") if simulator else (PolicyModule, "predict"))
    works = getattr(owner, method)

    def broken(self: Any, *arguments: Any) -> Any:
        if cli_trainer.global_step == fails:
            raise RuntimeError("no display")
        return works(self, *arguments)

    class Watch(Callback):
        def on_fit_start(self, trainer: Any, *_: Any) -> None:
            nonlocal cli_trainer
            cli_trainer = trainer

    cli_trainer: Any = None
    monkeypatch.setattr(owner, method, broken)
    with pytest.raises(UserError if simulator else RuntimeError, match="no display") as caught:
        train(tmp_path / "part", *options, callbacks=[Watch()])
    monkeypatch.undo()
    said = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    last = tmp_path / "part" / "last.ckpt"
    assert f"the training until step {fails} is saved; go on with it by --ckpt_path {last}" in said
    assert saved(tmp_path / "part")["global_step"] == fails

    train(tmp_path / "part", *options, resume=last)
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "part"))


def test_a_policy_that_diverged_replaces_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rollouts fail for actions that are not finite; what was saved before may be gone on from."""

    class Diverge(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 3 * STEPS - 1:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.fill_(math.nan)

    with pytest.raises(UserError, match="not finite") as caught:
        train(tmp_path / "one", AFTER_VALIDATION, callbacks=[Diverge()])
    assert "is saved" not in str(caught.value)
    assert saved(tmp_path / "one")["global_step"] == 2 * STEPS

    def refuses(self: Any, *arguments: Any) -> Any:
        if any(parameter.isnan().any() for parameter in self.parameters()):
            raise ValueError("expected parameter loc to be finite")
        return predict(self, *arguments)

    predict = PolicyModule.predict
    monkeypatch.setattr(PolicyModule, "predict", refuses)
    with pytest.raises(ValueError, match="parameter loc") as refused:
        train(tmp_path / "other", AFTER_VALIDATION, callbacks=[Diverge()])
    assert not hasattr(refused.value, "__notes__")
    assert saved(tmp_path / "other")["global_step"] == 2 * STEPS


def test_a_checkpoint_that_cannot_be_written_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, trainer: Any) -> str:
        raise OSError("no space left")

    def broken(self: Any, *arguments: Any) -> Any:
        raise RuntimeError("no display")

    monkeypatch.setattr(LastCheckpoint, "keep", full)
    monkeypatch.setattr(Toy, "step", broken)
    with pytest.raises(UserError, match="no display") as caught:
        train(tmp_path)
    assert caught.value.__notes__ == ["the training could not be saved either: no space left"]


def test_success_that_is_never_said_loses_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise UserError("reports no 'is_success'")

    monkeypatch.setattr(rollout_callback, "check_success", never)
    with pytest.raises(UserError, match=f"reports no 'is_success'; the training until step {STEPS} is saved"):
        train(tmp_path)
    assert saved(tmp_path)["global_step"] == STEPS


CONSTANT = ("--model.optimizer.schedule=constant", "--trainer.check_val_every_n_epoch=30", *DOPR)


@pytest.mark.parametrize("end", [18, 20], ids=["in the middle of an epoch", "between epochs"])
def test_the_last_checkpoint_is_what_a_run_ends_with_and_a_longer_one_goes_on_from(tmp_path: Path, end: int) -> None:
    """Also where the last validation was before, and where there was none: what is reported is what can be loaded."""
    ended = train(tmp_path / "part", *CONSTANT, f"--trainer.max_steps={end}", "--trainer.check_val_every_n_epoch=3")
    last = saved(tmp_path / "part")
    assert last["global_step"] == end
    judged = ended.model.state_dict()
    assert all(torch.equal(value, judged[name]) for name, value in last["state_dict"].items())

    train(tmp_path / "whole", *CONSTANT, "--trainer.max_steps=24")
    train(tmp_path / "none", *CONSTANT, f"--trainer.max_steps={end}")
    train(tmp_path / "more", *CONSTANT, "--trainer.max_steps=24", resume=tmp_path / "none" / "last.ckpt")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "more"))


@pytest.mark.parametrize("end", [CONSTANT, DOPR, (*DOPR, *EPOCHS)], ids=["constant", "steps", "epochs"])
@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, workers: int, end: tuple[str, ...]) -> None:
    """Where workers would draw in advance, from another epoch's order, and where epochs give a schedule its length."""
    options = (*end, f"--data.num_workers={workers}", "--checkpoint.every_n_train_steps=7")
    train(tmp_path / "whole", *options, "--checkpoint.save_top_k=-1")
    train(tmp_path / "resumed", *options, resume=tmp_path / "whole" / "step=7.ckpt")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "resumed"))


@pytest.mark.parametrize("epochs", [(), EPOCHS], ids=["steps", "epochs"])
@pytest.mark.parametrize("workers", [0, 1])
def test_resume_at_the_last_batch_of_an_epoch(tmp_path: Path, workers: int, epochs: tuple[str, ...]) -> None:
    """Where workers would draw the epoch's order again."""
    every = f"--checkpoint.every_n_train_steps={2 * STEPS}"
    options = (*CONSTANT, *epochs, f"--data.num_workers={workers}", every)
    train(tmp_path / "whole", *options, "--checkpoint.save_top_k=-1")
    train(tmp_path / "resumed", *options, resume=tmp_path / "whole" / f"step={2 * STEPS}.ckpt")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "resumed"))


def test_resume_between_epochs_of_some_batches(tmp_path: Path) -> None:
    options = (*CONSTANT, "--trainer.limit_train_batches=3", "--checkpoint.every_n_train_steps=6")
    train(tmp_path / "whole", *options, "--checkpoint.save_top_k=-1")
    train(tmp_path / "resumed", *options, resume=tmp_path / "whole" / "step=6.ckpt")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "resumed"))


def test_a_last_checkpoint_that_is_a_link_is_of_the_end_too(tmp_path: Path) -> None:
    train(tmp_path, "--checkpoint.save_last=link", "--trainer.max_steps=6", "--checkpoint.every_n_train_steps=4")
    assert saved(tmp_path)["global_step"] == 6
    assert torch.load(tmp_path / "step=4.ckpt", weights_only=True)["global_step"] == 4


def test_another_runs_last_checkpoint_is_not_left_beside(tmp_path: Path) -> None:
    train(tmp_path, "--trainer.max_steps=4")
    before = saved(tmp_path)
    with pytest.raises(UserError, match=r"last\.ckpt is of another run; go on with it by --ckpt_path .*last\.ckpt, or"):
        train(tmp_path, "--trainer.max_steps=8")
    assert_same(before, saved(tmp_path))


def test_a_remote_store_takes_checkpoints_but_no_results(tmp_path: Path) -> None:
    remote = f"memory:/{tmp_path}"
    with pytest.raises(UserError, match=f"{remote}: .*written to local files; choose a local"):
        train(tmp_path / "local", f"--trainer.default_root_dir={remote}")
    assert not list(tmp_path.rglob("*.*"))
    logs = f"--trainer.default_root_dir={remote}", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"
    assert main(["fit", f"--config={CONFIG}", *logs, "--trainer.fast_dev_run=true"]) == 0
    train(tmp_path / "local", f"--checkpoint.dirpath={remote}", "--trainer.max_steps=4")
    with pytest.raises(UserError, match=f"{remote}/last.ckpt is of another run"):
        train(tmp_path / "other", f"--checkpoint.dirpath={remote}", "--trainer.max_steps=4")
    memory = fsspec.filesystem("memory")
    with memory.open(f"{tmp_path}/last.ckpt") as file:
        assert torch.load(file, weights_only=True)["global_step"] == 4
    resume = [f"--ckpt_path={remote}/last.ckpt", f"--trainer.default_root_dir={tmp_path / 'resumed'}"]
    assert main(["fit", f"--config={CONFIG}", *resume, f"--checkpoint.dirpath={remote}", "--trainer.max_steps=6"]) == 0
    with memory.open(f"{tmp_path}/last.ckpt") as file:
        assert torch.load(file, weights_only=True)["global_step"] == 6
    memory.rm(str(tmp_path), recursive=True)


def test_the_seed_decides(tmp_path: Path) -> None:
    runs = {}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / folder, *DOPR, f"--seed_everything={seed}")
        runs[folder] = saved(tmp_path / folder)
    assert_same(runs["a"], runs["b"])
    for name, value in runs["a"]["state_dict"].items():
        if name.endswith("weight") and "norm" not in name:
            assert not torch.equal(value, runs["c"]["state_dict"][name]), name
    assert [runs[folder]["hyper_parameters"]["seed"] for folder in "abc"] == [0, 0, 1]


class Note(Callback):
    """What each process ends with, and which episodes it has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        Toy.resets.clear()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))
        held = {
            "average": pl_module.state_dict(),  # where EMA leaves it
            "trained": ema._average_model.module.state_dict(),  # type: ignore[union-attr]
            "optimizer": trainer.optimizers[0].state_dict(),
        }
        torch.save(held, self.folder / f"{trainer.global_rank}.pt")
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(Toy.resets))


def test_two_processes_stay_alike(tmp_path: Path) -> None:
    parallel = ("--trainer.strategy=ddp_fork", "--trainer.devices=2", "--trainer.max_steps=6")
    train(tmp_path, *DOPR, *parallel, "--rollout.episodes=3", callbacks=[Note(tmp_path)])
    first, second = (flat(torch.load(tmp_path / f"{rank}.pt", weights_only=True)) for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name
    assert not torch.equal(first["/trained/network.input.weight"], first["/average/network.input.weight"])

    resets = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    seeds = [FIRST_SEED + SELECTION_OFFSET + i for i in range(3)]
    validations = 3  # 2 steps an epoch
    assert sorted(resets[0]) == sorted(seeds[::2] * validations)
    assert sorted(resets[1]) == sorted(seeds[1::2] * validations)


FILES = configs.available()


def command(name: str) -> list[str]:
    """The arguments of ``dopr fit`` in the file's first line."""
    line = (configs.DIRECTORY / name).read_text().splitlines()[0]
    assert line.startswith("# ")
    # After the environment's variables, and what prepares the data.
    found = re.fullmatch(r"# (?:[A-Z_]+=\S+ )*(?:dopr demos .*? && )?dopr fit (.*)", line)
    assert found, f"{name} begins with {line!r}"
    return shlex.split(found[1])


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_configuration_runs_as_it_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(name)
    assert name in arguments
    config = resolve(arguments)
    assert config["trainer"]["max_steps"] > 0
    if "dopr.yaml" in arguments:
        assert [c["class_path"] for c in config["trainer"]["callbacks"]] == ["dopr_lightning.DoPr"]
    if "muon.yaml" in arguments:
        assert config["model"]["optimizer"]["base"] == "muon"


def stack_of(name: str) -> list[str]:
    """The configurations in the file's first line, without those that choose the optimizer."""
    files = [word for word in command(name) if word.endswith(".yaml")]
    return [file for file in files if file not in ("muon.yaml", "dopr.yaml")]


TRAINERS = [name for name in FILES if name.startswith("trainer/")]
TASKS = sorted({tuple(stack) for name in FILES if name not in TRAINERS and name in (stack := stack_of(name))})


@pytest.mark.parametrize("stack", TASKS, ids="+".join)
def test_every_task_stacks(stack: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    alone = resolve([f"--config={name}" for name in stack])
    assert alone["model"]["optimizer"]["base"] == "adamw"
    assert "callbacks" not in alone["trainer"]
    stacked = resolve([word for name in [*stack, "muon.yaml", "dopr.yaml"] for word in ("--config", name)])
    assert stacked["model"]["optimizer"] == alone["model"]["optimizer"] | {"base": "muon"}
    assert [c["class_path"] for c in stacked["trainer"]["callbacks"]] == ["dopr_lightning.DoPr"]
    assert stacked["data"] == alone["data"]
    # One window for data and policy, one seed for all.
    for key in ("observe", "horizon", "act", "seed"):
        assert alone["model"][key] == alone["data"][key]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_stacks_on_every_task(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task in TASKS[:: 1 if trainer == "trainer/fsdp2.yaml" else 4]:  # each parses in a fraction of a second
        alone = resolve([f"--config={name}" for name in task])
        stacked = resolve([f"--config={name}" for name in (*task, "dopr.yaml", trainer)])
        assert stacked["model"] == alone["model"]
        assert stacked["data"]["source"] == alone["data"]["source"]
        assert stacked["trainer"]["max_steps"] == alone["trainer"]["max_steps"]
        assert stacked["trainer"] != alone["trainer"] | {"callbacks": stacked["trainer"]["callbacks"]}


def test_the_example_for_slurm_runs_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``srun`` line of the file's job script, without the scheduler."""
    monkeypatch.chdir(tmp_path)
    text = (configs.DIRECTORY / "trainer" / "slurm.yaml").read_text()
    script = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    (line,) = re.findall(r"^srun dopr fit ((?:.*\\\n)*.*)$", script, re.MULTILINE)
    config = resolve(shlex.split(line.replace("\\\n", " ")))
    assert (config["trainer"]["num_nodes"], config["trainer"]["devices"]) in ((2, 4), (2, "4"))
    assert "--ntasks-per-node=4" in text
    assert "--nodes=2" in text
    (plugin,) = config["trainer"]["plugins"]
    assert plugin["init_args"]["auto_requeue"] is True


def test_a_file_here_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("muon.yaml") == str(configs.DIRECTORY / "muon.yaml")
    Path("muon.yaml").write_text("seed_everything: 7\n")
    for form in (["--config", "muon.yaml"], ["--config=muon.yaml"], ["-c", "muon.yaml"]):
        assert resolve(["--config", CONFIG, *form])["seed_everything"] == 7
    with pytest.raises(UserError, match=r"'mion.yaml'.* did you mean muon.yaml\?"):
        resolve(["--config", "mion.yaml"])
