from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dopr_lightning.errors import UserError
from dopr_lightning.policies.normalizer import Mode, Normalizer


def data() -> Tensor:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-2, 1.0, 1e3, 0.0])
    return x + torch.tensor([5.0, 0.0, -20.0, 0.7])


def statistics(x: Tensor) -> dict[str, Tensor]:
    return {"min": x.amin(0), "max": x.amax(0), "mean": x.mean(0), "std": x.std(0, correction=0)}


def fitted(mode: Mode) -> Normalizer:
    normalizer = Normalizer(4, mode)
    normalizer.fit(statistics(data()))
    return normalizer


def test_minmax_maps_the_range_to_one() -> None:
    y = fitted("minmax")(data())
    torch.testing.assert_close(y.amin(0), torch.tensor([-1.0, -1.0, -1.0, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.amax(0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-4, rtol=0)


def test_standard_maps_to_zero_mean_and_unit_deviation() -> None:
    y = fitted("standard")(data())
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.tensor([1.0, 1.0, 1.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["minmax", "standard"])
def test_constant_dimension_maps_to_zero_and_stays_tame(mode: Mode) -> None:
    normalizer = fitted(mode)
    x = data()
    assert normalizer(x)[:, 3].abs().max() < 1e-6
    x[:, 3] += 1e-3  # a rollout leaves the constant
    torch.testing.assert_close(normalizer(x)[:, 3], torch.full((500,), 1e-3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["minmax", "standard"])
def test_a_dimension_that_only_counts_as_constant_is_told(mode: Mode, recwarn: pytest.WarningsRecorder) -> None:
    """One that is constant is not, up to the rounding of its statistics."""
    x = data()
    statistics_ = statistics(x)
    statistics_["std"][3] = 1e-8
    Normalizer(4, mode).fit(statistics_)
    assert not recwarn.list
    x[:, 1] *= 1e-5
    with pytest.warns(UserWarning, match=r"action dimension 1 \(by .*e-05\) varies by less than 0.0001 .* rescale the"):
        Normalizer(4, mode).fit(statistics(x), "action")


@pytest.mark.parametrize("mode", ["minmax", "standard"])
def test_inverse(mode: Mode) -> None:
    normalizer = fitted(mode)
    x = data().double().unflatten(0, (5, 100))
    torch.testing.assert_close(normalizer.inverse(normalizer(x)), x)


def test_statistics_of_float64_data_are_kept_as_float32() -> None:
    normalizer = Normalizer(1, "standard")
    normalizer.fit({"mean": torch.tensor([0.1], dtype=torch.float64), "std": torch.ones(1, dtype=torch.float64)})
    assert normalizer.offset.dtype == normalizer.scale.dtype == torch.float32
    assert normalizer.offset.item() == torch.tensor(0.1).item()


def test_travels_in_the_state_dict() -> None:
    source = fitted("minmax")
    target = Normalizer(4, "standard")  # the checkpoint decides the map, not the mode
    assert not target.fitted
    target.load_state_dict(source.state_dict())
    assert target.fitted
    assert torch.equal(target(data()), source(data()))
    assert copy.deepcopy(target).fitted
    assert list(target.parameters()) == []


def test_unfitted_state_stays_unfitted() -> None:
    target = fitted("minmax")
    target.load_state_dict(Normalizer(4).state_dict())
    assert not target.fitted


@pytest.mark.parametrize("use", [Normalizer.forward, Normalizer.inverse])
def test_use_before_fit(use: object) -> None:
    with pytest.raises(UserError, match="no statistics yet"):
        use(Normalizer(4), data())  # type: ignore[operator]


def test_wrong_dimensions_name_both() -> None:
    with pytest.raises(UserError, match="built for 4 dimensions, got data with 7"):
        fitted("minmax")(torch.zeros(2, 7))
    with pytest.raises(UserError, match=r"built for 7 dimensions, but the data's 'min' has shape \(4,\)"):
        Normalizer(7).fit(statistics(data()))


def test_bad_statistics() -> None:
    stats = statistics(data())
    stats["max"][2] = float("nan")
    normalizer = Normalizer(4)
    with pytest.raises(UserError, match="'max' is nan in dimension 2"):
        normalizer.fit(stats)
    del stats["max"]
    with pytest.raises(UserError, match="needs the statistic 'max'"):
        normalizer.fit(stats)
    assert not normalizer.fitted


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="one of minmax, standard, got 'max'"):
        Normalizer(4, "max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dim must be at least 1"):
        Normalizer(0)
