"""The base optimizers against their papers' equations, written here in numpy, and against closed forms."""

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module
from torch.optim.lr_scheduler import LambdaLR

from dopr_lightning.mup.rules import MatrixGrowth
from dopr_lightning.optim import BASES, make_optimizer
from dopr_lightning.optim import muon as muon_module
from dopr_lightning.optim.adamuon import AdaMuon
from dopr_lightning.optim.bases import resolve

Array = NDArray[np.float64]
Step = Callable[[Array, Array, float, int, dict[str, Any]], Array]
"""(weight, gradient, learning rate, step from 1, state) -> weight."""

DECAY = 0.3
RATES = (0.1, 0.05, 0.2, 0.02, 0.1, 0.07, 0.03)


# --- the papers' equations ------------------------------------------------------------------------------------------


def adamw(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["v"] = 0.999 * s.get("v", 0) + 0.001 * g**2
    return w - lr * DECAY * w - lr * s["m"] / (1 - 0.9**t) / (np.sqrt(s["v"] / (1 - 0.999**t)) + 1e-8)


def sgd(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
    s["m"] = 0.9 * s.get("m", 0) + g + DECAY * w
    return w - lr * s["m"]


def signum(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    return w - lr * (np.sign(s["m"]) + DECAY * w)


def lion(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
    m = s.get("m", 0)
    s["m"] = 0.99 * m + 0.01 * g
    return w - lr * (np.sign(0.9 * m + 0.1 * g) + DECAY * w)


def newton_schulz(matrix: Array) -> Array:
    """What five steps of the iteration do to the singular values, one by one."""
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / np.linalg.norm(sigma)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return u @ np.diag(sigma) @ vt


def muon(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
    matrix = g.reshape(len(g), -1)
    s["m"] = 0.95 * s.get("m", 0) + 0.05 * matrix
    update = 0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(0.05 * matrix + 0.95 * s["m"])
    return w - lr * (update.reshape(w.shape) + DECAY * w)


def adamuon_with(nesterov: bool) -> Step:
    def step(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
        matrix = g.reshape(len(g), -1)
        s["m"] = 0.95 * s.get("m", 0) + matrix
        o = newton_schulz(np.sign(matrix + 0.95 * s["m"] if nesterov else s["m"]))
        s["v"] = 0.95 * s.get("v", 0) + 0.05 * o**2
        o = o / (np.sqrt(s["v"]) + 1e-8)
        update = 0.2 * math.sqrt(o.size) / np.linalg.norm(o) * o
        return w - lr * (update.reshape(w.shape) + DECAY * w)

    return step


def soap_every(frequency: int) -> Step:
    """Algorithm 3 of the paper, for tensors: a basis per dimension. The first step only starts the averages."""

    def unfold(x: Array, dim: int) -> Array:
        return np.moveaxis(x, dim, 0).reshape(x.shape[dim], -1)

    def rotate(x: Array, bases: list[Array]) -> Array:
        for dim, q in enumerate(bases):
            x = np.moveaxis(np.tensordot(q, x, axes=(1, dim)), 0, dim)
        return x

    def step(w: Array, g: Array, lr: float, t: int, s: dict[str, Any]) -> Array:
        if t == 1:
            s["m"], s["v"] = np.zeros_like(w), np.zeros_like(w)
            s["L"] = [0.05 * unfold(g, dim) @ unfold(g, dim).T for dim in range(g.ndim)]
            s["Q"] = [np.linalg.eigh(covariance)[1] for covariance in s["L"]]
            return w
        t -= 1
        into = [q.T for q in s["Q"]]
        s["m"] = 0.95 * s["m"] + 0.05 * g
        s["v"] = 0.95 * s["v"] + 0.05 * rotate(g, into) ** 2
        m, v = rotate(s["m"], into) / (1 - 0.95**t), s["v"] / (1 - 0.95**t)
        # The authors' code corrects the bias in the rate, which eps then sees: with 1e-8 of no account.
        w = (1 - lr * DECAY) * (w - lr * rotate(m / (np.sqrt(v) + 1e-8), s["Q"]))
        s["L"] = [0.95 * old + 0.05 * unfold(g, dim) @ unfold(g, dim).T for dim, old in enumerate(s["L"])]
        if t % frequency == 0:
            for dim, covariance in enumerate(s["L"]):
                power = covariance @ s["Q"][dim]
                order = np.argsort(-np.einsum("ij,ij->j", s["Q"][dim], power))
                s["Q"][dim] = np.linalg.qr(power[:, order])[0]
                s["v"] = np.take(s["v"], order, axis=dim)
        return w

    return step


# --- against them ---------------------------------------------------------------------------------------------------


def weight(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def gradient(shape: tuple[int, ...], step: int) -> Array:
    """Neither all noise nor all one direction."""
    return weight(shape, 100) + 0.7 * weight(shape, 1 + step)


def layer(value: Array) -> nn.Module:
    """A hidden layer, and nothing else, with this weight."""
    kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
    module = kinds[value.ndim](value.shape[1], value.shape[0], *value.shape[2:][:1], bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(value))
    return module


ANY = [(6, 4), (4, 6), (5, 3, 2)]
FULL = [(5, 5), (4, 3, 2)]
"""Of full rank however unfolded: SOAP's bases are not unique beyond the rank of its first gradient."""


@pytest.mark.parametrize(
    ("base", "options", "step", "tolerance", "shape"),
    [
        (*case, shape)
        for *case, shapes in [
            ("adamw", {}, adamw, 1e-12, ANY),
            ("sgd", {}, sgd, 1e-12, ANY),
            ("signum", {}, signum, 1e-12, ANY),
            ("signum", {"foreach": False}, signum, 1e-12, ANY),
            ("lion", {}, lion, 1e-12, ANY),
            ("lion", {"foreach": False}, lion, 1e-12, ANY),
            ("muon", {}, muon, 1e-9, ANY),
            ("adamuon", {}, adamuon_with(nesterov=False), 1e-9, ANY),
            ("adamuon", {"nesterov": True}, adamuon_with(nesterov=True), 1e-9, ANY),
            ("soap", {}, soap_every(10), 1e-6, FULL),
            ("soap", {"precondition_frequency": 2}, soap_every(2), 1e-5, FULL),  # its QR is in float32
        ]
        for shape in shapes
    ],
)
def test_steps_are_the_papers(
    base: str, options: dict[str, Any], step: Step, tolerance: float, shape: tuple[int, ...]
) -> None:
    w = weight(shape)
    module = layer(w)
    optimizer = make_optimizer(module, base, lr=1.0, weight_decay=DECAY, **options)
    scheduler = LambdaLR(optimizer, lambda t: RATES[min(t, len(RATES) - 1)])
    state: dict[str, Any] = {}
    for t, lr in enumerate(RATES):
        module.weight.grad = torch.from_numpy(gradient(shape, t))
        optimizer.step()
        scheduler.step()
        w = step(w, gradient(shape, t), lr, t + 1, state)
        np.testing.assert_allclose(module.weight.detach().numpy(), w, rtol=0, atol=tolerance)


def test_nesterov_is_another_step() -> None:
    """So that the test above can tell them apart."""
    states: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    w, shape = [weight((6, 4))] * 2, (6, 4)
    for t in range(3):
        g = gradient(shape, t) * (-1) ** t
        w = [adamuon_with(n)(x, g, 0.1, t + 1, s) for n, x, s in zip((False, True), w, states, strict=True)]
    assert np.abs(w[0] - w[1]).max() > 0.01


# --- AdaMuon --------------------------------------------------------------------------------------------------------


def update(options: dict[str, Any], gradients: list[Tensor]) -> Tensor:
    """The last step of AdaMuon, per unit of the learning rate."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = AdaMuon([parameter], lr=1.0, **options)
    for g in gradients:
        before = parameter.detach().clone()
        parameter.grad = g
        optimizer.step()
    return before - parameter.detach()


def signs(n: int) -> Tensor:
    """As many plus as minus, orthogonal to a vector of ones."""
    return torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64).repeat(n // 4)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_an_update_of_rank_one_has_the_closed_form(shape: tuple[int, int]) -> None:
    """All entries are of one size, so that scaling to an RMS leaves a spectral norm of 0.2 sqrt(A B)."""
    g = 0.01 * torch.outer(signs(shape[0]), signs(shape[1]))
    torch.testing.assert_close(update({}, [g]), 0.2 * g.sign())
    torch.testing.assert_close(update({"scale": "spectral"}, [g]), 0.2 * g.sign() / math.sqrt(min(shape)))


@pytest.mark.parametrize("shape", [(12, 16), (16, 12)])
def test_a_spectral_scale_sets_the_spectral_norm(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    fixed = torch.randn(shape, dtype=torch.float64)
    target = 0.2 * 4
    rms, spectral = (update({"scale": scale}, [fixed] * 30) for scale in ("rms", "spectral"))
    torch.testing.assert_close(spectral / spectral.norm(), rms / rms.norm())
    assert torch.linalg.matrix_norm(spectral, 2).item() == pytest.approx(target, rel=1e-3)
    assert torch.linalg.matrix_norm(rms, 2) > 1.2 * target
    # Gradients that change: the direction is followed, and not overtaken.
    changing = [fixed + torch.randn(shape, dtype=torch.float64) for _ in range(20)]
    for steps in (1, 2, 10, 20):
        rms, spectral = (update({"scale": scale}, changing[:steps]) for scale in ("rms", "spectral"))
        assert target * 0.999 < torch.linalg.matrix_norm(spectral, 2) < 1.2 * target
        assert spectral.norm() <= rms.norm()


def test_a_direction_that_misses_the_matrix_makes_no_large_update() -> None:
    """What is known of the spectral norm without it is that of the paper's scale."""
    parameter = nn.Parameter(torch.zeros(8, 20, dtype=torch.float64))
    optimizer = AdaMuon([parameter], lr=1.0, scale="spectral")
    parameter.grad = torch.outer(signs(8), signs(20))
    optimizer.step()
    optimizer.state[parameter]["direction"].fill_(20**-0.5)  # ones: orthogonal to every row
    before = parameter.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - parameter.detach(), 0.2 * parameter.grad)


@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("most", [2**24, 24, 1])
def test_parameters_step_together_as_they_do_alone(scale: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shapes, mixed, stacked whole, in twos (24 entries) or one by one; a kernel goes with a matrix."""
    monkeypatch.setattr(muon_module, "_STACK", most)
    shapes = [(3, 4), (5, 2), (3, 2, 2), (3, 4), (3, 4), (5, 2)]
    together = [nn.Parameter(torch.from_numpy(weight(s, k))) for k, s in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().flatten(1).clone()) for p in together]
    optimizers = [AdaMuon(together, scale=scale, weight_decay=0.1)]  # type: ignore[arg-type]
    optimizers += [AdaMuon([p], scale=scale, weight_decay=0.1) for p in alone]  # type: ignore[arg-type]
    for t in range(3):
        for k, (a, b) in enumerate(zip(together, alone, strict=True)):
            a.grad = torch.from_numpy(gradient(shapes[k], 10 * k + t))
            b.grad = a.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.flatten(1), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["rms", "spectral"])
def test_no_gradient_is_no_step(scale: str) -> None:
    start = torch.randn(4, 3)
    dead, fed, skipped = (nn.Parameter(start.clone()) for _ in range(3))
    optimizer = AdaMuon([dead, fed, skipped], lr=0.1, scale=scale)  # type: ignore[arg-type]
    for _ in range(3):
        dead.grad, fed.grad = torch.zeros(4, 3), torch.ones(4, 3)
        optimizer.step()
    assert torch.equal(dead, start)
    assert torch.equal(skipped, start)
    torch.testing.assert_close(fed, start - 3 * 0.1 * 0.2 / (1 if scale == "rms" else math.sqrt(3)))
    # Gradients that come at last are taken as if the first.
    dead.grad = torch.ones(4, 3)
    optimizer.step()
    torch.testing.assert_close(dead, start - 0.1 * 0.2 / (1 if scale == "rms" else math.sqrt(3)))


@pytest.mark.parametrize("base", ["muon", "adamuon"])
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_an_empty_matrix_is_passed_over(base: str, sizes: tuple[int, int]) -> None:
    """Of a condition that a task may do without."""
    model = nn.ParameterDict({"empty": torch.zeros(sizes), "fed": torch.ones(3, 4)})
    optimizer = make_optimizer(model, base, lr=0.1, roles={"*": "hidden"})
    for parameter in model.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (model["fed"] < 1).all()


@pytest.mark.parametrize(
    ("parameter", "options", "message"),
    [
        (torch.zeros(3), {}, r"AdaMuon takes matrices, not a parameter of shape \(3,\)"),
        (torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last), {}, "which its memory layout"),
        (torch.zeros(3, 3), {"scale": "rsm"}, "unknown scale 'rsm'; choose from rms, spectral"),
        (torch.zeros(3, 3), {"momentum": 1.0}, "momentum be in"),
        (torch.zeros(3, 3), {"weight_decay": -1.0}, "weight_decay and eps must not be negative"),
    ],
)
def test_adamuon_refuses(parameter: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaMuon([nn.Parameter(parameter)], **options)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("signum", {}),
        ("lion", {}),
        ("adamuon", {}),
        ("adamuon", {"scale": "spectral"}),
        ("adamuon", {"nesterov": True}),
    ],
)
def test_a_step_never_waits_for_the_device(base: str, options: dict[str, Any]) -> None:
    """Fake tensors hold no values: whatever would read one on the host is an error."""
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
        optimizer = resolve(base).algorithm(parameters, lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.zeros(4, 3)
            optimizer.step()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"scale": "spectral"}])
def test_adamuon_steps_parameters_that_fsdp2_shards(options: dict[str, Any], mesh: DeviceMesh) -> None:
    values = [torch.from_numpy(weight((6, 4), k)) for k in range(3)]
    whole = [nn.Parameter(v.clone()) for v in values]
    sharded = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for v in values]
    for parameters in (whole, sharded):
        optimizer = AdaMuon(parameters, lr=0.1, weight_decay=0.1, **options)
        for t in range(3):
            for k, p in enumerate(parameters):
                g = torch.from_numpy(gradient((6, 4), 10 * k + t))
                p.grad = distribute_tensor(g, mesh, [Shard(0)]) if parameters is sharded else g
            optimizer.step()
    for a, b in zip(whole, sharded, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().full_tensor())  # type: ignore[attr-defined]


def test_soap_refuses_parameters_that_fsdp2_shards(mesh: DeviceMesh) -> None:
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="SOAP needs whole matrices, which FSDP2 shards"):
        resolve("soap").algorithm([parameter], lr=0.1)


def test_soap_refuses_a_rate_in_a_tensor() -> None:
    """Which the library would change in every step, until the loss is 1e18."""
    with pytest.raises(ValueError, match=r"SOAP needs a learning rate that is a number, not a tensor; lr=float\(lr\)"):
        make_optimizer(Net(), "soap", lr=torch.tensor(1e-3))  # type: ignore[arg-type]


# --- all bases ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.readout = nn.Linear(8, 2)

    def forward(self, token: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embedding(token).mT).mT)
        return self.readout(self.norm(torch.tanh(self.hidden(h))))


TOKENS = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])
TARGET = torch.tensor([[[1.0, -1.0]] * 4, [[-0.5, 2.0]] * 4])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(TOKENS) - TARGET).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


ALL = [*((name, {}) for name in BASES), ("adamuon", {"scale": "spectral"}), ("soap", {"precondition_frequency": 2})]


def start(base: str, options: dict[str, Any]) -> tuple[Net, torch.optim.Optimizer, LambdaLR]:
    model = Net()
    optimizer = make_optimizer(model, base, lr=0.01, weight_decay=0.1, **options)
    return model, optimizer, LambdaLR(optimizer, lambda t: 1 / (1 + 0.1 * t))


@pytest.mark.parametrize(("base", "options"), ALL)
def test_every_base_trains(base: str, options: dict[str, Any]) -> None:
    first = train(*start(base, options), 1)
    assert train(*start(base, options), 40) < 0.5 * first


@pytest.mark.parametrize(("base", "options"), ALL)
def test_resuming_from_a_checkpoint_file_is_bit_identical(base: str, options: dict[str, Any]) -> None:
    whole = start(base, options)
    train(*whole, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    train(*whole, 8)

    resumed = start(base, options)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, 8)
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("base", [base for base in BASES if base != "soap"])
def test_tensor_parallelism_of_some_layers_steps_like_none(base: str, mesh: DeviceMesh) -> None:
    """The others are not sharded, and no one kernel takes both."""

    def trained(plan: dict[str, ParallelStyle]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
        optimizer = make_optimizer(parallelize_module(model, mesh, plan), base, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.eye(8)).square().mean().backward()
            optimizer.step()
        return {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}

    expected = trained({})
    for name, value in trained({"2": ColwiseParallel(output_layouts=Replicate())}).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(("one", "other"), permutations(BASES, 2))
def test_a_checkpoint_of_another_base_is_refused(one: str, other: str) -> None:
    """By name, and not as what a step then lacks."""
    theirs, ours = start(one, {}), start(other, {})
    train(*theirs, 2)
    with pytest.raises(ValueError, match=r"resume with the base (and the roles )?that the run was started with, or"):
        ours[1].load_state_dict(theirs[1].state_dict())


@pytest.mark.parametrize(("base", "options"), ALL)
def test_a_copied_base_steps_like_the_original(base: str, options: dict[str, Any]) -> None:
    run = start(base, options)
    train(*run, 3)
    twin = copy.deepcopy(run)
    train(*run, 3)
    train(*twin, 3)
    for a, b in zip(run[0].parameters(), twin[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("base", BASES)
def test_unknown_options_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match=r"does not accept these options: .*'momentums'"):
        make_optimizer(Net(), base, lr=0.01, momentums=0.9)


@pytest.mark.parametrize(
    ("base", "options", "tolerance"),
    [
        ("adamw", {}, 1e-6),
        ("signum", {}, 1e-6),
        ("lion", {}, 1e-6),
        ("adamuon", {"scale": "spectral"}, 1e-6),
        ("muon", {}, 0.02),  # in bfloat16
        ("muon", {"adjust_lr_fn": "original"}, 0.02),
    ],
)
@pytest.mark.parametrize(("rows", "cols"), [(64, 32), (16, 64), (64, 16)])
def test_an_update_of_rank_one_grows_as_the_base_says(
    base: str, options: dict[str, Any], tolerance: float, rows: int, cols: int
) -> None:
    def norm(shape: tuple[int, int]) -> float:
        module = layer(np.zeros(shape))
        module.weight.grad = torch.outer(signs(shape[0]), signs(shape[1]))
        make_optimizer(module, base, lr=1.0, **options).step()
        return torch.linalg.matrix_norm(module.weight.detach(), 2).item()

    chosen = resolve(base)
    assert chosen.growth is not None
    said = chosen.growth(MatrixGrowth(rows, cols, rows / 16, cols / 16), {**chosen.options, **options})
    assert norm((rows, cols)) / norm((16, 16)) == pytest.approx(said, rel=tolerance)


def test_adamuons_updates_of_full_rank_grow_as_its_base_says() -> None:
    """The paper's scale: an exponent of 1/2 within the tolerance of a coordinate check."""
    widths, norms = (32, 256), []
    for n in widths:
        torch.manual_seed(0)
        signal = torch.randn(n, 16) @ torch.randn(16, n) / 4
        norms.append(torch.linalg.matrix_norm(update({}, [signal + torch.randn(n, n) for _ in range(5)]), 2).item())
    said = resolve("adamuon").growth(MatrixGrowth(256, 256, 8, 8), {})  # type: ignore[misc]
    assert math.log(norms[1] / norms[0] / said, 8) == pytest.approx(0, abs=0.15)


def test_soaps_updates_grow_as_its_base_says_where_they_grow_most() -> None:
    """Like the width in directions that are new to its eigenbases, where all entries are of one size; not at all in
    those that it knows, where an entry stands for each. No exponent fits both, and the greater one is safe."""

    def norm(n: int, second: int) -> float:
        """Of the step for the second gradient, of the same directions as the first or not; the first moves nothing."""
        parameter = nn.Parameter(torch.zeros(n, n, dtype=torch.float64))
        optimizer = resolve("soap").algorithm([parameter], lr=1.0)
        for seed in (0, second):
            draw = np.random.default_rng(seed).normal
            parameter.grad = torch.from_numpy(draw(size=(n, 4)) @ draw(size=(4, n)))
            optimizer.step()
        return torch.linalg.matrix_norm(parameter.detach(), 2).item()

    said = resolve("soap").growth(MatrixGrowth(256, 256, 8, 8), {})  # type: ignore[misc]
    known, new = (norm(256, second) / norm(32, second) for second in (0, 1))
    assert known == pytest.approx(1, rel=0.1)
    assert new == pytest.approx(said, rel=0.2)


def test_the_library_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, dopr_lightning.optim; assert 'pytorch_optimizer' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
