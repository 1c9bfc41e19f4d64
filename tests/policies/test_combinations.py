"""Every network under every algorithm, with cameras and without, learns with all its weights and acts."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest
import torch

from dopr_lightning.policies import networks
from dopr_lightning.policies.algorithms import Algorithm, Diffusion, FlowMatching, Regression
from dopr_lightning.policies.diffusion import Prediction, Sampler
from dopr_lightning.policies.module import PolicyModule

B, OBSERVE, HORIZON, ACT, OBS, A, SIDE = 3, 2, 8, 4, 3, 2, 36

ALGORITHMS: dict[str, Algorithm] = {"flow": FlowMatching(steps=2), "regression": Regression()} | {
    f"{sampler} {prediction}": Diffusion(sample_steps=10, sampler=sampler, prediction=prediction)
    for sampler in get_args(Sampler)
    for prediction in get_args(Prediction)
}
NETWORKS: dict[str, dict[str, Any]] = {
    "ResidualMLP": {"width": 16, "depth": 1},
    "ConditionalUnet1d": {"channels": [8, 16], "groups": 4, "condition_dim": 8},
    "ActionTransformer": {"width": 16, "depth": 1, "heads": 2},
}
CAMERAS = {"ResidualMLP": "VisionMLP", "ConditionalUnet1d": "VisionUnet1d", "ActionTransformer": "VisionTransformer"}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("cameras", [(), ("front", "hand")], ids=["state", "images"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_under_every_algorithm(name: str, cameras: tuple[str, ...], algorithm: Algorithm) -> None:
    torch.manual_seed(0)
    options = NETWORKS[name] | ({"cameras": cameras, "encoder_width": 8, "crop": 32} if cameras else {})
    kind = getattr(networks, CAMERAS[name] if cameras else name)
    policy = PolicyModule(partial(kind, **options), algorithm, OBS, A, observe=OBSERVE, horizon=HORIZON, act=ACT)
    policy.observation_normalizer.fit({"min": -torch.ones(OBS), "max": torch.ones(OBS)})
    policy.action_normalizer.fit({"min": -torch.ones(A), "max": torch.ones(A)})
    frames = {camera: torch.randint(0, 256, (B, OBSERVE, 3, SIDE, SIDE), dtype=torch.uint8) for camera in cameras}
    state = torch.randn(B, OBSERVE, OBS)
    batch = {"observation": state, "action": torch.rand(B, HORIZON, A) * 2 - 1} | (
        {"images": frames} if cameras else {}
    )

    policy._loss(batch, torch.Generator(), torch.Generator()).backward()
    assert [weight for weight, p in policy.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    actions = policy.eval().predict(
        {"state": state, "images": frames} if cameras else state, [torch.Generator() for _ in range(B)]
    )
    assert actions.shape == (B, ACT, A)
    assert actions.isfinite().all()
