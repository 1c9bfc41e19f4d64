"""The analysis of a sweep, on losses whose best values are known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest

from dopr_lightning.configuration import differences
from dopr_lightning.errors import UserError
from dopr_lightning.experiments.sweep.grid import ROLES, Point, candidates, points, scaled
from dopr_lightning.experiments.sweep.report import apart, best_point, judged_otherwise
from dopr_lightning.experiments.sweep.transfer import analyse, fit_curve
from dopr_lightning.optim.roles import Role

VALUES = [2 ** (k / 2) for k in range(-6, 7)]  # 1/8 to 8, sqrt(2) apart
COMPUTE = {32: 1.0, 64: 4.0, 128: 16.0}


def parabola(best: float, least: float, curvature: float = 0.1) -> np.ndarray:
    """Losses at VALUES, with their least at the hyperparameter 2^best."""
    return least + curvature * (np.log2(VALUES) - best) ** 2


def seeds(losses: np.ndarray, offsets: tuple[float, ...] = (0.0, 0.0, 0.0)) -> np.ndarray:
    return np.stack([losses + offset for offset in offsets], axis=1)


def test_a_parabola_is_found_between_the_values_of_the_grid() -> None:
    curve = fit_curve(VALUES, seeds(parabola(0.3, 2.0), (-0.5, 0.0, 0.5)))
    assert curve is not None
    assert curve.best == pytest.approx(0.3)
    assert curve.least == pytest.approx(2.0)
    assert not curve.at_edge
    for x in (-0.4, 0.3, 1.1):  # within an octave of the grid's best, at sqrt(2)
        assert curve.at(x) == pytest.approx(2 + 0.1 * (x - 0.3) ** 2)
    # Further off, straight between the grid's values.
    assert curve.at(2.25) == pytest.approx((parabola(0.3, 2.0)[10] + parabola(0.3, 2.0)[11]) / 2)
    assert curve.at(-99) == pytest.approx(parabola(0.3, 2.0)[0])
    assert curve.at(99) == pytest.approx(parabola(0.3, 2.0)[-1])


def test_values_further_than_an_octave_do_not_bend_the_parabola() -> None:
    losses = parabola(0.3, 2.0)
    losses[10:] = 50.0  # from 2 octaves on, 1.5 from the best of the grid
    curve = fit_curve(VALUES, seeds(losses))
    assert curve is not None
    assert curve.best == pytest.approx(0.3)
    coarse = [2.0**k for k in range(-6, 7, 2)]  # two octaves apart: the neighbours alone
    curve = fit_curve(coarse, seeds(1 + 0.1 * (np.log2(coarse) - 0.7) ** 2))
    assert curve is not None
    assert curve.best == pytest.approx(0.7)


def test_values_far_apart_are_no_parabola() -> None:
    """Of these runs (docs/results/mup/humanoid-wd-damping) factors of ten would say 0.07, where 0.2 is best."""
    fine, losses = [0.01, 0.03, 0.1, 0.3, 1.0], np.array([0.1023, 0.1011, 0.0977, 0.0950, 0.1070])
    curve = fit_curve(fine, seeds(losses))
    assert curve is not None
    assert 0.15 < 2**curve.best < 0.25
    coarse = fit_curve(fine[::2], seeds(losses[::2]))
    assert coarse is not None
    assert (2**coarse.best, coarse.least) == (pytest.approx(0.1), pytest.approx(0.0977))
    assert coarse.parabola is None


@pytest.mark.parametrize("cliff", [2.0, 5.0, 50.0, 1e4])
def test_a_cliff_within_an_octave_does_not_bend_the_parabola(cliff: float) -> None:
    """Over the whole octave it would have its vertex 0.3 octave lower, at a loss of 0.84 or, with 50, of -6.6."""
    slope = [1.3, 1.15, 1.05, 1.0, 0.98]
    curve = fit_curve(VALUES[2:11], np.array([*slope, 1.0, cliff, 2 * cliff, 4 * cliff])[:, None])
    assert curve is not None
    assert curve.parabola is not None
    assert curve.best == pytest.approx(0.0)
    assert curve.least == pytest.approx(0.98)
    assert curve.at(-0.75) == pytest.approx(1.025)  # beyond the neighbours straight, as beyond an octave elsewhere
    assert curve.at(1.0) == pytest.approx(cliff)
    # Next to the best value, it leaves nothing to fit.
    curve = fit_curve(VALUES[2:11], np.array([*slope, cliff, 2 * cliff, 4 * cliff, 8 * cliff])[:, None])
    assert curve is not None
    assert (curve.best, curve.least, curve.parabola, curve.at_edge) == (0.0, 0.98, None, False)


def test_a_noisy_basin_is_fitted_over_the_whole_octave() -> None:
    """Over more than the best value's neighbours, whose three numbers leave noise its way."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        y = parabola(rng.uniform(-1, 1), 1.0) + rng.normal(0, 0.02, len(VALUES))
        curve = fit_curve(VALUES, y[:, None])
        assert curve is not None
        assert curve.parabola is not None
        _, centre, low, high = curve.parabola
        assert (low, high) == pytest.approx((centre - 1, centre + 1))


