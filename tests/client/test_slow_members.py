"""Members that are slower than the others: the rest may agree on a state before they have computed it."""

import threading
import time
from typing import Any

import numpy as np
from blindsum.client.member import Member
from blindsum.client.testing import Federation


def test_a_member_that_opens_the_last_sum_after_the_others_agreed_still_ends(tmp_path: Any) -> None:
    names = [f"member-{number}" for number in range(1, 6)]
    model = {"w": np.zeros(50, np.float32)}
    with Federation(names, model=model, rounds=1, folder=tmp_path / "federation") as federation:
        others_done = threading.Event()
        slow: list[Member] = []

        def hold(phase: str, *_: int) -> None:
            if phase == "download" and not others_done.is_set():
                others_done.wait(60)
                deadline = time.monotonic() + 30
                while not slow[0]._finished and time.monotonic() < deadline:
                    time.sleep(0.01)  # until its other thread has handled the notice that the plan is over

        def app(member: Member) -> int:
            if member.name == names[0]:
                slow.append(member)
                member._on_progress = hold
            count = 0
            for rnd in member.rounds():
                weights = rnd.weights()
                receipt = rnd.submit({"w": weights["w"] + 1}, examples=1)
                count += receipt.survivors
            if member.name != names[0]:
                finished.append(member.name)
                if len(finished) == len(names) - 1:
                    others_done.set()
            return count

        finished: list[str] = []
        assert federation.run(app) == dict.fromkeys(names, 5)
