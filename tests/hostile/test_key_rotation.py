"""An HE key that was rotated out: its seeds are forgotten, and it never comes back."""

import asyncio

import numpy as np
import pytest
from blindsum.aggregator.store.records import SeedRecord
from blindsum.client import Member
from blindsum.client.owner import Owner, replace_document
from blindsum.client.testing import Federation
from blindsum.crypto.errors import Refused
from blindsum.crypto.trust.roster import HeKey

pytestmark = pytest.mark.he
MEMBERS = 3


def seeds(federation: Federation, key: bytes) -> int:
    server = federation.server.server
    return len(server.store.find(SeedRecord, federation=federation.owner.roster.federation, he_key=key))


def sweep(federation: Federation) -> None:
    handle = federation.server
    asyncio.run_coroutine_threadsafe(handle.server.retention.sweep(), handle._loop).result(20)


def one_round(member: Member) -> None:
    for rnd in member.rounds():
        rnd.submit({"weight": rnd.weights()["weight"] + np.float32(0.25)}, examples=1)
        break


def publish_he_key(owner: Owner, key: HeKey) -> None:
    owner._publish_roster(replace_document(owner.roster, he_keys=(key,)))


def test_seeds_are_kept_as_long_as_their_key_is_in_force() -> None:
    """Rounds under the old key and the new one; the old key's seeds go with it, and it can't return."""
    with Federation(
        MEMBERS, scheme="bfv", model={"weight": np.zeros(9_000, np.float32)}, rounds=2
    ) as federation:
        owner = federation.owner
        federation.run(one_round)
        old = owner.roster.he_keys[0]
        sweep(federation)
        assert seeds(federation, old.digest) == 2 * MEMBERS  # two ciphertexts each
        owner.rotate(at_once=True)
        new = owner.roster.he_keys[0]
        assert new.digest != old.digest
        federation.run(one_round)
        assert seeds(federation, new.digest) == 2 * MEMBERS
        sweep(federation)
        assert seeds(federation, old.digest) == 0
        assert seeds(federation, new.digest) == 2 * MEMBERS
        np.testing.assert_allclose(owner.model()["weight"], 0.5, atol=1e-3)
        with pytest.raises(Refused, match="retired"):
            publish_he_key(owner, old)
