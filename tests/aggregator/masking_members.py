"""Scripted members with the real masking scheme."""

import os
from typing import Any

import numpy as np
from blindsum.crypto.schemes.base import MemberKeys, RoundTerms, frame_digest, upload_digest
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.trust.acceptance import sign_state
from blindsum.proto.v1 import round_pb2
from scripted_federation import CALL_SECONDS, Scene, ScriptedMember, build_scene

STEPS = ("advertise", "share", "upload", "confirm", "reveal")


class MaskingMember(ScriptedMember):
    """Keeps the exact bytes of every reply and upload, and sends only those again."""

    def reset(self) -> None:
        self.machine: Any = None
        self.kept: dict[str, bytes] = {}
        self.bulk = b""

    def start(self) -> None:
        bound = self.header()
        assert self.owner.roster is not None
        keys = MemberKeys(self.name, self.applicant.identity, self.owner.group_key)
        self.machine = scheme("masking").member(RoundTerms(bound, self.owner.roster), keys, os.urandom)

    def values(self) -> np.ndarray[Any, Any]:
        fields = self.header().header.fields
        return np.full(fields, 1 << self.index, np.uint32)

    def prepare(self, number: int, step: str) -> None:
        """Make the reply to a step, once."""
        if step in self.kept:
            return
        if step == "advertise":
            self.start()
        request = self.stub.GetStep(
            round_pb2.GetStepRequest(round=number, step=step), timeout=CALL_SECONDS
        ).request
        if step != "upload":
            self.kept[step] = self.machine.answer(step, request)
            return
        protector = self.machine.begin_upload(request)
        layout, values = protector.layout, self.values()
        frames = [protector.protect(i, values[slice(*layout.field_range(i))]) for i in range(layout.frames)]
        self.bulk = b"".join(frames)
        self.digest_sent = upload_digest(protector.h1, map(frame_digest, frames))
        self.kept[step] = self.machine.seal_upload(self.digest_sent)

    def admitted(self, number: int) -> round_pb2.BeginUploadResponse:
        return self.begin(number, self.bulk, digest=self.digest_sent, reply=self.kept["upload"])

    def perform(self, number: int, step: str) -> None:
        self.prepare(number, step)
        if step == "upload":
            begun = self.admitted(number)
            if not begun.done:
                self.send(begun.slot, self.bulk)
        else:
            self.answer(number, step, self.kept[step])

    def digest(self, bulk: bytes) -> bytes:
        return self.digest_sent

    def opened(self, number: int) -> tuple[tuple[str, ...], set[int]]:
        """Survivors and the distinct values of the opened sum."""
        result = self.stub.GetResult(round_pb2.GetResultRequest(round=number), timeout=CALL_SECONDS).result
        opener = self.machine.open_sum(result)
        data = self.download(round_pb2.BULK_KIND_SUM, number)
        values: set[int] = set()
        offset = 0
        for index in range(opener.layout.frames):
            size = opener.layout.result_bytes(index)
            values |= set(opener.open(index, data[offset : offset + size]).tolist())
            offset += size
        self.found = opener
        return opener.survivors, values

    def conclude(self, number: int, state: bytes) -> round_pb2.ConcludeResponse:
        signature = sign_state(
            self.applicant.identity,
            federation=self.owner.federation,
            h1=self.found.h1,
            index=self.header().header.state_round + 1,
            digest=state,
            survivors=self.found.survivors,
        )
        return self.stub.Conclude(
            round_pb2.ConcludeRequest(round=number, state=state, signature=signature), timeout=CALL_SECONDS
        )


def build_masking_scene(
    enrolment_port: int, member_port: int, ca_pem: bytes, count: int, **plan: Any
) -> Scene:
    """A federation whose members mask for real."""
    scene = build_scene(enrolment_port, member_port, ca_pem, count, plan)
    members = []
    for plain in scene.members:
        plain.close()
        member = MaskingMember(scene.owner, plain.applicant, plain.certificate, member_port, plain.index)
        member.reset()
        members.append(member)
    scene.members = list(members)
    return scene
