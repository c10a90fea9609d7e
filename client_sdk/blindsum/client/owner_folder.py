"""The owner's folder on disk: what nobody else has, and what was signed with it.

    owner.key         Ed25519 owner key           federation.bin   the federation's signed document
    group-<epoch>.key group key of each epoch     he-<digest>.key  HE secret keys
    policy.bin, roster.bin, plan.bin              the newest signed documents
    plan-epoch        key epoch of the plan's training state
    documents/        every document ever signed  invitations/     open invitations
    outbox.bin        signed and not acknowledged yet
    place.json        where the aggregator is     lock             held while the folder is written

Everything has mode 0600 in a folder of mode 0700; what was written is durable before it is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from blindsum.client.private_files import (
    FolderError,
    FolderLock,
    make_private_folder,
    read_private,
    remove_private,
    write_private,
)
from blindsum.crypto.canonical import (
    Document,
    Message,
    decode_document,
    decode_message,
    encode_document,
    encode_message,
)
from blindsum.crypto.primitives.derivation import same
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import SignedDocument, open_document, parse_signed
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.joining import FEDERATION_KIND, Federation, Invitation
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster

D = TypeVar("D", bound=Document)


class Place(Document, frozen=True, kw_only=True):
    """Where the federation's aggregator is. `ca` secures the connection and means nothing for trust."""

    enrolment_address: str
    member_address: str
    ca: str


class Outbox(Message, frozen=True):
    """A publication that was signed and isn't acknowledged yet."""

    documents: tuple[bytes, ...]
    envelopes: tuple[bytes, ...]
    he_public_keys: tuple[bytes, ...]


class OwnerFolder:
    """An open owner's folder. With `read_only` it takes no lock and only looks, while another process
    has it open too.

    Raises `FolderInUse`, `FolderError`.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if not (path / "owner.key").exists():
            raise FolderError(f"{path} isn't an owner's folder; make one with `blindsum owner init`")
        self._lock = None if read_only else FolderLock(path)
        try:
            self.key = SigningKey(read_private(path / "owner.key"))
            self.signed_federation = parse_signed(read_private(path / "federation.bin"))
            self.federation = open_document(
                self.signed_federation, self.key.public, FEDERATION_KIND, Federation
            )
            self.place = decode_document(read_private(path / "place.json"), Place, "place.json")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(
        path: Path, key: SigningKey, group: GroupKey, place: Place, federation: SignedDocument
    ) -> None:
        """Make a new folder. Raises `FolderError` unless it is new or empty."""
        make_private_folder(path)
        for part in ("documents", "invitations"):
            (path / part).mkdir(mode=0o700)
        write_private(path / "owner.key", key.secret_bytes())
        write_private(path / f"group-{group.epoch}.key", group.secret_bytes())
        write_private(path / "place.json", encode_document(place))
        write_private(path / "federation.bin", federation.to_bytes())

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()

    # Keys

    def group_key(self, epoch: int) -> GroupKey:
        """The group key of an epoch."""
        return GroupKey(read_private(self.path / f"group-{epoch}.key"), epoch)

    def keep_group_key(self, key: GroupKey) -> None:
        """Store the group key of its epoch."""
        write_private(self.path / f"group-{key.epoch}.key", key.secret_bytes())

    def he_secret(self, digest: bytes) -> bytes:
        """The secret key that belongs to an HE public key."""
        return read_private(self.path / f"he-{digest.hex()}.key")

    def keep_he_secret(self, digest: bytes, secret: bytes) -> None:
        """Store the secret key of an HE public key."""
        write_private(self.path / f"he-{digest.hex()}.key", secret)

    # Documents

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._document(policies.KIND, Policy)

    @property
    def roster(self) -> Roster:
        """The roster in force."""
        return self._document(rosters.KIND, Roster)

    @property
    def plan(self) -> Plan | None:
        """The newest plan, if any."""
        return self._document(plans.KIND, Plan) if (self.path / f"{plans.KIND}.bin").exists() else None

    @property
    def plan_epoch(self) -> int:
        """Key epoch under which the newest plan's training state is; 0 without a plan."""
        path = self.path / "plan-epoch"
        return int(read_private(path)) if path.exists() else 0

    def keep_plan_epoch(self, epoch: int) -> None:
        """Remember the key epoch of the newest plan."""
        write_private(self.path / "plan-epoch", str(epoch).encode())

    def signed(self, kind: str) -> SignedDocument:
        """The newest document of a kind, as it was signed."""
        return parse_signed(read_private(self.path / f"{kind}.bin"))

    def _document(self, kind: str, form: type[D]) -> D:
        return open_document(self.signed(kind), self.key.public, kind, form)

    def keep(self, signed: SignedDocument) -> None:
        """Store a document; it is the newest of its kind from now on."""
        data = signed.to_bytes()
        write_private(self.path / "documents" / f"{signed.digest.hex()}.bin", data)
        write_private(self.path / f"{signed.kind}.bin", data)

    def earlier_roster(self, digest: bytes) -> Roster:
        """The roster of this digest, signed here before; the one in force if there is none."""
        path = self.path / "documents" / f"{digest.hex()}.bin"
        if not digest or not path.exists():
            return self.roster
        signed = parse_signed(read_private(path))
        roster = open_document(signed, self.key.public, rosters.KIND, Roster)
        if not same(signed.digest, digest):
            raise FolderError(f"{path} holds another document than its name says; restore it from a backup")
        return roster

    # The outbox

    def fill_outbox(
        self,
        documents: Sequence[SignedDocument],
        envelopes: Sequence[bytes],
        he_public_keys: Sequence[bytes],
    ) -> None:
        """Make a publication durable before it is sent, so that a lost answer is no problem."""
        signed = tuple(document.to_bytes() for document in documents)
        outbox = Outbox(signed, tuple(envelopes), tuple(he_public_keys))
        write_private(self.path / "outbox.bin", encode_message(outbox))

    def outbox(self) -> Outbox | None:
        """The publication that waits for its acknowledgement."""
        path = self.path / "outbox.bin"
        return decode_message(read_private(path), Outbox, "the outbox") if path.exists() else None

    def empty_outbox(self) -> None:
        """The publication was acknowledged, or refused."""
        remove_private(self.path / "outbox.bin")

    # Invitations

    def keep_invitation(self, invitation: Invitation) -> Path:
        """Store an open invitation; where it is."""
        path = self._invitation_path(invitation.member)
        write_private(path, encode_document(invitation))
        return path

    def invitation(self, member: str) -> Invitation | None:
        """The open invitation under a name."""
        path = self._invitation_path(member)
        return decode_document(read_private(path), Invitation, "the invitation") if path.exists() else None

    def invited(self) -> list[str]:
        """Names that have an open invitation."""
        return sorted(path.stem for path in (self.path / "invitations").glob("*.json"))

    def drop_invitation(self, member: str) -> None:
        """Its token admits nobody any more."""
        remove_private(self._invitation_path(member))

    def _invitation_path(self, member: str) -> Path:
        return self.path / "invitations" / f"{member}.json"
