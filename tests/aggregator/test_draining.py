"""A server that shuts down lets what runs end, and begins nothing new."""

import asyncio
import hashlib

from blindsum.aggregator.embedding import ServerHandle
from blindsum.aggregator.store.records import RoundRecord
from blindsum.aggregator.store.sqlite_reader import SqliteReader
from blindsum.proto.v1 import round_pb2
from scripted_federation import ScriptedMember, Stage, state_after


def begin_checkpoint(member: ScriptedMember, number: int, sealed: bytes) -> round_pb2.UploadSlot:
    request = round_pb2.BeginUploadRequest(
        round=number,
        kind=round_pb2.BULK_KIND_CHECKPOINT,
        total=len(sealed),
        digest=hashlib.sha256(sealed).digest(),
        reply=state_after(number),
    )
    answer = member.stub.BeginUpload(request)
    assert answer.WhichOneof("answer") == "slot"
    return answer.slot


def test_a_draining_server_concludes_a_round_and_opens_no_other(stage: Stage, server: ServerHandle) -> None:
    scene = stage(rounds=2)
    number = scene.run_steps()
    for member in scene.members:
        member.conclude(number, state_after(number))
    keeper, other = scene.members[:2]
    keeper.until(lambda r: r.round.checkpoint_wanted)
    slot = begin_checkpoint(keeper, number, b"sealed by one")
    second = begin_checkpoint(other, number, b"sealed by another")
    engine = next(iter(server.server.engines.values()))
    stopping = asyncio.run_coroutine_threadsafe(server.server.stop(grace=2.0, drain=30), server._loop)
    # What was submitted to the loop before this has begun when this is over.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), server._loop).result(20)
    assert not server.server.readiness.ready
    keeper.send(slot, b"sealed by one")
    # The second upload keeps the server from stopping, so that there is time for a round to open.
    keeper.until(lambda r: r.state == state_after(number))
    assert engine.waits_for() == "the aggregator is shutting down"
    other.send(second, b"sealed by another")
    stopping.result(30)
    with SqliteReader(server.server.settings.data_dir / "state.sqlite") as state:
        assert [(row.number, row.state) for row in state.find(RoundRecord)] == [(number, "concluded")]
