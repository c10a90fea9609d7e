"""The round engine through the real server: when rounds open, steps close, and rounds end."""

import hashlib
import json
from pathlib import Path

import grpc
import pytest
from blindsum.aggregator.capture import RECEIVED, read_capture
from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.store.records import ContributionRecord, EventRecord
from blindsum.aggregator.store.state import broken_link
from blindsum.crypto.trust.plan import Deadlines, Encoding
from blindsum.proto.v1 import round_pb2
from manual_clock import ManualClock
from scripted_federation import (
    Applicant,
    Scene,
    ScriptedMember,
    Serve,
    Stage,
    build_scene,
    reason_of,
    state_after,
)

OPEN = round_pb2.ROUND_STATE_OPEN
PUBLISHED = round_pb2.ROUND_STATE_PUBLISHED
ABORTED = round_pb2.ROUND_STATE_ABORTED
CONCLUDED = round_pb2.ROUND_STATE_CONCLUDED


def all_advertise(scene: Scene, members: list[ScriptedMember] | None = None) -> int:
    number = 0
    for member in members or scene.members:
        number = member.until_asked("advertise")
        member.answer(number, "advertise")
    return number


def finish(scene: Scene, members: list[ScriptedMember], number: int) -> None:
    for member in members:
        member.until_asked("confirm")
        member.answer(number, "confirm")
    for member in members:
        member.until_state(PUBLISHED, number)


def test_members_train_until_the_plan_is_done(stage: Stage, server: ServerHandle) -> None:
    scene = stage(rounds=2)
    for number in (1, 2):
        scene.run_steps(number)
        assert scene.members[0].survivors(number) == ("clinic-0", "clinic-1", "clinic-2")
        assert scene.members[0].sum(number) == {0b111}
        scene.conclude(number)
    final = scene.members[0].until(lambda r: r.plan_finished)
    assert (final.state_round, final.state) == (2, state_after(2))
    status = scene.owner.status()
    assert [(r.number, r.outcome, r.survivors) for r in status.rounds] == [
        (2, "concluded", 3),
        (1, "concluded", 3),
    ]
    assert broken_link(server.server.store) is None


def test_a_download_goes_on_from_any_offset(stage: Stage) -> None:
    scene = stage()
    number = scene.run_steps()
    member = scene.members[0]
    whole = member.download(round_pb2.BULK_KIND_SUM, number)
    assert member.download(round_pb2.BULK_KIND_SUM, number, 12_345) == whole[12_345:]
    assert member.download(round_pb2.BULK_KIND_SUM, number, len(whole)) == b""
    with pytest.raises(grpc.RpcError) as caught:
        member.download(round_pb2.BULK_KIND_SUM, number, len(whole) + 1)
    assert reason_of(caught.value) == "wrong_offset"


def test_a_round_waits_for_the_minimum_and_a_while_for_more(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, watching=2, cohort_wanted=4, deadlines=Deadlines(gather=10))
    first, _, third, fourth = scene.members
    first.until(lambda r: bool(r.plan))
    clock.advance(3600)
    third.watch(ready=False)
    assert not third.until(lambda r: bool(r.plan)).HasField("round")
    third.watch(ready=True)
    third.until(lambda r: bool(r.plan))
    assert not scene.owner.status().rounds
    clock.advance(10)
    assert first.until_asked("advertise") == 1
    fourth.watch()
    assert fourth.until_asked("advertise") == 1


def test_a_step_closes_at_its_deadline_with_the_quorum(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, cohort_wanted=4)
    number = all_advertise(scene)
    for member in scene.members[:3]:
        member.until_asked("upload")
        member.upload(number)
    late = scene.members[3]
    deadline = late.until(lambda r: r.round.step == "upload").round.step_deadline_ms
    clock.advance_to(deadline)
    scene.members[0].until_asked("confirm")
    with pytest.raises(grpc.RpcError) as caught:
        late.begin(number, late.contribution())
    assert reason_of(caught.value) == "closed"
    finish(scene, scene.members[:3], number)
    assert scene.members[0].sum(number) == {0b0111}


