from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks import (
    ActionNetwork,
    ActionTransformer,
    ConditionalUnet1d,
    ResidualMLP,
    VisionMLP,
    VisionTransformer,
    VisionUnet1d,
    VisualObservation,
)
from dopr_lightning.policies.networks.time_embedding import TIME_FEATURES, sinusoidal_embedding

OBS, A, TO, T, B = 5, 3, 2, 8, 4
CAMERAS = ("agent", "hand")

Network = type[ActionNetwork]

MLP = {"width": 16, "depth": 2}
UNET = {"channels": [8, 16, 16], "groups": 4, "condition_dim": 16}
TRANSFORMER = {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2}
EYES = {"cameras": CAMERAS, "encoder_width": 8, "crop": 40}
KEYWORDS: dict[Network, dict[str, Any]] = {
    ResidualMLP: MLP,
    ConditionalUnet1d: UNET,
    ActionTransformer: TRANSFORMER,
    VisionMLP: MLP | EYES,
    VisionUnet1d: UNET | EYES,
    VisionTransformer: TRANSFORMER | EYES,
}
"""Of every network, small."""

STATE_NETWORKS = [ResidualMLP, ConditionalUnet1d, ActionTransformer]
state_networks = pytest.mark.parametrize("kind", STATE_NETWORKS)
all_networks = pytest.mark.parametrize("kind", KEYWORDS)
both_modes = pytest.mark.parametrize("denoise", [True, False])


def build(kind: Network, denoise: bool, growth: int = 1) -> ActionNetwork:
    """A small network, its widths multiplied by ``growth``."""
    keywords = dict(KEYWORDS[kind])
    for key in kind.scales:
        value = keywords[key]
        keywords[key] = [growth * v for v in value] if isinstance(value, list) else growth * value
    return kind(OBS, A, TO, T, denoise, **keywords)


def seeded(kind: Network, denoise: bool) -> ActionNetwork:
    """A network in general position: what its initialisation set to zero, where gradients vanish, is moved away."""
    torch.manual_seed(0)
    network = build(kind, denoise).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(denoise: bool, batch: int = B) -> tuple[Tensor | None, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(1)
    action = torch.randn(batch, T, A, generator=generator, dtype=torch.float64)
    time = torch.rand(batch, generator=generator, dtype=torch.float64)
    observation = torch.randn(batch, TO, OBS, generator=generator, dtype=torch.float64)
    return (action, time, observation) if denoise else (None, None, observation)


def observed(kind: Network, state: Tensor) -> Tensor | VisualObservation:
    """The state, beside images where the network takes them: a function of the rows' indices."""
    if "cameras" not in KEYWORDS[kind]:
        return state
    generator = torch.Generator().manual_seed(2)
    shape = (len(state), TO, 3, 44, 46)
    return {"state": state, "images": {name: torch.rand(shape, generator=generator).double() for name in CAMERAS}}


def rows_of(observation: Tensor | VisualObservation, rows: slice) -> Tensor | VisualObservation:
    if isinstance(observation, Tensor):
        return observation[rows]
    return {"state": observation["state"][rows], "images": {k: v[rows] for k, v in observation["images"].items()}}


@all_networks
@both_modes
def test_shape_and_determinism_under_a_seed(kind: Network, denoise: bool) -> None:
    action, time, state = inputs(denoise)

    def output() -> Tensor:
        network = seeded(kind, denoise)
        return network(action, time, network.encode(observed(kind, state)))

    out = output()
    assert out.shape == (B, T, A)
    assert torch.equal(output(), out)


@all_networks
@both_modes
def test_gradients_reach_every_parameter(kind: Network, denoise: bool) -> None:
    network = seeded(kind, denoise)
    action, time, state = inputs(denoise)
    network(action, time, network.encode(observed(kind, state))).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert dead == []


@all_networks
@both_modes
def test_rows_do_not_see_each_other(kind: Network, denoise: bool) -> None:
    network = seeded(kind, denoise)
    action, time, state = inputs(denoise)
    together = network(action, time, network.encode(observed(kind, state)))
    row = slice(2, 3)
    seen = network.encode(rows_of(observed(kind, state), row))
    alone = network(None if action is None else action[row], None if time is None else time[row], seen)
    torch.testing.assert_close(alone[0], together[2], atol=1e-12, rtol=1e-12)


@state_networks
def test_every_input_matters(kind: Network) -> None:
    network = seeded(kind, True)
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
        network = seeded(kind, denoise)
        action, time, observation = inputs(denoise)
        observation.requires_grad_()
        gradient = torch.autograd.grad(network(action, time, observation).square().sum(), observation)[0]
        assert (gradient.abs().amax(dim=(0, 2)) > 1e-8).all()


@state_networks
@both_modes
def test_gradients_against_finite_differences(kind: Network, denoise: bool) -> None:
    network = seeded(kind, denoise)
    given = inputs(denoise, batch=2)
    observation = given[2].requires_grad_()
    assert torch.autograd.gradcheck(lambda o: network(given[0], given[1], o), [observation], fast_mode=True)
    name, parameter = next(iter(network.named_parameters()))

    def of_parameter(p: Tensor) -> Tensor:
        return torch.func.functional_call(network, {name: p}, given)

    assert torch.autograd.gradcheck(of_parameter, [parameter.detach().requires_grad_()], fast_mode=True)


@all_networks
@both_modes
def test_roles_name_the_weights_at_fixed_dimensions(kind: Network, denoise: bool) -> None:
    """Doubling what scales doubles the fan-in and fan-out of a weight, save where its role says it is fixed."""
    narrow, wide = build(kind, denoise), build(kind, denoise, growth=2)
    roles = narrow.parameter_roles()
    assert wide.parameter_roles() == roles
    for (name, a), b in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        if a.ndim < 2:
            assert name not in roles
            continue
        growth = (b.shape[0] / a.shape[0], b.shape[1] / a.shape[1])
        assert growth == {"input": (2, 1), "readout": (1, 2), "condition": (2, 2), None: (2, 2)}[roles.get(name)], name
        assert a.shape[2:] == b.shape[2:]
    assert "readout.weight" in roles
    assert set(roles) <= {name for name, _ in narrow.named_parameters()}


@state_networks
@both_modes
def test_what_sees_one_row_per_sample_beside_layers_that_see_more_is_a_condition(kind: Network, denoise: bool) -> None:
    """Of the hidden matrices: FiLM, adaptive norms, the embedding of time. All the MLP's are alike."""
    network = seeded(kind, denoise)
    rows: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):

            def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                x = args[0]
                positions = x.shape[1:-1] if isinstance(module, nn.Linear) else x.shape[2:]
                rows[f"{name}.weight"] = len(x) * positions.numel()

            module.register_forward_hook(count)
    network(*inputs(denoise))
    roles = network.parameter_roles()
    hidden = {name: n for name, n in rows.items() if roles.get(name) not in ("input", "readout")}
    alone = {name for name, n in hidden.items() if n == B}
    conditions = {name for name, role in roles.items() if role == "condition"}
    assert conditions == (set() if alone == set(hidden) else alone)