@pytest.mark.parametrize(("best", "end"), [(-9.0, -3.0), (9.0, 3.0)])
def test_a_best_value_at_the_end_of_the_grid_is_said_to_be_there(best: float, end: float) -> None:
    curve = fit_curve(VALUES, seeds(parabola(best, 1.0)))
    assert curve is not None
    assert curve.at_edge
    assert curve.parabola is None
    assert curve.best == end


def test_beside_values_that_diverged_the_grid_has_the_last_word() -> None:
    losses = seeds(parabola(0.3, 2.0))
    losses[7, 1] = math.nan  # sqrt(2), one seed of three, would be best
    curve = fit_curve(VALUES, losses)
    assert curve is not None
    assert curve.best == 0.0
    assert curve.parabola is None
    assert not curve.at_edge
    assert curve.at(0.5) == math.inf
    assert curve.at(0.25) == math.inf
    assert math.isfinite(curve.at(0.0))
    assert fit_curve(VALUES, np.full((13, 3), math.inf)) is None


def test_a_hollow_that_is_none_is_not_fitted() -> None:
    """Flat or concave around the best value: no vertex to go to."""
    losses = np.array([3.0, 2.9, 1.0, 1.0 - 1e-9, 1.0, 2.9, 3.0])
    curve = fit_curve([2.0**k for k in range(7)], losses[:, None])
    assert curve is not None
    assert curve.best == pytest.approx(3.0)


def test_values_that_are_level_do_not_say_which_is_best() -> None:
    """A success rate of 0 everywhere, or of 1 at several."""
    assert fit_curve([1.0, 2.0, 4.0], np.full((3, 2), 1.0)) is None
    assert fit_curve([1.0, 2.0, 4.0], np.array([[1.0, 1.0], [1.0, 1.0], [1.0, math.inf]])) is None
    one = fit_curve([3.0], np.full((1, 2), 1.0))
    assert one is not None
    assert 2**one.best == pytest.approx(3.0)
    plateau = fit_curve(VALUES[:7], seeds(np.array([0.0, -0.5, -1.0, -1.0, -1.0, -0.5, 0.0])))
    assert plateau is not None
    assert (2**plateau.best, plateau.least) == (pytest.approx(VALUES[3]), -1.0)
    assert not plateau.at_edge
    to_the_end = fit_curve(VALUES[:5], seeds(np.array([0.0, -0.5, -1.0, -1.0, -1.0])))
    assert to_the_end is not None
    assert to_the_end.at_edge
    hopeless, ordinary = np.zeros((13, 3)), seeds(parabola(0.3, 2.0))
    narrow, wide = analyse(VALUES, {32: hopeless, 64: ordinary}, COMPUTE).widths
    assert (narrow.best, wide.drift, wide.regret, wide.wasted_compute) == (None,) * 4


def test_no_regret_is_negative() -> None:
    """Runs that lie below the parabola that is fitted to them."""
    noise = np.random.default_rng(0).normal(0, 0.02, (40, 13))
    for some in noise:
        losses = {32: seeds(parabola(0.0, 2.0) + some), 64: seeds(parabola(0.3, 1.9) + some[::-1])}
        wide = analyse(VALUES, losses, COMPUTE).widths[-1]
        assert wide.regret is not None
        assert wide.regret >= 0
        assert wide.wasted_compute is None or wide.wasted_compute >= 0