def test_a_reply_counts_until_just_before_the_deadline(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, cohort_wanted=4)
    for member in scene.members:
        member.until_asked("advertise")
    deadline = scene.members[0].until_asked("advertise") and scene.members[0].latest
    assert deadline is not None
    at = deadline.round.step_deadline_ms
    clock.advance_to(at - 1)
    for member in scene.members[:3]:
        member.answer(1, "advertise")
    clock.advance_to(at)
    with pytest.raises(grpc.RpcError) as caught:
        scene.members[3].answer(1, "advertise")
    assert reason_of(caught.value) == "closed"
    scene.members[0].until_asked("upload")
    assert not scene.members[3].until(lambda r: r.round.step == "upload").round.asked


def test_below_the_quorum_the_round_aborts_and_is_tried_again(stage: Stage, clock: ManualClock) -> None:
    scene = stage()
    for member in scene.members:
        member.until_asked("advertise")
    scene.members[0].answer(1, "advertise")
    clock.advance(60)
    notice = scene.members[0].until_state(ABORTED, 1)
    assert "1 of 3 needed" in notice.abort_reason
    clock.advance(1)
    number = scene.run_steps(2)
    assert scene.members[0].sum(number) == {0b111}


def test_members_that_are_gone_arent_waited_for(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, cohort_wanted=4)
    number = all_advertise(scene)
    gone = scene.members[3]
    gone.until_asked("upload")
    gone.close()
    for member in scene.members[:3]:
        member.until_asked("upload")
        member.upload(number)
    while scene.owner.status().members[3].connected:
        pass
    clock.advance(0.2)
    finish(scene, scene.members[:3], number)
    assert scene.members[0].sum(number) == {0b0111}


def test_a_complaint_aborts_and_the_retry_leaves_both_out(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, cohort_wanted=4)
    number = all_advertise(scene)
    accuser = scene.members[3]
    accuser.until_asked("upload")
    accuser.answer(number, "upload", b"complaint")
    scene.members[0].until_state(ABORTED, number)
    # Only three are left, fewer than wanted: the round opens when waiting for more has ended.
    clock.advance(0.1)
    scene.members[0].until(lambda r: bool(r.plan))
    clock.advance(1.1)
    second = scene.run_steps(number + 1, scene.members[:3])
    assert second == number + 1
    assert scene.members[0].sum(second) == {0b0111}
    with pytest.raises(grpc.RpcError) as caught:
        accuser.answer(second, "advertise")
    assert reason_of(caught.value) in {"closed", "not_a_participant"}


def test_no_more_than_the_cohorts_maximum_get_in(stage: Stage) -> None:
    scene = stage(4, watching=4, cohort_wanted=3, cohort_max=3)
    for member in scene.members[1:]:
        number = member.until_asked("advertise")
        member.answer(number, "advertise")
    scene.members[1].until_asked("upload")
    with pytest.raises(grpc.RpcError) as caught:
        scene.members[0].answer(1, "advertise")
    assert reason_of(caught.value) in {"limit", "closed"}


def test_a_repeated_reply_is_fine_and_another_one_refused(stage: Stage) -> None:
    scene = stage()
    member = scene.members[0]
    number = member.until_asked("advertise")
    assert not member.answer(number, "advertise").duplicate
    assert member.answer(number, "advertise").duplicate
    with pytest.raises(grpc.RpcError) as caught:
        member.answer(number, "advertise", b"advertise otherwise")
    assert (reason_of(caught.value), caught.value.code()) == ("conflict", grpc.StatusCode.ALREADY_EXISTS)
    for other in scene.members[1:]:
        other.until_asked("advertise")
        other.answer(number, "advertise")
    member.until_asked("upload")
    assert member.answer(number, "advertise").duplicate


