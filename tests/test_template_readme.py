"""What a project's README says to write is written, and works: own data, and an environment for it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from baking import bake, run

SMALL = ["--trainer.max_steps=25", "--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false"]
SMALL += ["--rollout.episodes=0", "--rollout.report_episodes=2", "--data.batch_size=16"]


def snippets(project: Path, language: str) -> list[str]:
    text = (project / "README.md").read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def fit(project: Path, overlay: str) -> str:
    (project / "overlay.yaml").write_text(overlay)
    configs = [f"--config=configs/{name}.yaml" for name in ("experiment", "debug")]
    return run(project, "-m", "arm", "fit", *configs, "--config=configs/dopr.yaml", "--config=overlay.yaml", *SMALL)


def test_own_data_and_then_an_environment(tmp_path: Path) -> None:
    project = bake(tmp_path, project_name="Arm", task="own")
    record, environment = snippets(project, "python")
    run(project, "-c", record)
    assert (project / "demonstrations.npz").is_file()
    said = run(project, "-m", "arm", "fit", "--config=configs/experiment.yaml", "--config=configs/debug.yaml", *SMALL)
    assert "rollouts (" not in said

    run(project, "-m", "arm.example", "demonstrations.npz")
    (project / "src/arm/environment.py").write_text(environment)
    (overlay,) = snippets(project, "yaml")
    assert "success rate" in fit(project, overlay)


def test_own_data_in_a_gymnasium_environment(tmp_path: Path) -> None:
    project = bake(tmp_path, project_name="Arm", task="gymnasium")
    (record,) = snippets(project, "python")
    hopper = record.replace("(50, 4)", "(50, 11)").replace("(50, 2)", "(50, 3)")  # numbers of Hopper-v5
    run(project, "-c", hopper)
    own, minari = snippets(project, "yaml")
    assert "return" in fit(project, own)
    assert "dopr_lightning.data.Minari" in minari


@pytest.mark.parametrize("task", ["pusht", "robomimic"])
def test_a_source_of_ones_own(tmp_path: Path, task: str) -> None:
    project = bake(tmp_path, project_name="Arm", task=task)
    (source,) = snippets(project, "python")
    with (project / "src/arm/data.py").open("a") as file:
        file.write(source)
    write = "import numpy as np; np.savez('demonstrations.npz', observations=np.random.randn(300, 11), "
    run(project, "-c", write + "actions=np.random.randn(300, 3), episode_ends=np.arange(30, 301, 30))")
    overlay = snippets(project, "yaml")[-1]
    assert "return" in fit(project, overlay)
