"""`Snapshot.map`: results and exceptions in order, a hang among the inputs, and progress.

Covers python/pyvmm/parallel.py.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from guests import SPIN, echo_until, flat, print_text
from pyvmm import Snapshot, Vmm

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]
DEADLINE_S = 60


@pytest.fixture
def prompt() -> Iterator[Snapshot]:
    """A guest that echoes what is typed, at its prompt."""
    with Vmm(flat(print_text(b"> ") + echo_until(ord("!")))) as vmm:
        vmm.run_until("> ", DEADLINE_S)
        yield vmm.snapshot()


def job(vmm: Vmm, text: str) -> str:
    """Type a text and return what the guest answers; some texts raise or hang."""
    if text == "raise":
        raise ZeroDivisionError(text)
    if text == "exit":
        raise SystemExit(text)
    vmm.serial.send(text.encode())
    return vmm.run_until("never" if text == "hang" else text[-1:], DEADLINE_S).before + text[-1:]


def test_exceptions_are_results_in_order_and_the_others_continue(prompt: Snapshot) -> None:
    inputs = ["hang", "a", "raise", "bc", "exit", "d"]
    found = prompt.map(job, inputs, workers=2, timeout=2, return_exceptions=True)
    kinds = [type(one) if isinstance(one, BaseException) else one for one in found]
    assert kinds == [TimeoutError, "a", ZeroDivisionError, "bc", SystemExit, "d"]


def test_first_exception_is_raised_otherwise(prompt: Snapshot) -> None:
    with pytest.raises(ZeroDivisionError):
        prompt.map(job, ["a", "raise", "b"], workers=1)
    with pytest.raises(TimeoutError):
        prompt.map(job, ["hang", "a"], workers=2, timeout=0.5)


def test_result_that_is_an_exception_is_a_result(prompt: Snapshot) -> None:
    for is_returned in (False, True):
        found = prompt.map(lambda _vmm, number: ValueError(number), [1, 2], return_exceptions=is_returned)
        assert [str(one) for one in found] == ["1", "2"]


@pytest.mark.parametrize("is_returned", [False, True])
def test_progress_counts_each_job_on_the_callers_thread(prompt: Snapshot, is_returned: bool) -> None:
    calls: list[tuple[int, int, int]] = []

    def tell(done: int, total: int) -> None:
        calls.append((done, total, threading.get_ident()))

    inputs = ["a", "raise", "b"] if is_returned else ["a", "b", "c"]
    prompt.map(job, inputs, workers=2, return_exceptions=is_returned, progress=tell)
    assert calls == [(done, 3, threading.get_ident()) for done in (1, 2, 3)]
    calls.clear()
    assert prompt.map(job, [], progress=tell) == []
    assert calls == []


def test_progress_may_end_the_call(prompt: Snapshot) -> None:
    def tell(done: int, total: int) -> None:
        raise LookupError(f"{done} of {total}")

    with pytest.raises(LookupError, match="1 of 3"):
        prompt.map(job, ["a", "hang", "hang"], workers=1, progress=tell)

    async def coroutine(done: int, total: int) -> None: ...

    with pytest.raises(TypeError, match="coroutine"):
        prompt.map(job, ["a"], progress=coroutine)


def test_progress_does_not_hide_the_exception_of_a_job(prompt: Snapshot) -> None:
    calls: list[int] = []
    with pytest.raises(ZeroDivisionError):
        prompt.map(job, ["raise", "a"], workers=1, progress=lambda done, _total: calls.append(done))
    assert calls[:1] == [1]


def test_arguments_that_are_unknown_are_refused() -> None:
    with Vmm(flat(SPIN)) as vmm, pytest.raises(TypeError, match="worker"):
        vmm.snapshot().map(job, [], worker=1)  # type: ignore[call-overload]
