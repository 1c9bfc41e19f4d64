"""The command line: mistakes are one line that names the thing, before anything is trained or written."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from shared_data import shared_data
from toy_task import CONFIG, train

from dopr_lightning import __version__
from dopr_lightning.cli import VERBS, main
from dopr_lightning.optim import BASES
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.project import Project

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

FIT = ["fit", "--config", CONFIG]
COMPARE = ["compare", "--config", CONFIG, "--output", "out", "--optimizers", "adamw"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where runs would write."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DOPR_TRACEBACK", raising=False)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which the command is refused; nothing has been trained, and what lay there lies there still."""
    before = contents(Path.cwd().parent)
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dopr: ")
    assert err.count("\n") == 1, err
    assert len(err) < 400, err
    after = contents(Path.cwd().parent)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before.keys() if name.endswith((".ckpt", ".json", ".npz"))]
    return err


ACT = "--trainer.callbacks+=dopr_lightning.DoPr"

MISTAKES: list[tuple[list[str], list[str]]] = [
    (["fut"], ["unknown verb 'fut'", *VERBS]),
    (["demo", "lift"], ["unknown verb 'demo'; did you mean demos?"]),
    (["fit"], ["fit.data.source; name a configuration, as in --config walker2d.yaml"]),
    (["test"], ["what is to be judged? Give --ckpt FILE, or --ckpt_path FILE beside its configuration"]),
    (["validate", "--trainer.max_steps=3"], ["what is to be judged? Give --ckpt FILE", "see: dopr validate --help"]),
    (["fit", "walker2d.yaml"], ["unrecognized arguments: walker2d.yaml; did you mean --config walker2d.yaml? see"]),
    (["fit", "--config", "walker2d"], ["no configuration file 'walker2d' here, nor", "did you mean walker2d.yaml?"]),
    ([*FIT, "--model.netwrok.width", "64"], ["arguments: --model.netwrok.width 64; did you mean model.network? see"]),
    ([*COMPARE, "--optimizers", "adamw,dopr-adamw+update_evry=10"], ["'dopr-adamw+update_evry=10'", "update_every?"]),
    # Unknown keys, on the command line and in a file; abbreviations are not guessed at.
    ([*FIT, "--model.network.widht", "3"], ["model.network", "'widht'", "dopr fit --help"]),
    ([*FIT, "--modle.seed=3"], ["--modle.seed", "dopr fit --help"]),
    ([*FIT, "--trainer.max_step=3"], ["--trainer.max_step=3; did you mean trainer.max_steps? see: dopr fit --help"]),
    ([*COMPARE, "--trainer.max_step=3"], ["did you mean trainer.max_steps?"]),
    ([*FIT, "--config", "misspelt.yaml"], ["misspelt.yaml: ", "'model.networkk'; did you mean model.network?"]),
    ([*FIT, "--config", "class.yaml"], ["class.yaml: data.source has 'init_arg' beside", "did you mean init_args?"]),
    ([*FIT, "--model.network", "toy_task.ToyTusk"], ["model.network: module 'toy_task'", "did you mean ToyTask?"]),
    ([*FIT, "--model.network", "ResidualMPL"], ["ResidualMPL; give the whole path, as in dopr_lightning.policies"]),
    ([*COMPARE, "--model.network.widht", "3"], ["model.network", "'widht'"]),
    ([*COMPARE, "--seed", "1"], ["--seed; did you mean --seeds? see: dopr compare --help"]),
    # Files that are not there, or broken.
    (["fit", "--config", "nothere.yaml"], ["'nothere.yaml'", "dopr --help"]),
    (["fit", "--config=nothere.yaml"], ["'nothere.yaml'", "dopr --help"]),
    (["compare", "--config", "nothere.yaml", "--output", "out"], ["'nothere.yaml'", "dopr --help"]),
    ([*FIT, "--config", "broken.yaml"], ["broken.yaml: not YAML", "line 2"]),
    ([*COMPARE, "--config", "words.yaml"], ["words.yaml: holds no settings"]),
    ([*FIT, "--config", "twice.yaml"], ["twice.yaml: max_steps is there twice, again in line 4; join the two"]),
    (["demos", "pusht", "--path", "folder"], ["folder: a folder, not a file"]),
    (["demos", "replay", "folder"], ["folder: a folder, not a file"]),
    (["demos", "lift", "--scripted", "1", "--output", "folder"], ["folder is a folder; name a file in it"]),
    (["validate", "--config", CONFIG], ["Give --ckpt FILE, or --ckpt_path FILE"]),
    (["test", "--ckpt"], ["argument --ckpt: expected one argument; see: dopr test --help"]),
    (["test", "--config", CONFIG, "--ckpt_path", "folder"], ["--ckpt_path folder: a folder, not a file"]),
    (["test", "--ckpt", "s3://b/last.ckpt"], ["s3://b/last.ckpt: on a remote store; copy it to a local file first"]),
    # Found before the work that could not be written down.
    ([*FIT, "--trainer.default_root_dir", "broken.yaml"], ["broken.yaml is a file, and a folder is needed"]),
    ([*FIT, "--checkpoint.dirpath", "broken.yaml"], ["broken.yaml is a file, and a folder is needed"]),
    (["sweep", "--config", CONFIG, "--widths", "8,16", "--output", "broken.yaml"], ["a folder is needed"]),
    (
        ["sweep", "--config", CONFIG, "--config", "dopr.yaml", "--optimizer", "adamw", "--widths=8", "--output=out"],
        ["the configuration brings DoPr; leave it out there, --optimizer says"],
    ),
    (["coord-check", "--config", CONFIG, "--output", "broken.yaml/out"], ["broken.yaml/out", "a folder is needed"]),
    (["bench", "--quick", "--output", "broken.yaml"], ["a folder is needed"]),
    # What is remote would become a local folder of an odd name.
    (["bench", "--quick", "--output", "s3://b/out"], ["s3://b/out: results are written to local files; choose a"]),
    (["demos", "lift", "--scripted", "1", "--output", "s3://b/x.hdf5"], ["s3://b/x.hdf5: a local file is written"]),
    (["demos", "lift", "--scripted", "1", "--output", "broken.yaml/x.hdf5"], ["a folder is needed"]),
    (
        [*COMPARE, "--model.optimizer.warmup_steps=20"],
        ["beyond its 20 warm-up steps, got 20; set Trainer(max_steps=...)"],
    ),
    (["test", "--config", CONFIG, "--ckpt_path", "nothere.ckpt"], ["nothere.ckpt", "no such file"]),
    (["test", "--config", CONFIG, "--ckpt_path", "broken.yaml"], ["broken.yaml", "not a checkpoint"]),
    (["test", "--config", CONFIG, "--ckpt_path", "cut.ckpt"], ["cut.ckpt", "damaged"]),
    # Optimizers.
    ([*FIT, "--model.optimizer.base", "adm"], ["unknown base optimizer 'adm'", "adamw, muon, sgd"]),
    ([*FIT, "--model.optimizer.lr=0"], ["lr must be positive"]),
    ([*COMPARE, "--optimizers", "adamw,dopr-adm"], ["unknown optimizer 'dopr-adm'", "adamw, muon, sgd"]),
    ([*COMPARE, "--optimizers", "adamw,"], ["unknown optimizer ''"]),
    ([*COMPARE, "--optimizers", "muon,adamw,muon"], ["muon,adamw,muon", "twice"]),
    ([*FIT, ACT, "--trainer.callbacks.damping=0"], ["damping must be positive, got 0"]),
    ([*FIT, ACT, "--trainer.callbacks.damping=-1"], ["damping must be positive, got -1"]),
    ([*FIT, "--trainer.callbacks+=dopr_lightning.DoPe"], ["trainer.callbacks", "DoPe"]),
    ([*COMPARE, "--optimizers", "dopr-adamw", "--damping", "0"], ["--damping", "0.0"]),
    ([*COMPARE, "--damping", "-1"], ["--damping", "-1"]),
    ([*COMPARE, "--damping", "nan"], ["--damping", "nan"]),
    # Numbers.
    ([*FIT, "--trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    ([*FIT, "--ema.decay=2"], ["decay must be at least 0 and below 1, got 2"]),
    ([*FIT, "--data.horizon=1"], ["horizon=1"]),
    ([*FIT, "--data.batch_size=1000", "--trainer.enable_model_summary=false"], ["batch_size=1000", "55"]),
    ([*COMPARE, "--data.batch_size=1000"], ["batch_size=1000", "55"]),
    ([*FIT, "--rollout.episodes=-1"], ["episodes=-1"]),
    ([*COMPARE, "--data.source.observation_dim=3"], ["observations of shape (3,)", "but DoprToy-v0 has (2,) and (1,)"]),
    ([*COMPARE, "--seeds", "0,1,0"], ["--seeds 0,1,0", "twice"]),
    ([*COMPARE, "--seeds", "a"], ["--seeds a"]),
    ([*COMPARE, "--seeds", ""], ["--seeds"]),
    ([*COMPARE, "--seeds=-1"], ["--seeds -1"]),
    ([*COMPARE, "--episodes", "few"], ["--episodes", "'few'"]),
    ([*COMPARE, "--episodes", "0"], ["--episodes", "0"]),
    ([*COMPARE, "--workers", "0"], ["--workers", "0"]),
    ([*COMPARE, "--learning-rates", "1e-3,fast"], ["--learning-rates 1e-3,fast"]),
    ([*COMPARE, "--learning-rates", "0,1e-3"], ["--learning-rates 0,1e-3", "positive"]),
    ([*COMPARE, "--learning-rates", "1e-3,1e-3"], ["--learning-rates", "twice"]),
    # What a comparison sets itself is not overridden behind its back.
    ([*COMPARE, "--seed_everything=4"], ["--seed_everything", "--seeds"]),
    ([*COMPARE, "--model.optimizer.base", "sgd"], ["--model.optimizer.base", "--optimizers"]),
    ([*COMPARE, "--config", "dopr.yaml"], ["the configuration brings DoPr; leave it out there, --optimizers says"]),
    (["compare", "--config", CONFIG], ["--output", "dopr compare --help"]),
    ([*COMPARE, "--output", "broken.yaml/out"], ["broken.yaml/out"]),
    # Demonstrations.
    (["demos", "pusht", "--path", "nothere.zip"], ["nothere.zip", "no such file"]),
    (["demos", "pusht", "--path", "cut.zip"], ["cut.zip", "not PushT's demonstrations"]),
    (["fit", "--config", "pusht.yaml"], ["PushT", "not registered", "dopr demos pusht"]),
    (["compare", "--config", "pusht.yaml", "--output", "out"], ["PushT", "not registered", "dopr demos pusht"]),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(m[0]).replace(CONFIG, "toy") for m in MISTAKES])
def test_a_mistake_is_one_line(
    arguments: list[str], said: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "misspelt.yaml").write_text("model:\n  networkk: 3\n")
    (here / "broken.yaml").write_text("model: [\n")
    (here / "class.yaml").write_text("data:\n  source:\n    class_path: toy_task.ToyTask\n    init_arg: {}\n")
    (here / "words.yaml").write_text("width 3\n")
    (here / "twice.yaml").write_text("trainer:\n  max_steps: 3\n  devices: 1\n  max_steps: 5\n")
    (here / "folder").mkdir()
    torch.save(torch.zeros(1000), here / "whole.ckpt")
    (here / "cut.ckpt").write_bytes((here / "whole.ckpt").read_bytes()[:2000])
    if "cut.zip" in arguments:
        with shared_data("pusht/pusht_cchi_v7_replay.zarr.zip").open("rb") as archive:
            (here / "cut.zip").write_bytes(archive.read(1_000_000))
    line = refusal(arguments, capsys)
    for words in said:
        assert words in line


def register_pusht(home: Path) -> None:
    home.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {"observations": rng.uniform(0, 512, (400, 5)), "actions": rng.uniform(0, 512, (400, 2))}
    np.savez(home / "pusht.npz", **arrays, episode_ends=np.arange(40, 401, 40), sha256=np.array("abc"))


@pytest.mark.parametrize("verb", [["fit"], ["compare", "--output", "out"]], ids=["fit", "compare"])
def test_an_environment_that_is_not_installed(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before training, not at the first rollout."""
    register_pusht(tmp_path / "home" / "pusht")
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    stack = ["--config", "pusht.yaml", "--config", "pusht-mlp.yaml"]
    line = refusal([*verb, *stack], capsys)
    assert "gym_pusht is not installed; run: pip install 'dopr-lightning[pusht]'" in line


def test_a_damaged_file_leaves_what_was_registered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_pusht(tmp_path / "home" / "pusht")
    (Path.cwd() / "page.zip").write_text("<html>quota exceeded</html>")
    assert "page.zip" in refusal(["demos", "pusht", "--path", "page.zip"], capsys)  # compares the home, too


def test_data_that_do_not_fit_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--trainer.max_steps=4")
    checkpoint = str(tmp_path / "run" / "last.ckpt")
    capsys.readouterr()
    for verb in ("fit", "validate", "test"):
        arguments = [verb, "--config", CONFIG, "--ckpt_path", checkpoint, "--data.source.observation_dim=3"]
        line = refusal([*arguments, "--trainer.enable_progress_bar=false"], capsys)
        assert line.startswith("dopr: error: the checkpoint is not of this policy: network.input.weight has shape")


def test_validate_and_test_need_the_checkpoint_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network's sizes are those in the checkpoint; seeds differ, since some choose and some report."""
    train(tmp_path / "run", "--trainer.max_steps=4", "--model.network.width=24")
    rest = ["--config", CONFIG, "--ckpt_path", str(tmp_path / "run" / "last.ckpt")]
    found = {}
    for verb in ("validate", "test"):
        capsys.readouterr()
        assert main([verb, *rest]) == 0
        found[verb] = capsys.readouterr().out
    assert "val/loss" in found["validate"]
    assert "test/loss" in found["test"]
    assert "rollout/return" in found["test"]
    assert "rollout/return" in found["validate"]


def test_a_second_fit_overwrites_nothing(here: Path) -> None:
    small = [*FIT, "--trainer.max_steps=4", "--trainer.enable_progress_bar=false"]
    assert main(small) == 0
    before = contents(here)
    assert any(name.endswith("last.ckpt") for name in before)
    assert main([*small, "--model.network.width=24"]) == 0
    after = contents(here)
    assert {name: after[name] for name in before} == before
    assert sum(name.endswith("last.ckpt") for name in after) == 2
    assert sum(name.endswith("config.yaml") for name in after) == 2


def test_a_second_fit_without_a_logger_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*FIT, "--trainer.max_steps=4", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    assert main(small) == 0
    assert "holds another run" in refusal([*small, "--model.network.width=24"], capsys)


def test_a_second_fit_of_the_same_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Its logger says where it goes, and default_root_dir nothing."""
    logger = ("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=.", "--trainer.logger.version=3")
    small = [*FIT, "--trainer.max_steps=4", "--trainer.enable_progress_bar=false", *logger]
    assert main(small) == 0
    line = refusal([*small, "--trainer.default_root_dir=another"], capsys)
    assert "version_3 holds another run (config.yaml); choose another version of the logger" in line


class Elsewhere(Logger):
    """Keeps its numbers elsewhere, as Weights & Biases does, and names its runs itself."""

    def __init__(self) -> None:
        super().__init__()
        self.version = uuid.uuid4().hex

    save_dir, name, version = "runs", "toy", ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_runs_have_folders_of_their_own_under_any_logger(here: Path) -> None:
    """A second run was refused, and its rollouts would have been appended to the first one's."""
    elsewhere = ["--trainer.enable_progress_bar=false", "--trainer.logger=test_cli.Elsewhere"]
    assert main([*FIT, *elsewhere, "--trainer.max_steps=4"]) == 0
    before = contents(here)
    (last,) = [name for name in before if name.endswith("last.ckpt")]
    assert main([*FIT, *elsewhere, "--trainer.max_steps=6", f"--ckpt_path={last}"]) == 0
    after = contents(here)
    assert {name: after[name] for name in before} == before
    names = ("config.yaml", "rollouts.jsonl")
    runs = [{Path(found).parent for found in after if found.endswith(name)} for name in names]
    assert runs[0] == runs[1] == {Path(found).parents[1] for found in after if found.endswith("last.ckpt")}
    assert len(runs[0]) == 2


def process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


HEAVY = "{'torch', 'lightning', 'gymnasium', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules)"


@pytest.mark.parametrize(
    "code",
    [
        "import dopr_lightning",
        "from dopr_lightning.cli import main; assert main(['--help']) == 0",
        "from dopr_lightning.cli import main; assert main([]) == 0",
        "from dopr_lightning.cli import main; assert main(['--version']) == 0",
        "from dopr_lightning.cli import main; assert main(['fut']) == 2",
    ],
)
def test_heavy_imports_wait(code: str) -> None:
    done = process(f"{code}; assert not {HEAVY}, {HEAVY}")
    assert done.returncode == 0, done.stderr


def test_in_a_process_of_its_own_a_mistake_is_one_line_too() -> None:
    """Also what Lightning logs is kept back until there is a run to log."""
    paths = [str(Path(CONFIG).parent), *sys.path]
    code = f"sys.path[:] = {paths!r}; from dopr_lightning.cli import main; sys.exit(main())"
    done = process(code, *FIT, "--model.optimizer.base=adm")
    assert done.returncode == 2
    assert done.stdout == ""
    known = f"choose from {', '.join(BASES)}, or an Optimizer class"
    assert done.stderr == f"dopr: error: unknown base optimizer 'adm'; {known}\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in text
    assert "humanoid.yaml" in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"xample: dopr {verb} " in " ".join(text.split())


def test_the_traceback_is_there_for_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOPR_TRACEBACK", "1")
    with pytest.raises(Exception, match="unknown optimizer 'adm'"):
        main([*COMPARE, "--optimizers", "adm"])


@pytest.mark.parametrize(("verb", "resumes"), [("compare", True), ("sweep", True), ("bench", False), ("test", False)])
def test_an_interruption_says_where_nothing_is_lost(
    verb: str, resumes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(verb: str, arguments: list[str], project: Project) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, verb, interrupted)
    assert main([verb]) == 130
    assert ("resumes" in capsys.readouterr().err) == resumes


def test_a_training_that_is_interrupted_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PolicyModule, "training_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main(FIT) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert capsys.readouterr().err.endswith("dopr: interrupted; go on from its last checkpoint by --ckpt_path\n")


@pytest.mark.parametrize("error", [ValueError("no display"), PermissionError(13, "Permission denied", "frames")])
def test_what_became_of_the_training_is_said_with_an_error(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(verb: str, arguments: list[str], project: Project) -> None:
        error.add_note("the training until step 4 is saved")
        raise error

    monkeypatch.setitem(VERBS, "fit", fail)
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.endswith("; the training until step 4 is saved\n")
