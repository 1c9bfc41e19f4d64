from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks import ActionNetwork, ConditionalUnet1d, ResidualMLP
from dopr_lightning.policies.networks.time_embedding import TIME_FEATURES, sinusoidal_embedding

OBS, A, TO, T, B = 5, 3, 2, 8, 4


def mlp(denoise: bool) -> ActionNetwork:
    return ResidualMLP(OBS, A, TO, T, denoise, width=16, depth=2)


def unet(denoise: bool) -> ActionNetwork:
    return ConditionalUnet1d(OBS, A, TO, T, denoise, channels=(8, 16, 16), groups=4, condition_dim=16)


BUILDERS: list[Callable[[bool], ActionNetwork]] = [mlp, unet]
both_networks = pytest.mark.parametrize("build", BUILDERS)
both_modes = pytest.mark.parametrize("denoise", [True, False])


def seeded(build: Callable[[bool], ActionNetwork], denoise: bool) -> ActionNetwork:
    torch.manual_seed(0)
    return build(denoise).double()


def inputs(denoise: bool, batch: int = B) -> tuple[Tensor | None, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    action = torch.randn(batch, T, A, generator=generator, dtype=torch.float64)
    time = torch.rand(batch, generator=generator, dtype=torch.float64)
    observation = torch.randn(batch, TO, OBS, generator=generator, dtype=torch.float64)
    return (action, time, observation) if denoise else (None, None, observation)


@both_networks
@both_modes
def test_shape_and_determinism_under_a_seed(build: Callable[[bool], ActionNetwork], denoise: bool) -> None:
    out = seeded(build, denoise)(*inputs(denoise))
    assert out.shape == (B, T, A)
    assert torch.equal(seeded(build, denoise)(*inputs(denoise)), out)


@both_networks
@both_modes
def test_gradients_reach_every_parameter(build: Callable[[bool], ActionNetwork], denoise: bool) -> None:
    network = seeded(build, denoise)
    network(*inputs(denoise)).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert dead == []


@both_networks
@both_modes
def test_rows_do_not_see_each_other(build: Callable[[bool], ActionNetwork], denoise: bool) -> None:
    network = seeded(build, denoise)
    together = network(*inputs(denoise))
    alone = network(*(None if x is None else x[2:3] for x in inputs(denoise)))
    torch.testing.assert_close(alone[0], together[2], atol=1e-12, rtol=1e-12)


@both_networks
def test_every_input_matters(build: Callable[[bool], ActionNetwork]) -> None:
    network = seeded(build, True)
    given = inputs(True)
    out = network(*given)
    for index in range(3):
        changed = list(given)
        value = given[index]
        assert value is not None
        changed[index] = value * 0.9
        assert (network(*changed) - out).abs().amax() > 1e-4
    # In both modes each observation of the window matters.
    for denoise in (True, False):
        network = seeded(build, denoise)
        action, time, observation = inputs(denoise)
        observation.requires_grad_()
        gradient = torch.autograd.grad(network(action, time, observation).square().sum(), observation)[0]
        assert (gradient.abs().amax(dim=(0, 2)) > 1e-8).all()


@both_networks
@both_modes
def test_gradients_against_finite_differences(build: Callable[[bool], ActionNetwork], denoise: bool) -> None:
    network = seeded(build, denoise)
    given = inputs(denoise, batch=2)
    observation = given[2].requires_grad_()
    assert torch.autograd.gradcheck(lambda o: network(given[0], given[1], o), [observation], fast_mode=True)
    name, parameter = next(iter(network.named_parameters()))

    def of_parameter(p: Tensor) -> Tensor:
        return torch.func.functional_call(network, {name: p}, given)

    assert torch.autograd.gradcheck(of_parameter, [parameter.detach().requires_grad_()], fast_mode=True)


@both_networks
@both_modes
def test_roles_name_the_weights_at_fixed_dimensions(build: Callable[[bool], ActionNetwork], denoise: bool) -> None:
    """Doubling every width doubles the fan-in and fan-out of a weight, save where its role says it is fixed."""
    narrow = build(denoise)
    wide: ActionNetwork
    if isinstance(narrow, ResidualMLP):
        wide = ResidualMLP(OBS, A, TO, T, denoise, width=32, depth=2)
    else:
        wide = ConditionalUnet1d(OBS, A, TO, T, denoise, channels=(16, 32, 32), groups=4, condition_dim=32)
    roles = narrow.parameter_roles()
    assert wide.parameter_roles() == roles
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        if a.ndim < 2:
            assert name not in roles
            continue
        growth = (b.shape[0] // a.shape[0], b.shape[1] // a.shape[1])
        assert growth == {"input": (2, 1), "readout": (1, 2), None: (2, 2)}[roles.get(name)], name
    assert "readout.weight" in roles


@both_networks
def test_wrong_shapes_name_both(build: Callable[[bool], ActionNetwork]) -> None:
    network = seeded(build, True)
    action, time, observation = inputs(True)
    assert action is not None
    with pytest.raises(UserError, match=r"observations of shape \(batch, 2, 5\), got \(4, 1, 5\)"):
        network(action, time, observation[:, :1])
    with pytest.raises(UserError, match=r"actions of shape \(batch, 8, 3\), got \(4, 8, 2\)"):
        network(action[..., :2], time, observation)


@both_networks
def test_calls_against_the_mode_are_refused(build: Callable[[bool], ActionNetwork]) -> None:
    action, time, observation = inputs(True)
    with pytest.raises(UserError, match="denoise=True it needs both"):
        seeded(build, True)(None, None, observation)
    with pytest.raises(UserError, match="denoise=False it takes neither"):
        seeded(build, False)(action, time, observation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 10}, "horizon 10 is not a multiple of 4"),
        ({"channels": (8, 12)}, r"channels \[8, 12\] must be positive multiples of groups 8"),
        ({"channels": ()}, "levels must be at least 1"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"observation_dim": 0}, "observation_dim must be at least 1, got 0"),
    ],
)
def test_bad_unet_arguments(arguments: dict, message: str) -> None:
    good: dict = {"observation_dim": OBS, "action_dim": A, "observe": TO, "horizon": T, "denoise": True}
    with pytest.raises(UserError, match=message):
        ConditionalUnet1d(**(good | arguments))


