"""Work on many small matrices, by several threads."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

from dopr_lightning.preconditioner.threads import side_by_side, threads


def matrices(count: int) -> Tensor:
    rows = torch.randn(count, 12, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    return rows.mT @ rows


@pytest.mark.parametrize("count", [1, 2, 3, 16])
@pytest.mark.parametrize("blocks", [1, 3, 4, 7, 32])
def test_threads_do_not_change_the_result(blocks: int, count: int) -> None:
    expected = torch.linalg.eigh(matrices(blocks))
    for found, wanted in zip(side_by_side(torch.linalg.eigh, matrices(blocks), count), expected, strict=True):
        assert torch.equal(found, wanted)


def test_each_thread_has_at_least_two_matrices() -> None:
    seen: dict[int, list[int]] = {}
    together = threading.Barrier(3)

    def note(part: Tensor) -> tuple[Tensor]:
        seen.setdefault(threading.get_ident(), []).append(len(part))
        together.wait(timeout=30)  # raises where fewer threads work at once
        return (part,)

    side_by_side(note, matrices(7), 8)
    assert sorted(size for sizes in seen.values() for size in sizes) == [2, 2, 3]


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        side_by_side(lambda part: (torch.linalg.cholesky(part),), -matrices(8), 2)


def _in_child(queue: multiprocessing.Queue[int]) -> None:
    queue.put(len(side_by_side(torch.linalg.eigh, matrices(8), 2)[0]))


def test_a_forked_process_has_threads_of_its_own() -> None:
    side_by_side(torch.linalg.eigh, matrices(8), 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == 8
    child.join()


def _divide() -> None:
    with threads(1):
        assert torch.get_num_threads() == 1
        _ = 1 / 0


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        _divide()
    assert torch.get_num_threads() == before
