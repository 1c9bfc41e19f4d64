"""Every robomimic configuration on a tiny file laid out as its own: a policy of the task's sizes, which learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from robomimic_file import COLUMN, env_args

from dopr_lightning.data.robomimic import registered_file
from dopr_lightning.data.robomimic.files import DemoWriter
from dopr_lightning.training import CLI

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

# As published: the environment, its objects' numbers, the horizons of ph and mh, the cameras of images.
HAND = ("robot0_eye_in_hand",)
TASKS: dict[str, tuple[str, int, dict[str, int], tuple[str, ...]]] = {
    "lift": ("Lift", 10, {"ph": 400, "mh": 500}, ("agentview", *HAND)),
    "can": ("PickPlaceCan", 14, {"ph": 400, "mh": 500}, ("agentview", *HAND)),
    "square": ("NutAssemblySquare", 14, {"ph": 400, "mh": 500}, ("agentview", *HAND)),
    "tool_hang": ("ToolHang", 44, {"ph": 700}, ("sideview", *HAND)),
    "transport": (
        "TwoArmTransport",
        41,
        {"ph": 700, "mh": 1100},
        ("shouldercamera0", *HAND, "shouldercamera1", "robot1_eye_in_hand"),
    ),
}
CASES = [(task, kind, images) for task, (_, _, kinds, _) in TASKS.items() for kind in kinds for images in (False, True)]


def scene(arms: int) -> str:
    """A column per arm."""
    first, *others = (COLUMN.format(arm=arm, y=2 * arm, side="right_") for arm in range(arms))
    bodies = "".join(other[other.index("<body") : other.index("</worldbody>")] for other in others)
    return first.replace("</worldbody>", bodies + "</worldbody>")


def write(path: Path, task: str, arms: int, cameras: tuple[str, ...]) -> None:
    name, objects, *_ = TASKS[task]
    two = {"robots": ["Panda"] * 2, "env_configuration": "single-arm-opposed"} if arms == 2 else {}
    rng = np.random.default_rng(0)
    with DemoWriter(path, env_args(name=name, **two)) as file:
        for _ in range(3):
            steps = 18
            sizes = {"object": objects}
            for arm in range(arms):
                sizes |= {f"robot{arm}_{key}": n for key, n in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))}
            arrays: dict[str, Any] = {f"obs/{key}": rng.standard_normal((steps, n)) for key, n in sizes.items()}
            arrays |= {f"obs/{camera}_image": np.zeros((steps, 84, 84, 3), np.uint8) for camera in cameras}
            arrays["actions"] = rng.uniform(-1, 1, (steps, 7 * arms))
            arrays["states"] = rng.uniform(-1, 1, (steps, 1 + 4 * arms))
            file.add(scene(arms), arrays)


@pytest.mark.parametrize(("task", "kind", "images"), CASES)
def test_the_policy_of_every_task(
    task: str, kind: str, images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOPR_HOME", str(tmp_path))
    _, objects, horizons, cameras = TASKS[task]
    arms = 2 if task == "transport" else 1
    write(registered_file(task, kind, "image" if images else "low_dim"), task, arms, cameras if images else ())

    dashed = task.replace("_", "-")
    stack = ["robomimic.yaml", f"robomimic-{dashed}.yaml"]
    stack += ["robomimic-image.yaml"] if images else []
    stack += [f"robomimic-{dashed}-image.yaml"] if images and task in ("tool_hang", "transport") else []
    stack += ["robomimic-mh.yaml"] if kind == "mh" else []
    small = ["--model.network.channels=[8,8,8]", "--model.network.condition_dim=8", "--data.validation_episodes=1"]
    small += ["--model.network.encoder_width=4", "--data.num_workers=0"] if images else []
    cli: Any = CLI(
        [*(f"--config={name}" for name in stack), *small, "--data.batch_size=2", "--trainer.accelerator=cpu"], run=False
    )
    policy, data = cli.model, cli.datamodule
    assert (policy.observation_dim, policy.action_dim) == (9 * arms + (0 if images else objects), 10 * arms)
    assert policy.cameras == (cameras if images else ())
    assert (policy.observe, policy.horizon, policy.act) == (2, 16, 8)
    environment = data.environment
    assert (environment.max_steps, environment.metric) == (horizons[kind], "success")
    assert environment.title == f"robomimic's {task} {kind}{' from images' if images else ''}"

    statistics = data.statistics()
    policy.observation_normalizer.fit(statistics["observation"])
    policy.action_normalizer.fit(statistics["action"])
    policy._loss(next(iter(data.train_dataloader())), torch.Generator(), torch.Generator()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.network.parameters())