def test_drift_regret_and_what_it_is_worth() -> None:
    losses = {32: seeds(parabola(0.0, 4.0)), 64: seeds(parabola(0.25, 3.0)), 128: seeds(parabola(-0.5, 2.0))}
    narrow, middle, wide = (transfer := analyse(VALUES, losses, COMPUTE)).widths
    assert narrow.best == pytest.approx(1.0)
    assert (narrow.drift, narrow.regret, narrow.wasted_compute) == (0.0, 0.0, 0.0)
    assert middle.best == pytest.approx(2**0.25)
    assert middle.drift == pytest.approx(0.25)
    assert wide.drift == pytest.approx(-0.5)
    assert transfer.max_drift == pytest.approx(0.5)
    # 0.1 of curvature x the squared drift, relative to the best loss.
    assert middle.regret == pytest.approx(0.1 * 0.25**2 / 3)
    assert wide.regret == pytest.approx(0.1 * 0.5**2 / 2)
    # From 2 to 3, a quarter of the compute; 0.025 of that way, in the logarithm.
    assert wide.wasted_compute == pytest.approx(1 - 0.25**0.025)
    # Equal seeds are no spread.
    assert wide.drift_ci95 == pytest.approx((-0.5, -0.5))
    assert wide.best_ci95 == pytest.approx((2**-0.5, 2**-0.5))


def test_the_grids_regret_is_of_runs_alone() -> None:
    """Vertices 0.1 octave apart lie beside different values of a grid of half octaves."""
    row = analyse(VALUES, {32: seeds(parabola(0.2, 4.0)), 64: seeds(parabola(0.3, 3.0))}, COMPUTE).widths[1]
    assert row.drift == pytest.approx(0.1)
    assert row.grid_regret == pytest.approx((3 + 0.1 * 0.3**2) / (3 + 0.1 * 0.2**2) - 1)
    assert row.grid_regret_ci95 == pytest.approx((row.grid_regret, row.grid_regret))
    diverged = parabola(0.3, 3.0)
    diverged[6] = math.nan  # what is best for the narrow one
    row = analyse(VALUES, {32: seeds(parabola(0.2, 4.0)), 64: seeds(diverged)}, COMPUTE).widths[1]
    assert row.grid_regret == math.inf


def test_the_grids_regret_is_that_of_the_best_value_that_is_told() -> None:
    """Success rates are often level: the middle one of these values is the best, and costs nothing here."""
    narrow, wide = np.array([0.0, -1.0, -1.0, -1.0, 0.0]), np.array([0.0, -0.5, -1.0, -0.5, 0.0])
    row = analyse(VALUES[:5], {32: seeds(narrow), 64: seeds(wide)}, COMPUTE).widths[1]
    assert (row.drift, row.regret, row.grid_regret) == (0.0, 0.0, 0.0)


def test_regret_beyond_all_that_width_gains_is_bounded_by_the_narrowest() -> None:
    losses = {32: seeds(parabola(-2.0, 2.1)), 64: seeds(parabola(0.0, 2.05)), 128: seeds(parabola(1.0, 2.0))}
    wide = analyse(VALUES, losses, COMPUTE).widths[-1]
    assert wide.wasted_compute == pytest.approx(1 - 1 / 16)
    # Where the wider network is no better, there is nothing to measure in.
    losses[64] = seeds(parabola(0.0, 1.9))
    assert analyse(VALUES, losses, COMPUTE).widths[-1].wasted_compute is None


