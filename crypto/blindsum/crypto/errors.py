"""Every error that Blindsum raises on purpose.

An error names the thing at fault, says what to do next, and never carries a secret. `Refused` is what
a machine answers to bytes it will not accept: nothing changed, and the reason is also a metric label.
"""

from enum import StrEnum


class BlindsumError(Exception):
    """Base of every error raised on purpose."""


class RefusalReason(StrEnum):
    """Why input was refused: one word for the wire, the logs and the metrics."""

    MALFORMED = "malformed"
    WRONG_SIZE = "wrong_size"
    WRONG_STEP = "wrong_step"
    WRONG_ROUND = "wrong_round"
    WRONG_DIGEST = "wrong_digest"
    WRONG_OFFSET = "wrong_offset"
    UNKNOWN_MEMBER = "unknown_member"
    NOT_A_PARTICIPANT = "not_a_participant"
    SIGNATURE = "signature"
    CONFLICT = "conflict"
    CLOSED = "closed"
    OUT_OF_RANGE = "out_of_range"
    REPLAY = "replay"
    EXPIRED = "expired"
    LIMIT = "limit"
    POLICY = "policy"


class Refused(BlindsumError):
    """Input that was refused before any state was touched.

    `reason` is a `RefusalReason`; the text says which part of the input was at fault.
    """

    def __init__(self, reason: RefusalReason, text: str) -> None:
        super().__init__(f"{text} [{reason.value}]")
        self.reason = reason
        self.text = text


class ServerViolation(BlindsumError):
    """The aggregator sent something that an honest one never sends; the member answers no more.

    `check` is a short stable name of the check that failed (used by test vectors).
    """

    def __init__(self, check: str, text: str) -> None:
        super().__init__(f"{text} [{check}]. The member has stopped answering this round.")
        self.check = check


class PolicyViolation(BlindsumError):
    """A document or round that undercuts the policy which the member has pinned."""


class DocumentError(BlindsumError):
    """A signed document that can't be accepted: signature, federation, version or date is wrong."""


class EncodingError(BlindsumError):
    """A tensor, weight or metric that can't be encoded. `name` is the tensor or metric at fault."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


class ParameterRefused(BlindsumError):
    """Parameters for which no overflow-free, secure set-up exists. The text says what would fit."""


class SumCheckFailed(BlindsumError):
    """The opened sum isn't the sum of what the survivors sent; nothing was output."""


class OpeningFailed(BlindsumError):
    """A sealed sum, ciphertext or envelope didn't open; nothing was output."""


class StateMismatch(BlindsumError):
    """The training state differs from the one that the federation agreed on; the member stops."""


class RoundAborted(BlindsumError):
    """The round ended without a sum. `round` is its number, the text the reason."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"round {number} was aborted: {text}")
        self.round = number


class MissingExtra(BlindsumError):
    """An optional dependency is not installed. The text names the extra to install."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'blindsum[{extra}]'")
        self.extra = extra


class UnsupportedPlatform(BlindsumError):
    """The operating system lacks something that a scheme can't do without. The text says what."""
