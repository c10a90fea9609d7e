"""What a member knows of its federation, outside of rounds: roster, policy, group key, and a line to the
server.

For what a member does beside training (publishing models, forwarding examples). It takes the folder's lock
only while it fetches newer documents, so that a `Member` may run at the same time.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from blindsum.client.member_folder import MemberFolder, Pin
from blindsum.client.owner_documents import OwnerDocuments
from blindsum.client.private_files import FolderError, FolderInUse
from blindsum.client.transport import DEFAULT, MemberLine, Patience
from blindsum.crypto.primitives.sealing import HpkeKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from blindsum.crypto.trust.round_check import require_valid


class FederationView:
    """A member's verified view. `open` it, `close` it, or use `with`. It doesn't print its keys."""

    def __init__(
        self,
        path: Path,
        folder: MemberFolder,
        documents: OwnerDocuments,
        line: MemberLine,
    ) -> None:
        assert documents.roster is not None
        assert documents.policy is not None
        self.path = path
        self.line = line
        self.pin: Pin = folder.pin
        self.identity: SigningKey = folder.identity
        self.hpke: HpkeKey = folder.hpke
        self.roster: Roster = documents.roster
        self.policy: Policy = documents.policy
        self.group_key: GroupKey | None = documents.group_key

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        patience: Patience = DEFAULT,
        fetch: bool = True,
        now: Callable[[], float] = time.time,
    ) -> Self:
        """The view from a member's folder, with newer documents from the aggregator if `fetch`.

        Where a `Member` has the folder open, that member fetches. Raises `FolderError` for a member that
        wasn't admitted yet or has no roster, `DocumentError`, `Refused` and `Unreachable` from fetching, and
        `PolicyViolation` if `fetch` found no roster and policy that are still valid: who was removed since
        can't be known then.
        """
        place, newest = Path(path), fetch
        try:
            folder = MemberFolder(place, read_only=not fetch)
        except FolderInUse:
            fetch = False
            folder = MemberFolder(place, read_only=True)
        with folder:
            if not folder.certificate:
                raise FolderError(
                    f"{place} wasn't admitted yet; ask the owner, then run `blindsum join` again"
                )
            pin = folder.pin
            line = MemberLine(
                pin.member_address,
                pin.ca,
                key=folder.transport_key,
                certificate=folder.certificate,
                patience=patience,
            )
            try:
                documents = OwnerDocuments(folder, line)
                if fetch:
                    documents.follow(line.first_notice())
                if documents.roster is None or documents.policy is None:
                    raise FolderError(f"{place} has no roster yet; connect it to the aggregator once")
                if newest:
                    require_valid(documents.policy, documents.roster, now())
                return cls(place, folder, documents, line)
            except BaseException:
                line.close()
                raise

    @property
    def name(self) -> str:
        """The member's name."""
        return self.pin.member

    def close(self) -> None:
        """Close the line."""
        self.line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FederationView of {self.name}>"
