r"""How the shipped experts were made: PPO from Stable-Baselines3, its best policy exported to safetensors.

    python -m dopr_lightning.data.experts.recipe --env Walker2d-v5 --steps 2500000 --stop-at 3500 --seed 0 \
        --output Walker2d-v5.safetensors

needs ``pip install 'dopr-lightning[expert]'`` and about half an hour of one free CPU core. The exported file is
read back and rolled out over 20 episodes before it is put in place; their mean return goes into its metadata.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.experts.expert import LAYERS, Expert, play
from dopr_lightning.errors import UserError, import_extra
from dopr_lightning.versions import versions

MODULE = "dopr_lightning.data.experts.recipe"  # __name__ is __main__ when it runs
HIDDEN = [64, 64]
ENVIRONMENTS = 4
SELECTION_EVERY = 100_000  # environment steps
SELECTION_EPISODES = 10
SELECTION_SEED = 10_000
NORMALIZER_EPSILON = 1e-8  # VecNormalize's default
EVALUATION_EPISODES = 20
# Past the seeds of demonstrations (from 0) and of reported rollouts (from 100000).
EVALUATION_SEED = 500_000


class Trained(NamedTuple):
    """A PPO model and the statistics its observations are normalised with, each (obs_dim,)."""

    model: Any
    obs_mean: npt.NDArray[np.float64]
    obs_var: npt.NDArray[np.float64]


def train(env_id: str, steps: int, stop_at: float, seed: int) -> Trained:
    """Train PPO, until an evaluation earns ``stop_at`` or ``steps`` are done, and return the best policy.

    Observations and rewards are normalised by running statistics (VecNormalize). Every 100,000 steps 10 deterministic
    episodes decide whether this policy is the best so far; if so it is kept, with the statistics of that moment.

    Raises:
        UserError: Stable-Baselines3 is not installed, or training ends before the first evaluation.
    """
    sb3 = import_extra("stable_baselines3", "expert")
    import torch
    from stable_baselines3.common.callbacks import (
        BaseCallback,
        CallbackList,
        EvalCallback,
        StopTrainingOnRewardThreshold,
    )
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class KeepBest(BaseCallback):
        kept: tuple[Any, Any] | None = None

        def _on_step(self) -> bool:
            self.kept = copy.deepcopy((self.model.policy.state_dict(), self.training_env.obs_rms))
            return True

    torch.set_num_threads(1)  # networks this small lose time to threads
    environments = VecNormalize(make_vec_env(env_id, ENVIRONMENTS, seed=seed), gamma=0.99, epsilon=NORMALIZER_EPSILON)
    selection = VecNormalize(
        make_vec_env(env_id, 1, seed=SELECTION_SEED + seed),
        training=False,
        norm_reward=False,
        epsilon=NORMALIZER_EPSILON,
    )
    model = sb3.PPO(
        "MlpPolicy",
        environments,
        seed=seed,
        n_steps=512,
        batch_size=64,
        n_epochs=10,
        learning_rate=lambda left: 3e-4 * left,
        ent_coef=0.0,
        gae_lambda=0.95,
        gamma=0.99,
        max_grad_norm=0.5,
        vf_coef=0.5,
        policy_kwargs={
            "net_arch": {"pi": HIDDEN, "vf": HIDDEN},
            "log_std_init": -1.0,
            "activation_fn": torch.nn.Tanh,
        },
        device="cpu",
    )
    best = KeepBest()
    evaluation = EvalCallback(
        selection,
        callback_on_new_best=CallbackList([best, StopTrainingOnRewardThreshold(stop_at)]),
        n_eval_episodes=SELECTION_EPISODES,
        eval_freq=SELECTION_EVERY // ENVIRONMENTS,  # it counts calls; each steps every environment
        deterministic=True,
    )
    model.learn(steps, callback=evaluation)
    environments.close()
    selection.close()
    if best.kept is None:
        raise UserError(f"--steps {steps} ends before the first evaluation; train for {SELECTION_EVERY} or more")
    weights, statistics = best.kept
    model.policy.load_state_dict(weights)
    return Trained(model, statistics.mean, statistics.var)


def export(
    model: Any,
    obs_mean: npt.NDArray[np.floating[Any]],
    obs_var: npt.NDArray[np.floating[Any]],
    path: Path,
    metadata: dict[str, str],
) -> None:
    """Write the mean action of a PPO policy as the safetensors file `Expert` reads.

    The normalisation (x - mean) / sqrt(var + epsilon) is folded into the first layer, so the file holds a plain network
    on raw observations. VecNormalize also clips the normalised observation to +-10; a layer cannot, so the exported
    expert differs where an observation is that far out. Judge the file by its own rollouts (`evaluate`).

    Args:
        model: A Stable-Baselines3 PPO model whose policy has two hidden tanh layers.
        obs_mean: Mean of the observations, (obs_dim,).
        obs_var: Variance of the observations, (obs_dim,).
        path: Where to write.
        metadata: Strings to keep in the file: environment id, mean return, recipe, versions.
    """
    import torch
    from safetensors.torch import save_file

    hidden = model.policy.mlp_extractor.policy_net
    tensors = {}
    for name, linear in zip(LAYERS, [hidden[0], hidden[2], model.policy.action_net], strict=True):
        tensors[f"{name}.weight"] = linear.weight.detach().clone()
        tensors[f"{name}.bias"] = linear.bias.detach().clone()
    weight, bias = (tensors[f"{LAYERS[0]}.{part}"] for part in ("weight", "bias"))
    mean = torch.as_tensor(obs_mean, dtype=torch.float64)
    scaled = weight.double() / torch.sqrt(torch.as_tensor(obs_var, dtype=torch.float64) + NORMALIZER_EPSILON)
    tensors[f"{LAYERS[0]}.weight"] = scaled.to(weight.dtype)
    tensors[f"{LAYERS[0]}.bias"] = (bias.double() - scaled @ mean).to(bias.dtype)
    save_file(tensors, path, metadata)


def evaluate(path: Path, env_id: str) -> list[float]:
    """Returns of an exported expert over 20 episodes with fixed seeds."""
    import gymnasium

    env = gymnasium.make(env_id)
    expert = Expert.load(path, env.action_space)
    returns = [play(expert, env, EVALUATION_SEED + i).return_ for i in range(EVALUATION_EPISODES)]
    env.close()
    return returns


def describe(env_id: str, steps: int, stop_at: float, seed: int) -> dict[str, str]:
    """The metadata of an expert trained here and now, all but its mean return."""
    packages = ("stable-baselines3", "gymnasium", "mujoco", "torch")
    return {
        "env_id": env_id,
        "hidden": ",".join(map(str, HIDDEN)),
        "recipe": f"{MODULE} --env {env_id} --steps {steps} --stop-at {stop_at:g} --seed {seed}",
        "versions": json.dumps(versions(packages)),
    }


def finish(trained: Trained, output: Path, metadata: dict[str, str]) -> list[float]:
    """Export, read back, evaluate, put in place.

    Args:
        trained: What to export.
        output: The safetensors file to write.
        metadata: As from `describe`; the mean return is added.

    Returns:
        The returns of `evaluate`.
    """
    unfinished = output.with_suffix(".partial")
    export(*trained, unfinished, metadata)
    returns = evaluate(unfinished, metadata["env_id"])
    export(*trained, unfinished, metadata | {"mean_return": f"{np.mean(returns):.1f}"})
    unfinished.chmod(0o644)  # safetensors writes for the owner alone; a package is for all
    os.replace(unfinished, output)
    return returns


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and finish one expert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Walker2d-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2_500_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--stop-at", type=float, default=3500, help="mean return that is enough (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    options = parser.parse_args(arguments)

    chosen = (options.env, options.steps, options.stop_at, options.seed)
    returns = finish(train(*chosen), options.output, describe(*chosen))
    print(f"{options.output}: mean return {np.mean(returns):.0f}, worst {np.min(returns):.0f}, {len(returns)} episodes")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