def test_intervals_are_those_of_all_draws_of_seeds() -> None:
    """Two seeds with their best values at 0 and 1 octaves: means of a draw lie at 0, 1/2 and 1, in 1 : 2 : 1."""
    split = np.stack([parabola(0.0, 1.0), parabola(1.0, 1.0)], axis=1)
    losses = {32: seeds(parabola(0.0, 2.0), (0.0, 0.0)), 64: split, 128: split}
    _, middle, _ = (transfer := analyse(VALUES, losses, COMPUTE)).widths
    assert middle.drift == pytest.approx(0.5)
    assert middle.drift_ci95 == pytest.approx((0.0, 1.0))
    # Regret of a draw: 0.1 x (0, 1/4, 1) over its least, which is 1 or, of the mixed draw, 1.025.
    assert middle.regret == pytest.approx(0.1 * 0.25 / 1.025)
    assert middle.regret_ci95 == pytest.approx((0.0, 0.1))
    # The larger of two independent drifts of that kind: 0 in 1 of 16 draws.
    draws = [max(a, b) for a, b in product((0.0, 0.5, 0.5, 1.0), repeat=2)]
    assert transfer.max_drift_ci95 == pytest.approx(
        (np.quantile(draws, 0.025, method="nearest"), np.quantile(draws, 0.975, method="nearest"))
    )
    # What shifts all losses of a seed does not blur where they are lowest.
    shifted = {width: seeds(parabola(0.25, 1.0), (0.0, 5.0, 9.0)) for width in (32, 64)}
    assert analyse(VALUES, shifted, COMPUTE).widths[1].drift_ci95 == pytest.approx((0.0, 0.0), abs=1e-9)


def test_one_seed_has_no_interval() -> None:
    losses = {width: parabola(0.0, 1.0)[:, None] for width in (32, 64)}
    transfer = analyse(VALUES, losses, COMPUTE)
    assert transfer.widths[1].drift == pytest.approx(0.0)
    assert transfer.widths[1].drift_ci95 is None
    assert transfer.max_drift_ci95 is None


def test_a_width_that_never_trained_says_nothing_and_spoils_nothing() -> None:
    losses = {32: seeds(parabola(0.0, 2.0)), 64: np.full((13, 3), math.nan), 128: seeds(parabola(0.25, 1.0))}
    _, dead, wide = (transfer := analyse(VALUES, losses, COMPUTE)).widths
    assert (dead.best, dead.loss, dead.drift, dead.regret, dead.best_ci95) == (None,) * 5
    assert wide.drift == pytest.approx(0.25)
    assert wide.wasted_compute is None
    assert transfer.max_drift is None
    losses[32] = losses[64]
    assert [row.drift for row in analyse(VALUES, losses, COMPUTE).widths] == [None] * 3


def test_a_zero_shot_value_that_diverges_is_infinitely_bad() -> None:
    wide = seeds(parabola(-1.0, 1.0))
    wide[6:] = math.inf
    row = analyse(VALUES, {32: seeds(parabola(1.0, 2.0)), 64: wide}, COMPUTE).widths[1]
    assert row.regret == math.inf
    assert row.drift == pytest.approx(-2.0)
    assert row.regret_ci95 is None
    assert row.wasted_compute == pytest.approx(0.75)


def test_more_is_better_with_its_sign_changed() -> None:
    """Returns of 100 at best: 3 below at the narrow network's value."""
    losses = {32: -seeds(100 - 3 * np.log2(VALUES) ** 2), 64: -seeds(100 - 3 * (np.log2(VALUES) - 1) ** 2)}
    row = analyse(VALUES, losses, COMPUTE).widths[1]
    assert row.drift == pytest.approx(1.0)
    assert row.regret == pytest.approx(0.03)


CENTRE = Point(1e-3, 1e-5, 0.01)


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_a_roles_share_reaches_the_run_as_the_optimizer_knows_it(name: str, role: str) -> None:
    point = replace(CENTRE, **{name: 0.25})
    assert f"--model.optimizer.lr_by_role.{role}=0.25" in point.arguments()
    assert point.put_into({"model": {"optimizer": {}}, "trainer": {"callbacks": [{"init_args": {}}]}})["model"] == {
        "optimizer": {"lr": 1e-3, "weight_decay": 1e-5, "lr_by_role": {role: 0.25}}
    }
    assert role in get_args(Role)


