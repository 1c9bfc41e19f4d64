"""Cameras: crops, the encoder, and the networks that see through it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms.functional import center_crop as torchvision_center_crop

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks import ActionNetwork, VisionMLP, VisionTransformer, VisionUnet1d
from dopr_lightning.policies.networks.image_encoder import ImageEncoder, ResNet18, center_crop, random_crop, scaled
from dopr_lightning.preconditioner import ActivationPreconditioner

OBS, A, TO, T, B = 5, 3, 2, 8, 4
CAMERAS = ("agent", "hand")
SIZE, CROP = 44, 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(denoise: bool = False, **options: Any) -> VisionMLP:
    torch.manual_seed(0)
    keywords = {"cameras": CAMERAS, "encoder_width": 8, "crop": CROP, "width": 16, "depth": 1} | options
    return VisionMLP(OBS, A, TO, T, denoise, **keywords).double()


def frames(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, (*(shape or (B, TO)), 3, SIZE, SIZE), generator=generator(seed), dtype=torch.uint8)


def seen(images: Mapping[str, Tensor] | None = None) -> Any:
    state = torch.randn(B, TO, OBS, generator=generator(9), dtype=torch.float64)
    return {"state": state, "images": images or {name: frames(i) for i, name in enumerate(CAMERAS)}}


# Crops


def coordinates(n: int, height: int, width: int) -> Tensor:
    """Images, (n, 2, height, width), whose every pixel says where it is."""
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return grid.expand(n, 2, height, width)


def test_random_crops_are_windows_at_every_place_equally_often() -> None:
    n, height, width, size = 4200, 8, 9, 6
    crops = random_crop(coordinates(n, height, width), size, generator())
    corner = crops[:, :, :1, :1]
    assert torch.equal(crops - corner, coordinates(n, size, size))  # contiguous, and so within bounds
    top, left = corner.flatten(1).T
    counts = torch.bincount(top * (width - size + 1) + left, minlength=12)
    assert len(counts) == 12  # 3 tops by 4 lefts
    # Chi-square with 11 degrees of freedom: beyond 31.3 once in a thousand.
    assert ((counts - n / 12) ** 2 / (n / 12)).sum() < 31.3


def test_random_crops_are_those_of_their_generator() -> None:
    images = coordinates(64, SIZE, SIZE)
    before = torch.get_rng_state()
    crops = random_crop(images, CROP, generator(1))
    assert torch.equal(random_crop(images, CROP, generator(1)), crops)
    assert not torch.equal(random_crop(images, CROP, generator(2)), crops)
    assert torch.equal(torch.get_rng_state(), before)
    again = generator(1)
    random_crop(images, CROP, again)
    assert not torch.equal(random_crop(images, CROP, again), crops)  # the next step's are new


@pytest.mark.parametrize(("height", "width", "size"), [(84, 84, 76), (96, 96, 84), (12, 10, 6), (6, 6, 6)])
def test_center_crop_is_torchvisions(height: int, width: int, size: int) -> None:
    images = coordinates(2, height, width)
    assert torch.equal(center_crop(images, size), torchvision_center_crop(images, [size, size]))


def test_center_crop_of_an_odd_margin_leaves_less_before_than_after() -> None:
    assert center_crop(coordinates(1, 9, 8), 6)[0, :, 0, 0].tolist() == [1, 1]


def test_every_frame_and_camera_is_cropped_in_a_place_of_its_own() -> None:
    """One image everywhere, with room for 11025 places: what reaches the encoders differs all the same."""
    network = policy()
    image = torch.randint(0, 256, (3, 144, 144), generator=generator(), dtype=torch.uint8)
    given = seen(dict.fromkeys(CAMERAS, image.expand(B, TO, -1, -1, -1)))
    crops: list[Tensor] = []
    for encoder in network.cameras.values():
        encoder.resnet.register_forward_pre_hook(lambda module, args: crops.append(args[0]))
    network.encode(given, generator(3))
    assert len(torch.cat(crops).flatten(1).unique(dim=0)) == len(CAMERAS) * B * TO
    crops.clear()
    network.encode(given)
    assert len(torch.cat(crops).flatten(1).unique(dim=0)) == 1


# The encoder


def torchvision_resnet18() -> ResNet:
    network = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
    network.fc = nn.Identity()
    return network


def test_encoder_is_torchvisions_resnet18_with_16_channels_per_group() -> None:
    ours, theirs = ResNet18().double(), torchvision_resnet18().double()
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.add_(0.01 * torch.randn(p.shape, generator=generator()))  # gains and biases that tell norms apart
            q.copy_(p)
    x = torch.randn(2, 3, CROP, CROP, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-10, rtol=1e-10)
    assert ours.features == 512
    assert sum(p.numel() for p in ours.parameters()) == 11_689_512 - 513_000  # with its classifier, and without


def test_groups_stay_when_the_width_grows() -> None:
    def groups(width: int) -> list[int]:
        with torch.device("meta"):
            return [m.num_groups for m in ResNet18(width).modules() if isinstance(m, nn.GroupNorm)]

    assert groups(64) == [4] * 5 + [8] * 5 + [16] * 5 + [32] * 5
    assert groups(16) == groups(128) == groups(64)


@pytest.mark.parametrize("width", [16, 64])
def test_initial_weights_scale_with_the_fan_in(width: int) -> None:
    torch.manual_seed(0)
    for name, p in ResNet18(width).named_parameters():
        if p.ndim == 4:
            expected = (2 / p[0].numel()) ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=4 / (2 * p.numel()) ** 0.5), name


def test_images_are_scaled_to_minus_one_and_one() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    expected = torch.linspace(-1, 1, 256, dtype=torch.float64)
    torch.testing.assert_close(scaled(bytes_, torch.float64), expected, atol=1e-15, rtol=0)
    torch.testing.assert_close(scaled(bytes_.double() / 255, torch.float64), expected, atol=1e-15, rtol=0)
    assert scaled(bytes_, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"uint8, or floating point in \[0, 1\], got torch.int64"):
        scaled(bytes_.long(), torch.float32)


def test_features_of_bytes_and_of_fractions_agree() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(8, CROP).double()
    images = frames(0)
    torch.testing.assert_close(encoder(images.double() / 255, generator()), encoder(images, generator()))
    cut = images[..., 2:42, 2:42]
    torch.testing.assert_close(encoder(cut, None), encoder(images, None))
    torch.testing.assert_close(encoder(cut, generator()), encoder(images, None))  # nothing left to draw


def test_gradients_against_finite_differences() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder(8, CROP).double()
    images = torch.rand(1, 1, 3, SIZE, SIZE, generator=generator(), dtype=torch.float64, requires_grad=True)

    def of_images(x: Tensor) -> Tensor:
        return encoder(x, generator())

    def of_weight(weight: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, {"resnet.conv1.weight": weight}, (images.detach(), None))

    assert torch.autograd.gradcheck(of_images, [images], fast_mode=True)
    assert torch.autograd.gradcheck(of_weight, [encoder.resnet.conv1.weight.detach().requires_grad_()], fast_mode=True)


@pytest.mark.parametrize(
    "shape", [(B, TO, SIZE, SIZE, 3), (B, 3, SIZE, SIZE), (B, TO, 3, SIZE, CROP - 1), (B, TO, 1, SIZE, SIZE)]
)
def test_wrong_images_name_shape_and_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"H and W at least crop=40, are needed, got \(4, "):
        ImageEncoder(8, CROP)(torch.zeros(shape), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_width": 6}, "VisionMLP: encoder_width=6, crop=40: ResNet18: width 6 is not a multiple of 4"),
        ({"encoder_width": 0}, "encoder_width=0, .*width must be at least 1, got 0"),
        ({"crop": 0}, "crop=0: .*crop must be at least 1, got 0"),
        ({"cameras": ()}, r"one or more different names without dots, got \[\]"),
        ({"cameras": ("a", "a")}, r"different names without dots, got \['a', 'a'\]"),
        ({"cameras": ("observation.images.top",)}, "without dots"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        policy(**arguments)


# Networks with cameras


def test_encoding_is_the_state_beside_the_sum_of_projections() -> None:
    network, given = policy(), seen()
    out = network.encode(given)
    context = torch.zeros(B, 16, dtype=torch.float64)
    for name in CAMERAS:
        resnet, projection = network.cameras[name].resnet, network.projections[name]
        images = given["images"][name][..., 2:42, 2:42].double() / 127.5 - 1
        for step in range(TO):
            weight = projection.weight[:, 64 * step : 64 * (step + 1)]
            context = context + resnet(images[:, step]) @ weight.T
        context = context + projection.bias
    torch.testing.assert_close(out, torch.cat([given["state"].flatten(1), context], dim=1))
    torch.testing.assert_close(network(None, None, out), network.compute(None, None, given["state"], context))


def test_crops_are_random_only_with_a_generator() -> None:
    network, given = policy(), seen()
    assert torch.equal(network.encode(given), network.encode(given))
    assert torch.equal(network.encode(given, generator(1)), network.encode(given, generator(1)))
    assert not torch.equal(network.encode(given, generator(1)), network.encode(given, generator(2)))
    assert not torch.equal(network.encode(given, generator(1)), network.encode(given))


def test_every_camera_and_frame_matters() -> None:
    network, given = policy(), seen()
    out = network(None, None, network.encode(given))
    for name in CAMERAS:
        for step in range(TO):
            changed = given["images"][name].clone()
            changed[:, step] = frames(7, B)
            other = network(None, None, network.encode(seen(given["images"] | {name: changed})))
            assert (other - out).abs().amax(dim=(1, 2)).min() > 1e-4


def test_other_cameras_than_the_networks_are_left_alone() -> None:
    network, given = policy(), seen()
    more = given["images"] | {"wall": torch.zeros(0)}
    assert torch.equal(network.encode(seen(more)), network.encode(given))


def test_wrong_observations_are_refused() -> None:
    network, given = policy(), seen()
    with pytest.raises(UserError, match="no images of camera 'hand', only of \\['agent'\\]; set cameras"):
        network.encode(seen({"agent": frames(0)}))
    with pytest.raises(UserError, match=r"camera 'hand': images of shape \(4, 1, 3, 44, 44\) with states of"):
        network.encode(seen(given["images"] | {"hand": frames(0, B, 1)}))
    with pytest.raises(UserError, match=r"states of shape \(batch, 2, 5\), got \(4, 2, 4\)"):
        network.encode(given | {"state": given["state"][..., :4]})
    with pytest.raises(UserError, match="VisionMLP needs images"):
        network.encode(given["state"])
    with pytest.raises(UserError, match=r"encoded observations of shape \(batch, 26\), got \(4, 2, 5\)"):
        network(None, None, given["state"])


@pytest.mark.parametrize("kind", [VisionUnet1d, VisionTransformer])
def test_preconditioning_covers_every_matrix_and_kernel(kind: type[ActionNetwork]) -> None:
    torch.manual_seed(0)
    small = (
        {"channels": [8, 8], "groups": 4, "condition_dim": 16} if kind is VisionUnet1d else {"width": 16, "depth": 1}
    )
    network = kind(OBS, A, TO, T, True, cameras=CAMERAS, encoder_width=8, crop=CROP, **small).double()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))  # away from the transformer's zeros
    preconditioner = ActivationPreconditioner(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: a weight's gradient is not explained by the rows captured
        observation = network.encode(seen(), generator())
        action = torch.randn(B, T, A, generator=generator(), dtype=torch.float64)
        network(action, torch.rand(B, generator=generator()).double(), observation).square().mean().backward()
        plain = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        preconditioner.step()
    changed = {name for name, p in network.named_parameters() if not torch.equal(p.grad, plain[name])}
    matrices = {name for name, p in network.named_parameters() if p.ndim >= 2}
    assert changed == matrices
    rows = {row.parameter: row for row in preconditioner.summary()}
    assert {name for name, row in rows.items() if row.covered} == matrices
    assert len([name for name in matrices if name.startswith("cameras.agent.")]) == 20  # 17 layers and 3 shortcuts
    assert rows["projections.agent.weight"].rows == B
    assert rows["cameras.agent.resnet.conv1.weight"].rows == B * TO * CROP**2


def test_constructible_from_a_configuration() -> None:
    """Flat: the keywords of the network and those of its cameras side by side."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=ActionNetwork)
    keywords = {
        "observation_dim": OBS,
        "action_dim": A,
        "observe": TO,
        "horizon": T,
        "denoise": True,
        "channels": [8, 16],
        "condition_dim": 16,
        "cameras": list(CAMERAS),
        "encoder_width": 8,
    }
    home = "dopr_lightning.policies.networks"
    config = parser.parse_object({"network": {"class_path": f"{home}.VisionUnet1d", "init_args": keywords}})
    network = parser.instantiate_classes(config).network
    assert network.context_dim == 16
    assert network.cameras["hand"].crop == 76
    with pytest.raises(Exception, match="chanels"):
        parser.parse_object(
            {"network": {"class_path": f"{home}.VisionUnet1d", "init_args": keywords | {"chanels": [8]}}}
        )
