"""Any faults in any order: never a wrong sum, a second survivor set, or a lost acknowledgement.

Two profiles. Faults for ever: what must hold is checked at every acknowledgement, sum and restart. Faults
that stop: after them the running round ends by its deadline, and another one concludes. A bug that was
found stays below as the list of operations that led to it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from federation_world import MEMBERS, World, template
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

NETWORK = ("drop request", "drop response", "duplicate", "delay", "cut")
WHICH = st.integers(0, 63)
MEMBER = st.integers(0, MEMBERS - 1)


class Operations(RuleBasedStateMachine):
    """Everything that can happen to a federation. A number chooses among what there is."""

    stops = False
    """Whether faults stop in the end, so that the federation has to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="reliability-"))
        self.world = World(self.folder, ready=template(), aborts_before_pause=1000)

    # Progress

    @rule(member=MEMBER)
    def act(self, member: int) -> None:
        self.world.act(self.world.members[member])

    @rule()
    def everyone_acts(self) -> None:
        for member in self.world.members:
            self.world.act(member)

    @rule(ms=st.sampled_from([1, 500, 1_000, 3_000, 19_999, 20_000, 40_000]))
    def advance(self, ms: int) -> None:
        self.world.advance(ms)

    @rule()
    def to_the_next_timer(self) -> None:
        following = self.world.clock.next_ms()
        if following is not None:
            self.world.advance(max(0, following - self.world.clock.ms))

    # The network

    @rule(member=MEMBER, fault=st.sampled_from(NETWORK), later=st.integers(0, 2))
    def network(self, member: int, fault: str, later: int) -> None:
        self.world.members[member].faults += [""] * later + [fault]

    @rule(which=WHICH)
    def deliver(self, which: int) -> None:
        self.world.deliver(which)

    @rule(which=st.integers(0, 1000), member=MEMBER)
    def replay(self, which: int, member: int) -> None:
        self.world.replay(which, self.world.members[member])

    # Machines

    @rule(member=MEMBER)
    def restart_member(self, member: int) -> None:
        self.world.members[member].restart()

    @rule(changes=st.integers(0, 40))
    def die_in(self, changes: int) -> None:
        self.world.dies_in = changes

    @rule(changes=st.sampled_from([-1, -1, 0, 3, 10, 30]))
    def kill_and_restart(self, changes: int) -> None:
        """Perhaps it dies once more while it starts."""
        self.world.kill()
        self.world.dies_in = changes
        self.world.start()

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule(keep=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=WHICH)
    def power_cut(self, keep: float, seed: int) -> None:
        self.world.power_cut(keep, seed)

    @rule(full=st.booleans())
    def disk_is_full(self, full: bool) -> None:
        self.world.full = full and self.world.alive

    @rule(which=WHICH, how=st.sampled_from(["flip", "cut", "swap"]))
    def corrupt(self, which: int, how: str) -> None:
        self.world.corrupt(which, how)

    # The owner

    @rule(which=WHICH)
    def revoke(self, which: int) -> None:
        self.world.revoke(which)

    @rule()
    def sign_plan_anew(self) -> None:
        if self.world.alive:
            self.world.sign_plan_anew()

    def teardown(self) -> None:
        try:
            if self.stops:
                self.world.settle()
            else:
                self.world.full, self.world.dies_in = False, -1
                self.world.restart()
        finally:
            self.world.close()
            shutil.rmtree(self.folder, ignore_errors=True)


class FaultsThatStop(Operations):
    """The same, and in the end everything works again."""

    stops = True


def run(machine: type[Operations], examples: int, steps: int, *, same_each_time: bool = True) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=same_each_time,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_faults_for_ever_never_give_a_wrong_sum_or_lose_an_acknowledgement() -> None:
    run(Operations, 15, 25)


def test_when_faults_stop_the_round_ends_by_its_deadline_and_training_goes_on() -> None:
    run(FaultsThatStop, 12, 20)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Operations, FaultsThatStop])
def test_many_operations(machine: type[Operations]) -> None:
    """Other lists each time, as many as OPERATIONS says, else what takes some minutes each."""
    run(machine, int(os.environ.get("OPERATIONS", "400")), 60, same_each_time=False)


def reproduce(machine: type[Operations], *steps: Callable[[Operations], None]) -> None:
    """Apply these operations, then what the profile ends with."""
    state = machine()
    try:
        for step in steps:
            step(state)
    finally:
        state.teardown()


def test_found_a_sum_that_was_cut_on_the_disk_was_tried_again_for_ever() -> None:
    """It aborts the round now, like any other damage, and the next one concludes."""
    reproduce(
        FaultsThatStop,
        lambda state: state.everyone_acts(),
        lambda state: state.everyone_acts(),
        *(lambda state, member=member: state.act(member) for member in range(3)),  # type: ignore[misc]
        lambda state: state.corrupt(1, "cut"),
    )


def test_found_a_server_that_died_while_it_started_left_its_database_open() -> None:
    reproduce(
        FaultsThatStop,
        lambda state: state.everyone_acts(),
        *(lambda state, changes=changes: state.kill_and_restart(changes) for changes in range(6)),  # type: ignore[misc]
    )