@pytest.mark.parametrize("kind", sorted(set(KEYWORDS) - set(STATE_NETWORKS), key=str))
def test_what_cameras_add_to_a_condition_is_one(kind: Network) -> None:
    roles = build(kind, True).parameter_roles()
    projections = {role for name, role in roles.items() if name.startswith("projections.")}
    assert projections == ({"condition"} if "condition" in {r for n, r in roles.items() if "proj" not in n} else set())


@all_networks
def test_numbers_of_groups_and_heads_stay_when_the_width_grows(kind: Network) -> None:
    def numbers(network: ActionNetwork) -> list[int]:
        return [getattr(m, key) for m in network.modules() for key in ("num_groups", "heads") if hasattr(m, key)]

    assert numbers(build(kind, True)) == numbers(build(kind, True, growth=2))
    assert numbers(build(kind, True)) or kind is ResidualMLP


@all_networks
def test_context_is_added_to_the_embedded_observations(kind: Network) -> None:
    """It acts as a change of the observations with the same embedding does."""
    network = seeded(kind, False)
    embed = getattr(network, "input" if isinstance(network, ResidualMLP) else "observation")
    state, other = (inputs(False)[2] * factor for factor in (1.0, 0.5))
    context = (other - state).flatten(1) @ embed.weight.T
    assert context.shape == (B, network.context_dim)
    torch.testing.assert_close(network.compute(None, None, state, context), network.compute(None, None, other))


@state_networks
def test_images_are_refused_by_networks_without_cameras(kind: Network) -> None:
    network = build(kind, False)
    state = torch.zeros(B, TO, OBS)
    assert network.encode(state) is state
    with pytest.raises(UserError, match="takes no images; use VisionMLP"):
        network.encode({"state": state, "images": {}})


@state_networks
def test_wrong_shapes_name_both(kind: Network) -> None:
    network = seeded(kind, True)
    action, time, observation = inputs(True)
    assert action is not None
    with pytest.raises(UserError, match=r"observations of shape \(batch, 2, 5\), got \(4, 1, 5\)"):
        network(action, time, observation[:, :1])
    with pytest.raises(UserError, match=r"actions of shape \(batch, 8, 3\), got \(4, 8, 2\)"):
        network(action[..., :2], time, observation)


@state_networks
def test_calls_against_the_mode_are_refused(kind: Network) -> None:
    action, time, observation = inputs(True)
    with pytest.raises(UserError, match="denoise=True it needs both"):
        seeded(kind, True)(None, None, observation)
    with pytest.raises(UserError, match="denoise=False it takes neither"):
        seeded(kind, False)(action, time, observation)


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


@pytest.mark.parametrize("denoise", [True, False])
def test_unets_of_all_widths_have_the_same_parameters(denoise: bool) -> None:
    """Also where the finest level happens to be as wide as what comes in: muP compares widths by name."""
    first = A if denoise else TIME_FEATURES

    def network(width: int) -> ConditionalUnet1d:
        return ConditionalUnet1d(OBS, A, TO, T, denoise, channels=(width, 2 * width), condition_dim=width, groups=1)

    with torch.device("meta"):
        names = [[name for name, _ in network(width).named_parameters()] for width in (first, 3 * first)]
    assert names[0] == names[1]


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
