"""Hard and unknown examples: find them at the edge, forward them sealed and with consent, train on them."""

from blindsum.client.hard_examples.audit_trail import AuditBroken, AuditLine
from blindsum.client.hard_examples.dicom import DicomRefused, ScrubbedImage, read_dicom, scrub
from blindsum.client.hard_examples.intake import Intake, NotHeld, ReceivedExample
from blindsum.client.hard_examples.replay import ReplayBatch, replay_batches
from blindsum.client.hard_examples.review_queue import (
    Forwarding,
    ForwardingOff,
    QueuedExample,
    QuotaReached,
    ReviewQueue,
    WrongState,
)
from blindsum.client.hard_examples.scores import Novelty, auroc, doubt
from blindsum.client.hard_examples.sealed_example import Consent, ConsentMissing, Example, Letter
from blindsum.client.hard_examples.selection import Proposal, propose

__all__ = [
    "AuditBroken",
    "AuditLine",
    "Consent",
    "ConsentMissing",
    "DicomRefused",
    "Example",
    "Forwarding",
    "ForwardingOff",
    "Intake",
    "Letter",
    "NotHeld",
    "Novelty",
    "Proposal",
    "QueuedExample",
    "QuotaReached",
    "ReceivedExample",
    "ReplayBatch",
    "ReviewQueue",
    "ScrubbedImage",
    "WrongState",
    "auroc",
    "doubt",
    "propose",
    "read_dicom",
    "replay_batches",
    "scrub",
]
