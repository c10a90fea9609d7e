"""Transport certificates of running members: renewed in time, and fetched again after they expired."""

import datetime
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from blindsum.aggregator import transport_authority
from blindsum.aggregator.transport_authority import IssuedCertificate, TransportAuthority
from blindsum.client import Member
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.errors import Refused

Make = Callable[..., Federation]


class ShortLives:
    """Certificates of members that last seconds; how many were issued to each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.issued: Counter[str] = Counter()
        self.changed = threading.Condition()
        monkeypatch.setattr(transport_authority, "_SKEW", datetime.timedelta(seconds=1))
        real = TransportAuthority.member_certificate

        def short(
            authority: TransportAuthority, csr: bytes, federation: bytes, member: str, _days: int, now: int
        ) -> IssuedCertificate:
            lasting: Any = seconds / 86_400
            made = real(authority, csr, federation, member, lasting, now)
            with self.changed:
                self.issued[member] += 1
                self.changed.notify_all()
            return made

        monkeypatch.setattr(TransportAuthority, "member_certificate", short)

    def wait_for(self, member: str, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.issued[member] >= count, 60), self.issued


def test_a_running_member_renews_its_certificate_and_goes_on(
    blindsum_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three members train through several lives of their certificates, in one run of `rounds()`."""
    lives = ShortLives(monkeypatch, 7)
    federation = blindsum_federation(3, model=small_model(), rounds=2)

    def app(member: Member) -> int:
        done = 0
        for rnd in member.rounds():
            lives.wait_for(member.name, lives.issued[member.name] + 1)
            with rnd:
                rnd.submit(rnd.weights(), examples=1)
                done += 1
        return done

    results = federation.run(app)
    assert max(results.values()) == 2
    assert federation.owner.status().state_round == 2
    assert all(lives.issued[name] >= 3 for name in federation.names), lives.issued


def test_a_member_that_was_off_past_the_end_asks_again(
    blindsum_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = ShortLives(monkeypatch, 1)
    federation = blindsum_federation(3, model=small_model())
    before = dict(lives.issued)
    expired = threading.Event()
    assert not expired.wait(1.1), "the certificates last a second"
    monkeypatch.undo()
    results = federation.train(lambda name, index: dict.fromkeys(small_model(), 0))
    assert all(len(receipts) == 1 for receipts in results.values())
    assert before == dict(lives.issued)


def test_a_removed_member_gets_no_certificate(
    blindsum_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ShortLives(monkeypatch, 1)
    federation = blindsum_federation(4)
    federation.owner.remove("member-4")
    expired = threading.Event()
    assert not expired.wait(1.1)
    with federation.open("member-4") as member, pytest.raises(Refused, match="removed"):
        next(member.rounds())