def test_bad_mlp_arguments() -> None:
    with pytest.raises(UserError, match="depth must be at least 1, got 0"):
        ResidualMLP(OBS, A, TO, T, False, depth=0)


def test_default_unet_has_the_structure_of_much_ado() -> None:
    """Their 33 Conv1d, 2 ConvTranspose1d, 17 Linear and 19.7 M parameters (images, 256 features per step), less:

    the scalar head (2 Linear; only their flow maps use it), half of the condition (256 from a sum where they
    concatenate 512, in the twelve FiLM layers), and 224 of 256 time features.
    """
    with torch.device("meta"):
        network = ConditionalUnet1d(256, 10, 2, 16, denoise=True)
    layers = Counter(type(m) for m in network.modules())
    assert (layers[nn.Conv1d], layers[nn.ConvTranspose1d], layers[nn.Linear]) == (33, 2, 15)
    films = [p.numel() for name, p in network.named_parameters() if name.endswith("film.1.weight")]
    assert len(films) == 12
    head = (512 * 128 + 128) + (128 + 1)
    time = (256 - TIME_FEATURES) * 1024
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == pytest.approx(17.54e6, abs=0.01e6)
    assert parameters + head + sum(films) + time == pytest.approx(19.7e6, abs=0.05e6)


def test_mlp_without_denoising_has_no_input_but_the_observation() -> None:
    network = ResidualMLP(OBS, A, TO, T, False)
    assert network.input.in_features == TO * OBS
    assert ResidualMLP(OBS, A, TO, T, True).input.in_features == TO * OBS + T * A + TIME_FEATURES


def test_time_embedding() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    features = sinusoidal_embedding(t)
    assert features.shape == (101, TIME_FEATURES)
    assert features.dtype == torch.float64
    half = TIME_FEATURES // 2
    assert torch.equal(features[0], torch.cat([torch.zeros(half), torch.ones(half)]).double())
    # The longest period is 4: a quarter of it over the path, so the feature is monotone. The shortest is 0.004.
    torch.testing.assert_close(features[:, 0], (t * torch.pi / 2).sin())
    torch.testing.assert_close(features[:, half - 1], (t * 2 * torch.pi / 0.004).sin(), atol=1e-9, rtol=0)
    distances = torch.cdist(features, features) + 10 * torch.eye(101)
    assert distances.min() > 0.5
