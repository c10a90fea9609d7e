"""The calls of `ExampleService`, for a member's line."""

from dataclasses import dataclass
from typing import Literal

from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples.sealed_example import SealedExample
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.proto.v1 import examples_pb2 as wire
from blindsum.proto.v1.examples_pb2_grpc import ExampleServiceStub

State = Literal["waiting", "taken", "withdrawn", "deleted"]

_STATES: dict[int, State] = {
    wire.EXAMPLE_STATE_WAITING: "waiting",
    wire.EXAMPLE_STATE_TAKEN: "taken",
    wire.EXAMPLE_STATE_WITHDRAWN: "withdrawn",
    wire.EXAMPLE_STATE_DELETED: "deleted",
}


def _named(state: int) -> State:
    name = _STATES.get(state)
    if name is None:
        raise Refused(RefusalReason.MALFORMED, "the aggregator says an unknown state of an example")
    return name


@dataclass(frozen=True)
class Waiting:
    """What waits for a receiver: an example to fetch, or a withdrawal to obey."""

    id: bytes
    sender: str
    state: State


class ExampleLine:
    """One method a call; all are idempotent and raise `Refused`, `Unreachable`."""

    def __init__(self, view: FederationView) -> None:
        self._line = view.line
        self._stub = ExampleServiceStub(view.line.channel)

    def put(self, example: SealedExample) -> None:
        """Leave a sealed example for its recipient. Anything else than a `SealedExample` is a `TypeError`."""
        if not isinstance(example, SealedExample):
            raise TypeError("only a SealedExample is sent")
        request = wire.PutExampleRequest(
            example=example.id, recipient=example.recipient, sealed=example.sealed
        )
        self._line.call(self._stub.PutExample, request, what="forwarding an example")

    def waiting(self) -> list[Waiting]:
        """What waits for this member."""
        answer = self._line.call(
            self._stub.ListExamples, wire.ListExamplesRequest(), what="listing forwarded examples"
        )
        return [Waiting(item.example, item.sender, _named(item.state)) for item in answer.items]

    def get(self, identifier: bytes) -> bytes:
        """The sealed bytes of an example that waits for this member."""
        request = wire.GetExampleRequest(example=identifier)
        return bytes(self._line.call(self._stub.GetExample, request, what="getting an example").sealed)

    def confirm_taken(self, identifier: bytes) -> None:
        """The example is stored here; the aggregator deletes its ciphertext."""
        self._confirm(identifier, wire.EXAMPLE_STATE_TAKEN)

    def confirm_deleted(self, identifier: bytes) -> None:
        """The withdrawn example is deleted here."""
        self._confirm(identifier, wire.EXAMPLE_STATE_DELETED)

    def _confirm(self, identifier: bytes, state: "wire.ExampleState.ValueType") -> None:
        request = wire.ConfirmExampleRequest(example=identifier, state=state)
        self._line.call(self._stub.ConfirmExample, request, what="confirming an example")

    def withdraw(self, identifier: bytes) -> State:
        """Take an example back."""
        request = wire.WithdrawExampleRequest(example=identifier)
        answer = self._line.call(self._stub.WithdrawExample, request, what="withdrawing an example")
        return _named(answer.state)

    def forwarded(self) -> dict[bytes, State]:
        """How far this member's own examples are, by id."""
        answer = self._line.call(
            self._stub.ListForwarded, wire.ListForwardedRequest(), what="asking for forwarded examples"
        )
        return {item.example: _named(item.state) for item in answer.items}
