"""Rounds of the real masking scheme through the real server, in its own process where it is killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from blindsum.aggregator.embedding import serve_in_thread
from blindsum.proto.v1 import round_pb2
from masking_members import STEPS, MaskingMember, build_masking_scene
from scripted_federation import CHUNK, Scene, chunks, settings_for, state_after
from server_process import ServerProcess

PUBLISHED = round_pb2.ROUND_STATE_PUBLISHED


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path / "data", presence_grace=0.1, retry_pause=0.05, fold_batch=2)
    yield process
    process.close()


def come_back(process: ServerProcess, scene: Scene) -> None:
    """Kill the server, start it again, connect everyone again."""
    process.kill()
    scene.reconnect(*process.start())
    for member in scene.members:
        member.watch()


def masking(scene: Scene) -> list[MaskingMember]:
    return [member for member in scene.members if isinstance(member, MaskingMember)]


def test_a_round_gives_the_exact_sum(tmp_path: Path) -> None:
    with serve_in_thread(settings_for(tmp_path)) as handle:
        scene = build_masking_scene(
            handle.enrolment_port, handle.member_port, handle.ca_pem, 5, cohort_wanted=5, rounds=2
        )
        for member in scene.members:
            member.watch()
        for number in (1, 2):
            scene.run_steps(number, steps=STEPS)
            for member in masking(scene):
                assert member.opened(number) == (tuple(f"clinic-{i}" for i in range(5)), {0b11111})
            scene.conclude(number)
            for member in masking(scene):
                member.reset()
        scene.close()


@pytest.mark.parametrize("last", STEPS[:-1])
def test_a_member_that_goes_after_a_step_is_left_out_or_counted(tmp_path: Path, last: str) -> None:
    with serve_in_thread(settings_for(tmp_path)) as handle:
        scene = build_masking_scene(
            handle.enrolment_port, handle.member_port, handle.ca_pem, 5, cohort_wanted=5
        )
        for member in scene.members:
            member.watch()
        number = 0
        members = scene.members
        for step in STEPS:
            for member in members:
                number = member.until_asked(step, number)
                member.perform(number, step)
            if step == last:
                members[-1].close()
                members = members[:-1]
        scene.members = members
        for member in members:
            member.until_state(PUBLISHED, number)
        # Who was there when the survivor set closed is in the sum; who went before is not.
        everyone = last in ("upload", "confirm")
        for member in masking(scene):
            survivors, values = member.opened(number)
            assert len(survivors) == (5 if everyone else 4)
            assert values == {0b11111 if everyone else 0b1111}
        scene.close()


def test_killed_after_every_acknowledgement_the_round_goes_on(process: ServerProcess) -> None:
    scene = build_masking_scene(*process.start(), 3, rounds=1)
    for member in scene.members:
        member.watch()
    number = 0
    for step in STEPS:
        for member in scene.members:
            number = member.until_asked(step, number)
            member.perform(number, step)
            come_back(process, scene)
    for member in masking(scene):
        member.until_state(PUBLISHED, number)
        assert member.opened(number) == (("clinic-0", "clinic-1", "clinic-2"), {0b111})
    assert number == 1
    for member in scene.members:
        member.conclude(number, state_after(number))
        come_back(process, scene)
        for watching in masking(scene):
            watching.until_state(PUBLISHED, number)
    keeper = scene.members[0]
    keeper.keep_checkpoint(number, state_after(number), b"sealed")
    keeper.until(lambda r: r.state_round == 1)
    come_back(process, scene)
    final = scene.members[1].until(lambda r: r.plan_finished)
    assert (final.state_round, final.state) == (1, state_after(number))
    assert scene.members[1].download(round_pb2.BULK_KIND_CHECKPOINT, 1) == b"sealed"
    scene.close()


def test_killed_in_the_middle_of_an_upload_it_goes_on_from_there(process: ServerProcess) -> None:
    scene = build_masking_scene(*process.start(), 3, dimension=400_000)
    for member in scene.members:
        member.watch()
    number = 0
    for step in STEPS:
        for member in masking(scene):
            number = member.until_asked(step, number)
            member.prepare(number, step)
            if step == "upload":
                slot = member.admitted(number).slot
                with pytest.raises(Exception, match="stream ended"):
                    member.send(slot, member.bulk, 2 * CHUNK)
                come_back(process, scene)
                member.until_asked(step, number)
                again = member.admitted(number).slot
                assert again.offset == 2 * CHUNK
                member.stub.Upload(chunks(again, member.bulk), timeout=20)
            else:
                member.perform(number, step)
    for member in masking(scene):
        member.until_state(PUBLISHED, number)
        assert member.opened(number)[1] == {0b111}
    scene.close()
