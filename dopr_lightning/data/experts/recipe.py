"""How the shipped experts were made: SAC from Stable-Baselines3, its best policy exported to safetensors.

    python -m dopr_lightning.data.experts.recipe --env Hopper-v5 --steps 600000 --seed 0 --output Hopper-v5.safetensors

needs ``pip install 'dopr-lightning[expert]'`` and an hour or two of one CPU core. The exported file is read back and
rolled out over 20 episodes before it is put in place; their mean return goes into its metadata.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dopr_lightning.data.experts.expert import LAYERS, Expert, play
from dopr_lightning.errors import UserError, import_extra

MODULE = "dopr_lightning.data.experts.recipe"  # __name__ is __main__ when it runs
HIDDEN = [128, 128]
EVALUATION_EPISODES = 20
# Past the seeds of demonstrations (from 0) and of reported rollouts (from 100000).
EVALUATION_SEED = 500_000


def train(env_id: str, steps: int, seed: int) -> Any:
    """Train SAC and return the model with the actor that earned the highest mean return.

    Stable-Baselines3's defaults, except: hidden layers of 128 for the actor, because it ships; 10,000 random steps
    first. Every 10,000 steps 20 deterministic episodes decide whether this actor is the best so far.

    Raises:
        UserError: Stable-Baselines3 is not installed.
    """
    sb3 = import_extra("stable_baselines3", "expert")
    import gymnasium
    import torch
    from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
    from stable_baselines3.common.monitor import Monitor

    class KeepBest(BaseCallback):
        actor: dict[str, Any] | None = None

        def _on_step(self) -> bool:
            self.actor = copy.deepcopy(self.model.policy.actor.state_dict())
            return True

    torch.set_num_threads(1)  # networks this small lose time to threads
    model = sb3.SAC(
        "MlpPolicy",
        Monitor(gymnasium.make(env_id)),
        seed=seed,
        learning_starts=10_000,
        policy_kwargs={"net_arch": {"pi": HIDDEN, "qf": [256, 256]}},
        device="cpu",
    )
    best = KeepBest()
    evaluation = EvalCallback(
        Monitor(gymnasium.make(env_id)),
        callback_on_new_best=best,
        n_eval_episodes=EVALUATION_EPISODES,
        eval_freq=10_000,
        deterministic=True,
    )
    model.learn(steps, callback=evaluation)
    if best.actor is None:
        raise UserError(f"--steps {steps} ends before the first evaluation; train for 10000 or more")
    model.policy.actor.load_state_dict(best.actor)
    return model


def export(model: Any, path: Path, metadata: dict[str, str]) -> None:
    """Write the mean action of an SAC model's actor as the safetensors file `Expert` reads.

    Args:
        model: A Stable-Baselines3 SAC model whose actor has two hidden ReLU layers.
        path: Where to write.
        metadata: Strings to keep in the file: environment id, mean return, recipe, versions.
    """
    from safetensors.torch import save_file

    actor = model.policy.actor
    linears = [actor.latent_pi[0], actor.latent_pi[2], actor.mu]
    tensors = {}
    for name, linear in zip(LAYERS, linears, strict=True):
        tensors[f"{name}.weight"] = linear.weight.detach().clone()
        tensors[f"{name}.bias"] = linear.bias.detach().clone()
    save_file(tensors, path, metadata)


def evaluate(path: Path, env_id: str) -> list[float]:
    """Returns of an exported expert over 20 episodes with fixed seeds."""
    import gymnasium

    env = gymnasium.make(env_id)
    expert = Expert.load(path, env.action_space)
    returns = [play(expert, env, EVALUATION_SEED + i).return_ for i in range(EVALUATION_EPISODES)]
    env.close()
    return returns


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, read back, evaluate, put in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    options = parser.parse_args(arguments)

    model = train(options.env, options.steps, options.seed)
    packages = ("stable-baselines3", "gymnasium", "mujoco", "torch")
    metadata = {
        "env_id": options.env,
        "hidden": ",".join(map(str, HIDDEN)),
        "recipe": f"{MODULE} --env {options.env} --steps {options.steps} --seed {options.seed}",
        "versions": json.dumps({package: importlib.metadata.version(package) for package in packages}),
    }
    unfinished = options.output.with_suffix(".partial")
    export(model, unfinished, metadata)
    returns = evaluate(unfinished, options.env)
    export(model, unfinished, metadata | {"mean_return": f"{np.mean(returns):.1f}"})
    unfinished.chmod(0o644)  # safetensors writes for the owner alone; a package is for all
    os.replace(unfinished, options.output)
    print(f"{options.output}: mean return {np.mean(returns):.0f}, worst {np.min(returns):.0f}, {len(returns)} episodes")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
