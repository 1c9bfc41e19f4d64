"""Work on many small matrices, by several threads."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

from dopr_lightning.preconditioner.threads import side_by_side, threads


def matrices(count: int, size: int = 8) -> Tensor:
    rows = torch.randn(count, size + 4, size, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    return rows.mT @ rows


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize(("blocks", "size"), [(1, 8), (3, 8), (4, 8), (7, 8), (32, 8), (9, 96), (12, 160)])
def test_threads_do_not_change_a_bit_of_the_result(blocks: int, size: int, count: int) -> None:
    with threads(3):  # else LAPACK might have a single one anyway
        with threads(1):
            x = matrices(blocks, size)
            expected = torch.linalg.eigh(x)
        result = side_by_side(torch.linalg.eigh, x, count)
        assert torch.get_num_threads() == 3
    for found, wanted in zip(result, expected, strict=True):
        assert torch.equal(found, wanted)


def test_every_thread_has_its_share() -> None:
    seen: dict[int, list[int]] = {}
    together = threading.Barrier(3)

    def note(part: Tensor) -> tuple[Tensor]:
        seen.setdefault(threading.get_ident(), []).append(len(part))
        together.wait(timeout=30)  # raises where fewer threads work at once
        return (part,)

    side_by_side(note, matrices(8), 3)
    assert sorted(size for sizes in seen.values() for size in sizes) == [2, 3, 3]


def test_no_thread_goes_without() -> None:
    sizes: list[int] = []

    def note(part: Tensor) -> tuple[Tensor]:
        sizes.append(len(part))
        return (part,)

    side_by_side(note, torch.zeros(2), 8)
    assert sizes == [1, 1]


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        side_by_side(lambda part: (torch.linalg.cholesky(part),), -matrices(8), 2)


def _in_child(queue: multiprocessing.Queue[int]) -> None:
    with threads(1):  # OpenMP's threads, too, have not been forked
        queue.put(len(side_by_side(lambda part: (part + 1,), matrices(8), 2)[0]))


def test_a_forked_process_has_threads_of_its_own() -> None:
    with threads(1):
        side_by_side(lambda part: (part + 1,), matrices(8), 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == 8
    finally:
        child.kill()


def _divide() -> None:
    with threads(1):
        assert torch.get_num_threads() == 1
        _ = 1 / 0


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        _divide()
    assert torch.get_num_threads() == before
