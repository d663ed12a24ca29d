"""The account of what requests hold: who is taken in, who is pushed out, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

import conmoe_edge.serve.intake as module
from conmoe_edge.serve.busy import Busy
from conmoe_edge.serve.intake import PROGRESS_BYTES, Entry, Intake
from tests.fuzz.cases import random_of, seeds

KIB = 1 << 10


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes on by one with every look."""
    ticks = count()
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))


class Account:
    """An intake, and who was pushed out of it."""

    def __init__(self, nbytes: int = 64 * KIB, places: int = 4, readers: int = 3) -> None:
        self.intake = Intake(lambda: nbytes, places, readers, lambda: 7)
        self.out: list[str] = []

    def reader(self, name: str, nbytes: int = 0) -> Entry:
        entry = self.intake.begin(self._noting(name))
        entry.hold(nbytes)
        return entry

    def waiting(self, name: str, client: str, nbytes: int = 0) -> Entry:
        entry = self.reader(name, nbytes)
        entry.on_withdraw(self._noting(name))
        entry.enter(client)
        return entry

    def _noting(self, name: str) -> Callable[[], bool]:
        def withdraw() -> bool:
            self.out.append(name)
            return True

        return withdraw


def test_the_body_that_is_quiet_for_the_longest_time_makes_way() -> None:
    account = Account()
    for name in ("first", "second", "third"):
        account.reader(name)
    moving = account.intake
    assert moving.reading == 3
    next(iter(moving._reading)).hold(PROGRESS_BYTES)  # the first one goes on
    account.reader("fourth")
    assert account.out == ["second"] and moving.reading == 3


def test_bytes_come_from_unfinished_bodies_first() -> None:
    account = Account()
    account.waiting("whole", "a", 30 * KIB)
    account.reader("slow", 30 * KIB)
    account.reader("new").hold(20 * KIB)
    assert account.out == ["slow"] and account.intake.used == 50 * KIB


def test_many_requests_of_one_client_do_not_keep_another_out() -> None:
    account = Account()
    for n in range(4):
        account.waiting(f"a{n}", "a")
    with pytest.raises(Busy) as caught:
        account.waiting("a4", "a")
    assert caught.value.retry_after == 7 and not account.out
    account.waiting("b0", "b")
    account.waiting("b1", "b")
    assert account.out == ["a3", "a2"]  # now they have as many
    with pytest.raises(Busy):
        account.waiting("b2", "b")


def test_what_runs_is_not_pushed_out() -> None:
    account = Account()
    for n in range(4):
        account.waiting(f"a{n}", "a").on_withdraw(lambda: False)
    with pytest.raises(Busy):
        account.waiting("b0", "b")
    assert not account.out and account.intake.inside == 4


def test_a_body_that_finds_no_bytes_leaves_the_others_theirs() -> None:
    account = Account()
    held = account.waiting("a", "a", 60 * KIB)
    entry = account.reader("b")
    with pytest.raises(Busy):
        entry.hold(10 * KIB)
    assert held.held == account.intake.used == 60 * KIB
    entry.close()
    held.close()
    held.close()
    assert account.intake.used == account.intake.inside == account.intake.reading == 0


@pytest.mark.parametrize("seed", seeds(30))
def test_the_account_is_right_whatever_happens(seed: int) -> None:
    random = random_of(seed)
    nbytes, places, readers = 50_000, random.randint(1, 5), random.randint(1, 5)
    intake = Intake(lambda: nbytes, places, readers)
    alive: list[Entry] = []

    def withdrawing(entry_at: list[Entry]) -> Callable[[], bool]:
        def withdraw() -> bool:
            if random.random() < 0.2 and entry_at[0].client is not None:
                return False  # it runs
            alive.remove(entry_at[0])
            return True

        return withdraw

    for _ in range(300):
        try:
            choice = random.random()
            if choice < 0.4 or not alive:
                box: list[Entry] = []
                entry = intake.begin(withdrawing(box))
                box.append(entry)
                alive.append(entry)
            elif choice < 0.7:
                random.choice(alive).hold(random.randint(0, 20_000))
            elif choice < 0.85:
                entry = random.choice(alive)
                if entry.client is None:
                    entry.enter(random.choice("abc"))
            else:
                entry = alive.pop(random.randrange(len(alive)))
                entry.close()
        except Busy:
            pass
        inside = [one for one in alive if one.client is not None]
        assert intake.used == sum(one.held for one in alive) <= nbytes
        assert intake.inside == len(inside) <= places
        assert intake.reading == len(alive) - len(inside) <= readers
    for entry in alive:
        entry.close()
    assert intake.used == intake.inside == intake.reading == 0
