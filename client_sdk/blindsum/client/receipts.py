"""A member's receipts: what `submit` returns and `Member.receipts` lists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from blindsum.client.member_folder import MemberFolder, StoredReceipt
from blindsum.crypto.canonical import decode_document, decode_message
from blindsum.crypto.errors import DocumentError, Refused
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import open_document, parse_signed
from blindsum.crypto.trust.receipt import Receipt, SignedReceipt, verify_receipt
from blindsum.crypto.trust.roster import Roster


@dataclass(frozen=True)
class RoundReceipt:
    """A finished round as one member saw it.

    `receipt` is the same at every survivor; `signed` its bytes with this member's signature, to show to
    others. `metrics` are the means over the survivors, `sum_digest` the digest of all summed fields,
    `max_error` the largest distance from an integer before rounding (ckks, else 0): those stay here.
    """

    receipt: Receipt
    signed: bytes = field(repr=False)
    metrics: Mapping[str, float]
    sum_digest: bytes = field(repr=False)
    max_error: float = 0.0

    @classmethod
    def of(cls, stored: StoredReceipt) -> "RoundReceipt":
        """The receipt in a member's folder."""
        signed = decode_message(stored.body, SignedReceipt, "a receipt")
        receipt = decode_document(signed.body, Receipt, "a receipt")
        return cls(receipt, stored.body, stored.metrics, stored.sum_digest, stored.max_error)

    @property
    def round(self) -> int:
        """The round's number."""
        return self.receipt.round

    @property
    def survivors(self) -> int:
        """How many members the sum is over."""
        return self.receipt.survivor_count

    @property
    def trust(self) -> str:
        """Who would have to collude to learn an update."""
        return self.receipt.trust

    @property
    def transcript(self) -> str:
        """The history's digest after this round, hexadecimal: equal at two members that saw the same."""
        return self.receipt.transcript().hex()


def known_rosters(folder: MemberFolder) -> list[Roster]:
    """Every roster that this member followed, verified, oldest first: in them are those who left since.

    Raises `DocumentError` before the first one.
    """
    found = [
        open_document(parse_signed(data), folder.pin.owner, rosters.KIND, Roster) for data in folder.rosters()
    ]
    if not found:
        raise DocumentError(f"{folder.path} has seen no roster yet; run the member first")
    return found


def verify_receipts(receipts: Sequence[bytes], known: Sequence[Roster]) -> list[Receipt]:
    """The receipts in signed bytes: each signature checked, and that neighbours in time are chained.

    `known` are the rosters whose members may have signed, oldest first. Members that came late, or missed
    rounds, have gaps in their history; a receipt whose predecessor is here must continue it. Raises
    `DocumentError` or `Refused` naming the round.
    """
    found = sorted((_verified(data, known) for data in receipts), key=lambda receipt: receipt.round)
    for receipt in found[1:]:
        if receipt.federation != found[0].federation:
            raise DocumentError("these receipts are of two federations; verify each one's alone")
    by_transcript = {receipt.transcript(): receipt for receipt in found}
    for earlier, later in pairwise(found):
        parent = by_transcript.get(later.previous)
        if earlier.round == later.round and earlier != later:
            raise DocumentError(
                f"two receipts of round {later.round} differ: their members saw two histories"
            )
        if parent is not None and parent.round >= later.round:
            raise DocumentError(f"the receipt of round {later.round} continues a later one")
    return found


def _verified(data: bytes, known: Sequence[Roster]) -> Receipt:
    problem: DocumentError | Refused = DocumentError("there is no roster to verify receipts with; give one")
    for roster in reversed(known):
        try:
            return verify_receipt(data, roster)
        except (DocumentError, Refused) as error:
            problem = error
    raise problem


def gaps(receipts: Sequence[Receipt]) -> list[int]:
    """Rounds whose receipt doesn't continue the one before it in the list: something lies in between."""
    return [
        later.round
        for earlier, later in pairwise(receipts)
        if later.previous != earlier.transcript() and later != earlier
    ]
