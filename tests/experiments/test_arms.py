"""What ``--optimizers`` may say."""

import sys
from pathlib import Path

import pytest
from toy_task import CONFIG

from dopr_lightning.cli import main
from dopr_lightning.errors import UserError
from dopr_lightning.experiments.arms import Arm, parse_arms
from dopr_lightning.optim import BASES


def test_arms_may_carry_options_of_dopr() -> None:
    plain, exact = parse_arms("adamw, dopr-adamw+solver=exact+update_every=10")
    assert plain == Arm("adamw", dopr=False)
    assert exact.name == "dopr-adamw+solver=exact+update_every=10"
    assert exact.arguments(lr=0.1, damping=0.02) == [
        "--model.optimizer.base=adamw",
        "--model.optimizer.lr=0.1",
        "--trainer.callbacks+=dopr_lightning.DoPr",
        "--trainer.callbacks.damping=0.02",
        "--trainer.callbacks.solver=exact",
        "--trainer.callbacks.update_every=10",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("adamw+solver=exact", "options after \\+ are DoPr's, as in dopr-adamw\\+update_every=10"),
        ("dopr-adam", "unknown optimizer 'dopr-adam'"),
        ("adamw,adamw", "named twice"),
        ("dopr-muon+ema=0.9+update_every=10,dopr-muon+update_every=10+ema=0.9", "named twice"),
        ("dopr-adamw+ema=0.9+ema=0.5", "'dopr-adamw\\+ema=0.9\\+ema=0.5': ema is given twice"),
        (
            "adamw,dopr-adamw+update_evry=10",
            "'dopr-adamw\\+update_evry=10': DoPr has no option 'update_evry'; did you mean update_every\\?",
        ),
        ("dopr-adamw+often=1", "DoPr has no option 'often'; choose from damping, damping_scale, update_every, ema"),
        ("adamw,dopr-adamw+damping", "'dopr-adamw\\+damping': damping needs a value, as in update_every=10"),
        ("dopr-adamw+solver=", "solver needs a value"),
    ],
)
def test_mistakes_are_named(names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arms(names)


@pytest.mark.parametrize(
    "command",
    ["compare --optimizers", "coord-check --widths=8,16,32 --optimizers", "sweep --widths=8,16 --optimizer"],
)
def test_bases_may_be_those_of_a_module_that_the_configuration_names(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_pieces.py").write_text(
        "import torch\n"
        "from dopr_lightning.mup.rules import sign\n"
        "from dopr_lightning.optim import BASES, Base\n"
        "from dopr_lightning.policies.networks import ResidualMLP\n"
        "class Network(ResidualMLP): pass\n"
        "BASES['own'] = Base(torch.optim.NAdam, growth=sign)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_pieces", raising=False)
    monkeypatch.setitem(BASES, "own", BASES["adamw"])
    del BASES["own"]  # and afterwards again
    task = ["--config", CONFIG, "--output", str(tmp_path / "out"), "--model.network=own_pieces.Network"]
    # What DoPr refuses is found next, when the arms are tried.
    assert main([*command.split(), "dopr-own+update_every=0", *task]) == 2
    assert "update_every must be at least 1" in capsys.readouterr().err
