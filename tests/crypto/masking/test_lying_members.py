"""Members that lie to each other or to the aggregator: named, and never a wrong sum (faults 32, 47)."""

from collections.abc import Sequence

import numpy as np
import pytest
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.errors import OpeningFailed
from blindsum.crypto.primitives.secret_sharing import PRIME
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.messages import OPENED_BYTES, Revealed
from federation_driver import RoundDriver, make_federation, plain_sum, powers_of_two

MASKING = scheme("masking")


def at_reveal(size: int, dropped: Sequence[str] = ()) -> RoundDriver:
    federation = make_federation(MASKING, size)
    d = RoundDriver(federation, powers_of_two(federation))
    d.run({"upload": dropped}, until="reveal")
    return d


def lying_reply(d: RoundDriver, liar: str, slot: int, share: bytes) -> bytes:
    """The liar's signed reveal with another share in one slot."""
    shares = decode_message(d.answer(liar), Revealed, "the reply").shares
    start = slot * OPENED_BYTES
    forged = shares[:start] + share + shares[start + len(share) :]
    root = d.aggregator._root  # type: ignore[attr-defined]
    signature = d.federation.keys[liar].identity.sign(
        "masking reveal", d.aggregator.h1, liar.encode(), root, forged
    )
    return encode_message(Revealed(forged, signature))


@pytest.mark.parametrize("share", [bytes(33), b"\xff" * 33, (PRIME - 1).to_bytes(33, "little")])
@pytest.mark.parametrize("slot", [0, 5, 6])
def test_a_lying_share_is_dropped_and_its_sender_named(share: bytes, slot: int) -> None:
    """Also where it is about the mask root of the dropped member, in slot 6."""
    d = at_reveal(8, ["m0007"])
    for name in d.aggregator.participants:
        d.deliver(name, lying_reply(d, name, slot, share) if name == "m0001" else d.answer(name))
    d.close()
    assert d.aggregator.abort is None
    assert set(d.aggregator.named) == {"m0001"}
    assert (d.opened("m0000") == plain_sum(d.inputs, d.federation.members[:7])).all()
    assert d.replayed().named == d.aggregator.named


def test_too_many_lying_shares_abort_and_name_them_all() -> None:
    d = at_reveal(5)
    for name in d.aggregator.participants:
        lies = name in ("m0001", "m0002")
        d.deliver(name, lying_reply(d, name, 0, bytes(33)) if lies else d.answer(name))
    d.close()
    assert d.aggregator.abort is not None
    assert d.aggregator.abort.exclude == ("m0001", "m0002")
    assert set(d.aggregator.named) == {"m0001", "m0002"}


@pytest.mark.parametrize("dropped", [False, True])
def test_good_shares_of_a_wrong_secret_name_the_dealer(dropped: bool) -> None:
    federation = make_federation(MASKING, 6)
    d = RoundDriver(federation, powers_of_two(federation))
    d.step()
    machine = d.machines["m0003"]
    secrets = machine._secrets  # type: ignore[attr-defined]
    # Another self seed and mask root than it advertised: channel, root, self seed, dealer seed.
    machine._secrets = secrets[:32] + bytes(32) + bytes(32) + secrets[96:]  # type: ignore[attr-defined]
    d.run({"upload": ["m0003"] if dropped else []})
    assert d.aggregator.abort is not None
    assert d.aggregator.abort.exclude == ("m0003",)
    assert set(d.aggregator.named) == {"m0003"}


def test_shares_on_no_polynomial_name_the_dealer(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = make_federation(MASKING, 6)
    d = RoundDriver(federation, powers_of_two(federation))
    d.step()
    for name in d.aggregator.participants:
        with monkeypatch.context() as patch:
            if name == "m0003":
                patch.setattr(
                    "blindsum.crypto.schemes.masking.member.split",
                    lambda secret, t, points, uniform: [point.to_bytes(33, "little") for point in points],
                )
            d.deliver(name, d.answer(name))
    d.close()
    d.run()
    assert d.aggregator.abort is not None
    assert d.aggregator.abort.exclude == ("m0003",)


@pytest.mark.parametrize("lane", [1, 1 << 3, 0xFFFF << 20, 1 << 63])
def test_a_contribution_outside_its_range_is_never_output(lane: int) -> None:
    """A malicious member that sets guard bits or more than a field may hold stops the round's sum."""
    federation = make_federation(MASKING, 5)

    def tamper(name: str, index: int, frame: bytes) -> bytes:
        lanes = np.frombuffer(frame, dtype="<u8").copy()
        if name == "m0002":
            lanes[1] += np.uint64(lane)
        return lanes.tobytes()

    d = RoundDriver(
        federation,
        {name: np.full(10, 65535, dtype=np.uint32) for name in federation.members},
        tamper=tamper,
    )
    d.run()
    with pytest.raises(OpeningFailed):
        d.opened("m0000")


def test_another_group_key_opens_nothing() -> None:
    """A server's own K, or another survivor count, leaves lanes that aren't fields."""
    d = RoundDriver(make_federation(MASKING, 5), powers_of_two(make_federation(MASKING, 5)))
    d.run()
    opener = d.machines["m0000"].open_sum(d.aggregator.result())
    (frame,) = d.published()
    opener.open(0, frame)
    opener.survivors = opener.survivors[:-1]
    with pytest.raises(OpeningFailed):
        opener.open(0, frame)