@pytest.mark.parametrize(
    ("number", "step", "reason"),
    [
        (2, "advertise", "wrong_round"),
        (0, "advertise", "wrong_round"),
        (1, "upload", "wrong_step"),
        (1, "confirm", "wrong_step"),
        (1, "nonsense", "wrong_step"),
        (1, "", "wrong_step"),
    ],
)
def test_replies_out_of_place_are_refused(stage: Stage, number: int, step: str, reason: str) -> None:
    scene = stage()
    member = scene.members[0]
    member.until_asked("advertise")
    for call in (
        lambda: member.answer(number, step),
        lambda: member.stub.GetStep(round_pb2.GetStepRequest(round=number, step=step), timeout=20),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert reason_of(caught.value) == reason
    assert not member.answer(1, "advertise").duplicate


def test_only_survivors_get_the_sum(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, watching=3, cohort_wanted=3)
    stranger = scene.members[3]
    number = scene.run_steps(members=scene.members[:3])
    for call in (
        lambda: stranger.survivors(number),
        lambda: stranger.download(round_pb2.BULK_KIND_SUM, number),
        lambda: stranger.stub.Conclude(
            round_pb2.ConcludeRequest(round=number, refusal="no", signature=b"s" * 64), timeout=20
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert reason_of(caught.value) == "not_a_participant"


def test_a_newcomer_gets_the_sealed_state(stage: Stage) -> None:
    scene = stage(4, watching=3, cohort_wanted=3, rounds=1)
    newcomer = scene.members[3]
    info = newcomer.stub.GetCheckpoint(round_pb2.GetCheckpointRequest(), timeout=20).info
    assert (info.state_round, info.sealing_context) == (0, scene.owner.plan_digest)
    assert newcomer.download(round_pb2.BULK_KIND_CHECKPOINT, 0) == b"sealed state 0"
    number = scene.run_steps(members=scene.members[:3])
    survivors, scene.members = scene.members, scene.members[:3]
    scene.conclude(number)
    scene.members = survivors
    info = newcomer.stub.GetCheckpoint(round_pb2.GetCheckpointRequest(), timeout=20).info
    sealed = newcomer.download(round_pb2.BULK_KIND_CHECKPOINT, 1)
    assert (info.state_round, info.state) == (1, state_after(number))
    assert hashlib.sha256(sealed).digest() == info.sealed_digest
    assert {s.member for s in info.signatures} == {"clinic-0", "clinic-1", "clinic-2"}


def test_states_that_differ_abort_and_the_old_state_stays(stage: Stage, clock: ManualClock) -> None:
    scene = stage()
    number = scene.run_steps()
    for member, state in zip(scene.members, (b"a" * 32, b"b" * 32, b"c" * 32), strict=True):
        member.conclude(number, state)
    assert "don't agree" in scene.members[0].until_state(ABORTED, number).abort_reason
    clock.advance(1)
    second = scene.run_steps(number + 1)
    header = scene.members[0].header().header
    assert (second, header.state_round) == (number + 1, 0)
    assert scene.owner.plan is not None
    assert header.state == scene.owner.plan.initial_state


def test_a_refused_sum_is_recorded_and_the_majority_goes_on(stage: Stage, server: ServerHandle) -> None:
    scene = stage(4, cohort_wanted=4, cohort_min=4, rounds=1)
    number = scene.run_steps()
    first, second, third, fourth = scene.members
    third.refuse_sum(number, "the sum check failed")
    first.conclude(number, state_after(number))
    first.until(lambda r: r.round.checkpoint_wanted)
    first.keep_checkpoint(number, state_after(number), b"sealed")
    assert not second.conclude(number, state_after(number)).duplicate
    assert second.conclude(number, state_after(number)).duplicate
    fourth.conclude(number, state_after(number))
    first.until(lambda r: r.state_round == 1)
    events = [e for e in server.server.store.find(EventRecord) if e.kind == "sum refused"]
    assert json.loads(events[0].detail) == {
        "member": "clinic-2",
        "reason": "the sum check failed",
        "round": number,
    }
    with pytest.raises(grpc.RpcError) as caught:
        third.refuse_sum(number, "another word")
    assert reason_of(caught.value) in {"conflict", "wrong_round"}


def test_signatures_of_a_state_are_checked(stage: Stage) -> None:
    scene = stage()
    number = scene.run_steps()
    member, other = scene.members[:2]
    member.applicant, mine = other.applicant, member.applicant
    with pytest.raises(grpc.RpcError) as caught:
        member.conclude(number, state_after(number))
    assert reason_of(caught.value) == "signature"
    member.applicant = mine
    for request in (
        round_pb2.ConcludeRequest(round=number, state=b"s" * 31, signature=b"0" * 64),
        round_pb2.ConcludeRequest(round=number, signature=b"0" * 64),
        round_pb2.ConcludeRequest(round=number, state=b"s" * 32, refusal="both", signature=b"0" * 64),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            member.stub.Conclude(request, timeout=20)
        assert reason_of(caught.value) == "malformed"
    assert not member.conclude(number, state_after(number)).duplicate


def test_another_survivor_is_asked_when_the_first_doesnt_deliver(stage: Stage, clock: ManualClock) -> None:
    scene = stage()
    number = scene.run_steps()
    first, second, third = scene.members
    for member in scene.members:
        member.conclude(number, state_after(number))
    first.until(lambda r: r.round.checkpoint_wanted)
    clock.advance(21)
    second.until(lambda r: r.round.checkpoint_wanted)
    second.close()
    third.until(lambda r: r.round.checkpoint_wanted)
    third.keep_checkpoint(number, state_after(number), b"sealed")
    third.until(lambda r: r.state_round == 1)


def test_only_the_signed_states_checkpoint_is_taken(stage: Stage) -> None:
    scene = stage()
    number = scene.run_steps()
    member, other = scene.members[:2]
    with pytest.raises(grpc.RpcError) as caught:
        member.keep_checkpoint(number, state_after(number), b"sealed")
    assert reason_of(caught.value) == "not_a_participant"
    member.conclude(number, state_after(number))
    with pytest.raises(grpc.RpcError) as caught:
        member.keep_checkpoint(number, b"x" * 32, b"sealed")
    assert reason_of(caught.value) == "not_a_participant"
    with pytest.raises(grpc.RpcError) as caught:
        other.stub.BeginUpload(
            round_pb2.BeginUploadRequest(
                round=number,
                kind=round_pb2.BULK_KIND_CHECKPOINT,
                total=1 << 40,
                digest=b"d" * 32,
                reply=state_after(number),
            ),
            timeout=20,
        )
    assert reason_of(caught.value) == "not_a_participant"


def test_after_aborts_in_a_row_it_pauses_until_somebody_comes(stage: Stage, clock: ManualClock) -> None:
    scene = stage(4, watching=3, cohort_wanted=3)
    member = scene.members[0]
    for number in range(1, 6):
        member.until_asked("advertise")
        clock.advance(60)
        member.until_state(ABORTED, number)
        clock.advance(1)
    clock.advance(3600)
    status = scene.owner.status()
    assert status.rounds[0].number == 5
    assert "paused" in status.rounds[0].outcome
    scene.members[3].watch()
    assert member.until(lambda r: r.round.number == 6).round.state == OPEN


def test_a_removed_member_is_a_dropout_before_the_survivor_set_closes(
    stage: Stage, clock: ManualClock
) -> None:
    scene = stage(4, cohort_wanted=4)
    number = all_advertise(scene)
    removed = scene.members[3]
    # Its upload is accepted and acknowledged, then the owner removes it.
    removed.until_asked("upload")
    removed.upload(number)
    scene.owner.publish_roster([m.name for m in scene.members[:3]])
    assert removed.until_refused() == "unknown_member"
    for member in scene.members[:3]:
        member.until_asked("upload")
        member.upload(number)
    finish(scene, scene.members[:3], number)
    assert scene.members[0].survivors(number) == ("clinic-0", "clinic-1", "clinic-2")
    assert scene.members[0].sum(number) == {0b0111}


def test_removed_in_the_first_step_it_never_was_there(stage: Stage) -> None:
    scene = stage(4, cohort_wanted=4)
    for member in scene.members[1:]:
        member.until_asked("advertise")
        member.answer(1, "advertise")
    scene.owner.publish_roster([m.name for m in scene.members[:3]])
    scene.members[3].until_refused()
    scene.members[0].until_asked("advertise")
    scene.members[0].answer(1, "advertise")
    for member in scene.members[:3]:
        member.until_asked("upload")
        member.upload(1)
    finish(scene, scene.members[:3], 1)
    assert scene.members[0].sum(1) == {0b0111}


def test_removed_after_the_survivor_set_closed_its_contribution_stays(stage: Stage) -> None:
    scene = stage(4, cohort_wanted=4)
    number = all_advertise(scene)
    for member in scene.members:
        member.until_asked("upload")
        member.upload(number)
    for member in scene.members:
        member.until_asked("confirm")
    scene.owner.publish_roster([m.name for m in scene.members[:3]])
    scene.members[3].until_refused()
    finish(scene, scene.members[:3], number)
    assert scene.members[0].sum(number) == {0b1111}


def test_another_plan_ends_the_running_round(stage: Stage, clock: ManualClock) -> None:
    scene = stage()
    all_advertise(scene)
    scene.owner.publish_plan(scene.owner.make_plan(version=2, rounds=1))
    notice = scene.members[0].until_state(ABORTED, 1)
    assert "another plan" in notice.abort_reason
    clock.advance(1)
    number = scene.run_steps(2)
    scene.conclude(number)
    assert scene.members[0].until(lambda r: r.plan_finished).state_round == 1


def test_round_numbers_start_where_the_plan_says(stage: Stage) -> None:
    scene = stage(first_round=40)
    assert scene.members[0].until_asked("advertise") == 40


def test_a_slow_fold_in_batches_gives_the_same_sum(serve: Serve, clock: ManualClock) -> None:
    handle = serve(fold_batch=2)
    scene = build_scene(
        handle.enrolment_port, handle.member_port, handle.ca_pem, 5, {"cohort_wanted": 5, "dimension": 9_000}
    )
    for member in scene.members:
        member.watch()
    number = scene.run_steps()
    assert scene.members[0].sum(number) == {0b11111}
    scene.close()


def test_a_member_admitted_while_training_runs_joins_the_next_round(
    stage: Stage, server: ServerHandle
) -> None:
    scene = stage(cohort_max=8)
    number = scene.run_steps()
    late = Applicant("late")
    request = scene.owner.join(late)
    scene.owner.publish_roster([*(m.name for m in scene.members), "late"])
    certificate = scene.owner.poll(request).certificate
    scene.conclude(number)
    newcomer = ScriptedMember(scene.owner, late, certificate, server.member_port, 3)
    newcomer.watch()
    scene.members.append(newcomer)
    second = scene.run_steps(number + 1)
    assert newcomer.sum(second) == {0b1111}


def test_lanes_too_narrow_are_refused_with_the_plan(stage: Stage) -> None:
    scene = stage()
    with pytest.raises(grpc.RpcError) as caught:
        scene.owner.publish_plan(scene.owner.make_plan(version=2, encoding=Encoding(bits=32)))
    assert reason_of(caught.value) == "policy"


def test_the_capture_holds_every_message(serve: Serve, tmp_path: Path) -> None:
    directory = tmp_path / "seen"
    handle = serve(capture_directory=directory)
    scene = build_scene(handle.enrolment_port, handle.member_port, handle.ca_pem, 3, {"rounds": 1})
    for member in scene.members:
        member.watch()
    number = scene.run_steps()
    bulk = scene.members[0].contribution()
    scene.conclude(number)
    scene.close()
    uploads = []
    for path in sorted(directory.glob("*-Upload-*.capture")):
        parts = [data for direction, data in read_capture(path) if direction == RECEIVED]
        uploads.append(b"".join(round_pb2.UploadRequest.FromString(part).data for part in parts))
    assert bulk in uploads
    assert list(directory.glob("*-Publish-*.capture"))


def test_a_commit_that_fails_acknowledges_nothing_and_the_round_goes_on(
    stage: Stage, server: ServerHandle, clock: ManualClock
) -> None:
    scene = stage()
    number = all_advertise(scene)
    first, *others = scene.members
    first.until_asked("upload")
    bulk = first.contribution()
    writer = server.server.store._writer
    writer.execute("PRAGMA query_only = ON")
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            first.upload(number, bulk)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not server.server.store.find(ContributionRecord)
    writer.execute("PRAGMA query_only = OFF")
    clock.advance(2)
    for member in scene.members:
        member.upload(number)
    finish(scene, scene.members, number)
    assert others[0].sum(number) == {0b111}
