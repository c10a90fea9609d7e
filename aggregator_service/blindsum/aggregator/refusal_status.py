"""The one table from a refusal to what the caller sees."""

import grpc
from blindsum.crypto.errors import RefusalReason

REASON_KEY = "blindsum-reason"
"""Trailing metadata that carries the `RefusalReason`."""

STATUS: dict[RefusalReason, grpc.StatusCode] = {
    RefusalReason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.WRONG_SIZE: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.OUT_OF_RANGE: grpc.StatusCode.INVALID_ARGUMENT,
    RefusalReason.WRONG_STEP: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalReason.CLOSED: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalReason.WRONG_ROUND: grpc.StatusCode.FAILED_PRECONDITION,
    RefusalReason.UNKNOWN_MEMBER: grpc.StatusCode.UNAUTHENTICATED,
    RefusalReason.EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    RefusalReason.NOT_A_PARTICIPANT: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.SIGNATURE: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.POLICY: grpc.StatusCode.PERMISSION_DENIED,
    RefusalReason.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    RefusalReason.REPLAY: grpc.StatusCode.ALREADY_EXISTS,
    RefusalReason.WRONG_DIGEST: grpc.StatusCode.DATA_LOSS,
    RefusalReason.WRONG_OFFSET: grpc.StatusCode.OUT_OF_RANGE,
    RefusalReason.LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