def test_lines_cross_at_the_centre_and_products_fill_the_plane() -> None:
    values = {"lr": [5e-4, 1e-3, 2e-3], "damping": [0.01, 0.1]}
    lines = points(CENTRE, values, product=False)
    assert lines == [*(Point(lr, 1e-5, 0.01) for lr in values["lr"]), Point(1e-3, 1e-5, 0.1)]
    assert candidates("lr", 5e-4, CENTRE, lines, product=False) == [Point(5e-4, 1e-5, 0.01)]
    plane = points(CENTRE, values, product=True)
    assert plane == [Point(lr, 1e-5, damping) for lr in values["lr"] for damping in values["damping"]]
    assert candidates("lr", 5e-4, CENTRE, plane, product=True) == [Point(5e-4, 1e-5, d) for d in (0.01, 0.1)]


def test_all_that_scales_keeps_its_proportions() -> None:
    unet = {"channels": [128, 256, 512], "condition_dim": 256, "groups": 8}
    scales = ("channels", "condition_dim")
    assert scaled(unet, scales, 32) == {"channels": [32, 64, 128], "condition_dim": 64}
    assert scaled(unet, scales, 512) == {"channels": [512, 1024, 2048], "condition_dim": 1024}
    assert scaled({"width": 96, "encoder_width": 36, "depth": 2}, ("width", "encoder_width"), 64) == {
        "width": 64,
        "encoder_width": 24,
    }
    with pytest.raises(UserError, match=r"--widths 20: encoder_width would be 36 x 20 / 96.*multiples of 8"):
        scaled({"width": 96, "encoder_width": 36}, ("width", "encoder_width"), 20)


def transfer(name: str, best: float, **more: Any) -> dict[str, Any]:
    row = {"width": 64, "best": best, "best_ci95": None, "at_edge": False, "numbers": [[1.0]] * 3}
    return {"parametrization": "mup", "hyperparameter": name, "metric": "val_loss", "widths": [row | more]}


def test_what_was_found_one_by_one_is_said_if_it_lies_far_from_the_centre() -> None:
    centre = Point(0.01, 0.1, None)
    near, far = transfer("lr", 0.012), transfer("lr", 0.02)
    decay = transfer("weight_decay", 0.4)
    for transfers, together, expected in (
        ([far, decay], False, ["lr", "weight_decay"]),
        ([far, decay], True, []),
        ([near, decay], False, []),
        ([far], False, []),
    ):
        best = best_point(transfers, centre, "val_loss")
        assert best is not None
        assert apart(transfers, best, centre, together) == expected
    undecayed = replace(centre, weight_decay=0.0)
    best = best_point([far, decay], undecayed, "val_loss")
    assert best is not None
    assert apart([far, decay], best, undecayed, False) == ["lr", "weight_decay"]


def test_rollouts_that_would_choose_otherwise_are_said() -> None:
    by_loss = transfer("lr", 0.012, best_ci95=(0.010, 0.014))
    centre = Point(0.01, 0.1, None)
    best = best_point([by_loss], centre, "val_loss")
    assert best is not None
    for value, expected in ((0.013, []), (0.008, ["learning rate 0.008 at width 64, by return"])):
        by_return = transfer("lr", value) | {"metric": "return"}
        assert judged_otherwise([by_loss, by_return], best, "val_loss") == expected
    # And the other way round.
    transfers = [by_loss, transfer("lr", 0.008, best_ci95=(0.007, 0.009)) | {"metric": "return"}]
    best = best_point(transfers, centre, "return")
    assert best == Point(0.008, 0.1, None)
    said = ["learning rate 0.012 at width 64, by validation loss"]
    assert judged_otherwise(transfers, best, "return") == said


def test_newer_options_that_are_off_are_no_difference() -> None:
    old = {"dopr": {"ema": 0.9}, "lr": 0}
    assert differences(old, {"dopr": {"ema": 0.9, "overlap": False, "other": None}, "lr": 0}) == ""
    assert differences({"dopr": {"ema": 0.9, "overlap": False}, "lr": 0}, old) == ""
    assert differences(old, {"dopr": {"ema": 0.9, "overlap": True}, "lr": 0}) == "dopr.overlap: unset -> True"
    assert differences({"bias": True}, {"bias": False}) == "bias: True -> False"
    assert differences({}, {"lr": 0}) == "lr: unset -> 0"
