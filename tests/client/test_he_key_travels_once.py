"""The HE public key, by far the largest document, travels to a member once, and is known by its digest."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from blindsum.client import Member
from blindsum.client.testing import Federation, small_model
from blindsum.proto.v1 import round_pb2
from lying_server import LyingServer

Make = Callable[..., Federation]
ROUNDS = 3

pytestmark = pytest.mark.he


def test_a_member_fetches_the_public_key_once_for_all_rounds(blindsum_federation: Make) -> None:
    server = LyingServer()
    federation = blindsum_federation(3, scheme="bfv", rounds=ROUNDS, make_server=server, model=small_model())
    fetched: Counter[tuple[str, bytes]] = Counter()

    def overhear(method: str, member: str, answer: Any) -> Any:
        if method == "GetDocument":
            raw = answer if isinstance(answer, bytes) else answer.SerializeToString()
            document = round_pb2.GetDocumentResponse.FromString(raw).document
            fetched[member, hashlib.sha256(document).digest()] += 1
        return answer

    server.lies(overhear)

    def app(member: Member) -> int:
        done = 0
        for rnd in member.rounds():
            rnd.submit(rnd.weights(), examples=1)
            done += 1
        return done

    assert set(federation.run(app).values()) == {ROUNDS}
    (key,) = federation.owner.roster.he_keys
    assert {member: fetched[member, key.digest] for member in federation.names} == dict.fromkeys(
        federation.names, 1
    )
