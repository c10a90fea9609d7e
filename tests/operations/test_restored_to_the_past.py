"""A backup older than the last round: real members don't go back, and go on under a new plan."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from blindsum.aggregator.backup import back_up, restore, set_aside
from blindsum.client.testing import Federation
from blindsum.crypto.errors import BlindsumError

STEP = {"weight": np.full(8, 0.5, np.float32)}


def test_members_dont_go_back_and_a_new_plan_goes_on(tmp_path: Path) -> None:
    model = {"weight": np.zeros(8, np.float32)}
    with Federation(members=3, model=model, rounds=3, folder=tmp_path / "all") as federation:
        data = federation.folder / "server"

        def one_round(member: object) -> int:
            for rnd in member.rounds():  # type: ignore[attr-defined]
                weights = rnd.weights()
                rnd.submit({name: value + STEP[name] for name, value in weights.items()}, examples=1)
                return int(rnd.index)
            return -1

        assert set(federation.run(one_round).values()) == {1}
        back_up(data, tmp_path / "backup.tar")
        assert set(federation.run(one_round).values()) == {2}
        federation.stop_server()
        set_aside(data)
        restore(tmp_path / "backup.tar", data)
        federation.start_server()
        with pytest.raises(BlindsumError, match=r"answered already|holds state"):
            federation.run(one_round)
        # The owner goes on from a member's newest model.
        federation.start({"weight": np.ones(8, np.float32)}, name="after the restore", rounds=1)
        done = federation.train(lambda _member, _index: STEP)
        assert {len(receipts) for receipts in done.values()} == {1}
        with contextlib.closing(federation.owner):
            assert federation.owner.status().rounds[0].number > 1000
