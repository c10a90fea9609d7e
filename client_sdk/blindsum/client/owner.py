"""The owner's side: founds a federation, admits members, signs roster, policy and plan.

The owner's folder holds what nobody else has: the owner key, the group key of every epoch, HE secret keys.
The owner is offline most of the time; the aggregator only stores and relays what was signed here.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

import msgspec
from blindsum.client.layout import EVERYTHING, StateDict, arrays, dress, framework_of, layout_of
from blindsum.client.member import FRAMEWORK_SETTING
from blindsum.client.private_files import (
    FolderError,
    FolderLock,
    make_private_folder,
    read_private,
    remove_private,
    write_private,
)
from blindsum.client.transport import CHUNK_BYTES, DEFAULT, EnrolmentLine, Patience
from blindsum.crypto.canonical import (
    Document,
    Message,
    decode_document,
    decode_message,
    encode_document,
    encode_message,
)
from blindsum.crypto.encoding.vector import VectorPlan, field_count
from blindsum.crypto.errors import DocumentError, ParameterRefused, RefusalReason, Refused, StateMismatch
from blindsum.crypto.primitives.derivation import same, system_random
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.homomorphic.cipher import (
    CipherParameters,
    choose_parameters,
    generate_keys,
    restore_parameters,
)
from blindsum.crypto.schemes.registry import SCHEME_NAMES
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.acceptance import StateClaim, accept_state
from blindsum.crypto.trust.documents import (
    SignedDocument,
    fingerprint,
    open_document,
    parse_signed,
    sign_document,
)
from blindsum.crypto.trust.envelope import seal_group_key, seal_he_key
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.joining import (
    FEDERATION_KIND,
    REFUSAL_KIND,
    Federation,
    Invitation,
    JoinBody,
    Refusal,
    check_request_signature,
    check_token,
    prove_owner,
    token_id,
)
from blindsum.crypto.trust.plan import Deadlines, Encoding, Metric, Plan
from blindsum.crypto.trust.policy import Policy, SchemeName, Weighting
from blindsum.crypto.trust.roster import HeKey, Roster, RosterEntry
from blindsum.crypto.trust.strategy import Strategy
from blindsum.crypto.trust.training_state import (
    TrainingState,
    open_checkpoint,
    seal_checkpoint,
    sealed_checkpoint_bytes,
)
from blindsum.proto.v1 import enrolment_pb2

DAY: Final = 86_400
VALID_DAYS: Final = 30
INVITATION_DAYS: Final = 14
D = TypeVar("D", bound=Document)

MetricRange = tuple[float, float] | tuple[float, float, float]
"""(low, high) or (low, high, resolution)."""


class Place(Document, frozen=True, kw_only=True):
    """Where the federation's aggregator is. `ca` secures the connection and means nothing for trust."""

    enrolment_address: str
    member_address: str
    ca: str


class _Outbox(Message, frozen=True):
    """A publication that was signed and isn't acknowledged yet."""

    documents: tuple[bytes, ...]
    envelopes: tuple[bytes, ...]
    he_public_keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Application:
    """A request to be admitted. `problem` says why it can't be, if so."""

    member: str
    organisation: str
    request_id: bytes
    body: JoinBody
    problem: str = ""

    @property
    def fingerprint(self) -> str:
        """What the applicant's device shows too: compare it by telephone."""
        return fingerprint(self.body.identity)


class Owner:
    """An open owner's folder. `init` makes one, `open` opens it; `close` it, or use `with`."""

    def __init__(
        self, path: Path, *, patience: Patience = DEFAULT, now: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._lock = FolderLock(path)
        self._now = now
        try:
            self._key = SigningKey(read_private(path / "owner.key"))
            self._signed_federation = parse_signed(read_private(path / "federation.bin"))
            self.federation = open_document(
                self._signed_federation, self._key.public, FEDERATION_KIND, Federation
            )
            self.place = decode_document(read_private(path / "place.json"), Place, "place.json")
            self._line = EnrolmentLine(self.place.enrolment_address, self.place.ca, patience)
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def init(
        cls,
        folder: str | os.PathLike[str],
        name: str,
        *,
        enrolment_address: str,
        member_address: str,
        ca: str,
        schemes: Sequence[str] = SCHEME_NAMES,
        n_min: int = 3,
        n_max: int = 128,
        valid_days: int = VALID_DAYS,
        patience: Patience = DEFAULT,
        **policy: Any,
    ) -> "Owner":
        """Found a federation: keys, its document, the first policy and an empty roster, in a new folder.

        `ca` is the PEM of the operator's transport authority; `policy` sets further fields of `Policy`.
        Nothing is sent yet: `register` does that, once the server's operator allows the owner key.
        """
        now = int(time.time())
        key = SigningKey.generate()
        federation = Federation(name=name, owner=key.public, founded=now, nonce=system_random(32))
        group = GroupKey.generate(1)
        first = _checked(
            Policy,
            federation=federation.id,
            version=1,
            valid_until=now + valid_days * DAY,
            schemes=tuple(schemes),
            n_min=n_min,
            n_max=n_max,
            **policy,
        )
        roster = Roster(
            federation=federation.id,
            version=1,
            valid_until=now + valid_days * DAY,
            epoch=1,
            group_key=group.key_id,
            he_keys=(),
            members=(),
        )
        path = Path(folder)
        make_private_folder(path)
        for part in ("documents", "invitations"):
            (path / part).mkdir(mode=0o700)
        place = Place(enrolment_address=enrolment_address, member_address=member_address, ca=ca)
        write_private(path / "owner.key", key.secret_bytes())
        write_private(path / "group-1.key", group.secret_bytes())
        write_private(path / "place.json", encode_document(place))
        write_private(path / "federation.bin", sign_document(key, FEDERATION_KIND, federation).to_bytes())
        owner = cls(path, patience=patience)
        owner._keep(sign_document(key, policies.KIND, first))
        owner._keep(sign_document(key, rosters.KIND, roster))
        return owner

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, patience: Patience = DEFAULT) -> "Owner":
        """Open an owner's folder and lock it. Raises `FolderInUse`, `FolderError`."""
        return cls(Path(folder), patience=patience)

    def close(self) -> None:
        """Close the connection and unlock the folder."""
        self._line.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Owner of {self.federation.name}>"

    # What is in force

    @property
    def public_key(self) -> bytes:
        """The owner's public key: the server's operator lists it, members pin it."""
        return self._key.public

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
    def group_key(self) -> GroupKey:
        """The group key of the roster's epoch."""
        return self._group_key(self.roster.epoch)

    def _group_key(self, epoch: int) -> GroupKey:
        return GroupKey(read_private(self.path / f"group-{epoch}.key"), epoch)

    def _signed(self, kind: str) -> SignedDocument:
        return parse_signed(read_private(self.path / f"{kind}.bin"))

    def _document(self, kind: str, form: type[D]) -> D:
        return open_document(self._signed(kind), self._key.public, kind, form)

    def _keep(self, signed: SignedDocument) -> None:
        data = signed.to_bytes()
        write_private(self.path / "documents" / f"{signed.digest.hex()}.bin", data)
        write_private(self.path / f"{signed.kind}.bin", data)

    # The aggregator

    def register(self) -> None:
        """Create the federation at the aggregator and publish policy and roster. Idempotent.

        Raises `Refused` (policy) as long as the operator hasn't allowed the owner key.
        """
        request = enrolment_pb2.CreateFederationRequest(document=self._signed_federation.to_bytes())
        self._line.call(self._line.stub.CreateFederation, request, what="registering the federation")
        self._send_outbox()
        roster = self._signed(rosters.KIND)
        self._publish((self._signed(policies.KIND), roster), self._envelopes(self.roster, roster.digest))

    def _publish(
        self,
        documents: Sequence[SignedDocument],
        envelopes: Sequence[bytes] = (),
        he_public_keys: Sequence[bytes] = (),
    ) -> None:
        """Publish all or none; what was signed is durable first, so that a lost answer is no problem."""
        self._send_outbox()
        outbox = _Outbox(
            tuple(signed.to_bytes() for signed in documents), tuple(envelopes), tuple(he_public_keys)
        )
        write_private(self.path / "outbox.bin", encode_message(outbox))
        self._send_outbox()

    def _send_outbox(self) -> None:
        path = self.path / "outbox.bin"
        if not path.exists():
            return
        outbox = decode_message(read_private(path), _Outbox, "the outbox")
        request = enrolment_pb2.PublishRequest(
            federation=self.federation.id,
            documents=outbox.documents,
            envelopes=outbox.envelopes,
            he_public_keys=outbox.he_public_keys,
        )
        try:
            self._line.call(self._line.stub.Publish, request, what="publishing")
        except Refused:
            remove_private(path)
            raise
        for data in outbox.documents:
            signed = parse_signed(data)
            if signed.kind != REFUSAL_KIND:
                self._keep(signed)
        remove_private(path)

    def _proof(self, verb: str, *fields: bytes) -> enrolment_pb2.OwnerProof:
        now = int(self._now())
        signature = prove_owner(self._key, verb, self.federation.id, now, *fields)
        return enrolment_pb2.OwnerProof(federation=self.federation.id, time=now, signature=signature)

    # Members

    def invite(self, member: str, *, days: int = INVITATION_DAYS) -> Path:
        """Invite one member under this name; returns the invitation's file (0600), to hand over safely.

        The token in it admits one member. Inviting again replaces the token.
        """
        if member in self.roster.position:
            raise DocumentError(f"{member!r} is a member already; choose another name, or remove it first")
        invitation = _checked(
            Invitation,
            federation=self.federation.id,
            federation_name=self.federation.name,
            owner=self._key.public,
            enrolment_address=self.place.enrolment_address,
            member_address=self.place.member_address,
            ca=self.place.ca,
            token=system_random(32),
            member=member,
            valid_until=int(self._now()) + days * DAY,
        )
        path = self.path / "invitations" / f"{member}.json"
        write_private(path, encode_document(invitation))
        return path

    def invited(self) -> list[str]:
        """Names that have an open invitation."""
        return sorted(path.stem for path in (self.path / "invitations").glob("*.json"))

    def pending(self) -> list[Application]:
        """Requests that wait for an answer, each checked: signature, invitation, token, date."""
        request = enrolment_pb2.ListJoinRequestsRequest(proof=self._proof("ListJoinRequests"))
        answer = self._line.call(self._line.stub.ListJoinRequests, request, what="listing the requests")
        found = [self._application(pending) for pending in answer.pending]
        return sorted(found, key=lambda one: (one.member, one.request_id))

    def _application(self, pending: enrolment_pb2.ListJoinRequestsResponse.Pending) -> Application:
        body = decode_document(pending.body, JoinBody, "a join request")
        problem = ""
        try:
            check_request_signature(body.identity, pending.signature, pending.body)
            invitation = self._invitation(body.id)
            if body.federation != self.federation.id:
                raise Refused(RefusalReason.POLICY, "it is for another federation")
            if invitation is None or token_id(invitation.token) != pending.token_id:
                raise Refused(RefusalReason.POLICY, "there is no such invitation")
            if self._now() > invitation.valid_until:
                raise Refused(RefusalReason.EXPIRED, "its invitation has expired")
            check_token(invitation.token, pending.token_mac, pending.body)
        except Refused as refusal:
            problem = refusal.text
        return Application(body.id, body.organisation, pending.request_id, body, problem)

    def _invitation(self, member: str) -> Invitation | None:
        path = self.path / "invitations" / f"{member}.json"
        if not path.exists():
            return None
        return decode_document(read_private(path), Invitation, "the invitation")

    def admit(self, *members: str) -> list[str]:
        """Admit applicants by name (all whose request is in order, if none is named); who was admitted.

        Signs the next roster and a key envelope for every member. Raises `DocumentError` for a name whose
        request is missing or has a problem.
        """
        self._send_outbox()
        waiting = self.pending()
        if members:
            chosen = []
            for name in members:
                fitting = [one for one in waiting if one.member == name and not one.problem]
                if not fitting:
                    problems = [one.problem for one in waiting if one.member == name] or [
                        "it hasn't asked yet"
                    ]
                    raise DocumentError(f"{name!r} can't be admitted: {problems[0]}")
                if len(fitting) > 1:
                    raise DocumentError(
                        f"{name!r} asked {len(fitting)} times with different keys; refuse it and invite again"
                    )
                chosen.append(fitting[0])
        else:
            names = [one.member for one in waiting if not one.problem]
            chosen = [one for one in waiting if not one.problem and names.count(one.member) == 1]
        if not chosen:
            return []
        entries = [
            RosterEntry(
                id=one.member,
                organisation=one.organisation,
                identity=one.body.identity,
                hpke=one.body.hpke,
            )
            for one in chosen
        ]
        roster = self.roster
        kept = [entry for entry in roster.members if entry.id not in {one.member for one in chosen}]
        self._publish_roster(
            replace_document(roster, members=tuple(sorted((*kept, *entries), key=lambda entry: entry.id)))
        )
        for one in chosen:
            remove_private(self.path / "invitations" / f"{one.member}.json")
        return [one.member for one in chosen]

    def refuse(self, member: str, reason: str) -> int:
        """Refuse every waiting request under this name; how many there were."""
        refused = [
            sign_document(
                self._key,
                REFUSAL_KIND,
                Refusal(federation=self.federation.id, request_id=one.request_id, reason=reason),
            )
            for one in self.pending()
            if one.member == member
        ]
        if refused:
            self._publish(refused)
        return len(refused)

    def remove(self, *members: str) -> None:
        """Remove members. Group key and HE keys change, and a running plan goes on under the new ones."""
        self._send_outbox()
        roster = self.roster
        for member in members:
            roster.entry(member)
        left = tuple(entry for entry in roster.members if entry.id not in members)
        self._rotate(replace_document(roster, members=left))

    def rotate(self) -> None:
        """Change group key and HE keys without removing anyone."""
        self._send_outbox()
        self._rotate(self.roster)

    def _rotate(self, roster: Roster) -> None:
        """Publish the roster under new keys; the newest training state is sealed anew as the plan's S_0."""
        plan = self.plan
        carried = self._newest_state() if plan is not None else None
        group = GroupKey.generate(roster.epoch + 1)
        write_private(self.path / f"group-{group.epoch}.key", group.secret_bytes())
        pairs = [
            self._new_he_key(key.scheme, _parameters(key), key.bits, key.n_max) for key in roster.he_keys
        ]
        fresh = replace_document(
            roster,
            epoch=group.epoch,
            group_key=group.key_id,
            he_keys=tuple(key for key, _ in pairs),
        )
        documents: list[SignedDocument] = []
        if plan is not None and carried is not None and carried.index < plan.rounds:
            state = replace(carried, index=0)
            continued = replace_document(
                plan,
                version=plan.version + 1,
                rounds=plan.rounds - carried.index,
                cohort_wanted=max(plan.cohort_min, min(plan.cohort_wanted, len(roster.members))),
                initial_state=state.digest(group),
                layout=state.layout.digest(group),
            )
            signed = sign_document(self._key, plans.KIND, continued)
            self._publish_state(state, group, signed)
            documents.append(signed)
        self._publish_roster(fresh, documents, [public for _, public in pairs])

    def _publish_roster(
        self,
        roster: Roster,
        others: Sequence[SignedDocument] = (),
        he_public_keys: Sequence[bytes] = (),
        days: int = VALID_DAYS,
    ) -> None:
        following = replace_document(
            roster, version=self.roster.version + 1, valid_until=int(self._now()) + days * DAY
        )
        signed = sign_document(self._key, rosters.KIND, following)
        self._publish((signed, *others), self._envelopes(following, signed.digest), he_public_keys)

    def _envelopes(self, roster: Roster, digest: bytes) -> list[bytes]:
        group = self._group_key(roster.epoch)
        sealed = []
        for entry in roster.members:
            sealed.append(seal_group_key(self._key, group, roster, digest, entry.id).to_bytes())
            for key in roster.he_keys:
                secret = read_private(self.path / f"he-{key.digest.hex()}.key")
                sealed.append(seal_he_key(self._key, key.scheme, secret, roster, digest, entry.id).to_bytes())
        return sealed

    # Policy

    def set_policy(self, *, days: int = VALID_DAYS, **changes: Any) -> Policy:
        """Sign and publish the next policy version; a running plan is signed anew under it.

        Raises `ParameterRefused` for values that make no policy, `PolicyViolation` if the plan undercuts it.
        """
        self._send_outbox()
        before = self.policy
        following = replace_document(
            before, **changes, version=before.version + 1, valid_until=int(self._now()) + days * DAY
        )
        signed = sign_document(self._key, policies.KIND, following)
        documents = [signed]
        plan = self.plan
        if plan is not None:
            renewed = replace_document(plan, version=plan.version + 1, policy=signed.digest)
            renewed.check_against(following)
            signed_plan = sign_document(self._key, plans.KIND, renewed)
            state = self._newest_state()
            if state.index == 0:
                self._publish_state(state, self.group_key, signed_plan)
            documents.append(signed_plan)
        self._publish(documents)
        return following

    def renew(self, days: int = VALID_DAYS) -> None:
        """Sign roster and policy again, valid for so many days from now."""
        self.set_policy(days=days)
        self._publish_roster(self.roster, days=days)

    # Training

    def start_plan(
        self,
        name: str,
        model: StateDict,
        *,
        rounds: int,
        scheme: SchemeName = "masking",
        shared: Sequence[str] = EVERYTHING,
        weighting: Weighting = "sqrt",
        max_examples: int = 4096,
        weight_ratio: int | None = None,
        bits: int = 16,
        clip_tolerance: int = 1000,
        metrics: Mapping[str, MetricRange] | Sequence[Metric] = (),
        cohort_min: int | None = None,
        cohort_wanted: int | None = None,
        cohort_max: int | None = None,
        deadlines: Deadlines | None = None,
        strategy: str = "fedavg",
        settings: Mapping[str, str] | None = None,
        range_exponent: int | None = None,
    ) -> Plan:
        """Sign a training job and publish it with its first state; members begin as soon as enough are ready.

        `model` is a state dict (torch or numpy); `shared` patterns choose what of it is trained together.
        `weighting` "sqrt", "size" or "equal" of the examples; more than `max_examples` is refused at the
        member. `metrics`: name -> (low, high[, resolution]). `range_exponent` e: updates up to 2^e at first.

        Raises `EncodingError`, `ParameterRefused`, `PolicyViolation` naming what doesn't fit, `Refused`.
        """
        self._send_outbox()
        policy, roster, group = self.policy, self.roster, self.group_key
        layout = layout_of(model, shared)
        server_side = Strategy.parse(strategy, dict(settings or {}))
        exponents = None if range_exponent is None else [range_exponent] * len(layout.sizes)
        state = TrainingState.initial(
            self.federation.id,
            layout,
            arrays(model, layout.names),
            exponents=exponents,
            strategy=server_side,
        )
        before = self.plan
        members = len(roster.members)
        lowest = cohort_min or policy.n_min
        highest = cohort_max or min(policy.n_max, max(16, lowest, members))
        encoding = _checked(
            Encoding,
            bits=bits,
            weighting=weighting,
            max_examples=max_examples,
            weight_ratio=weight_ratio or min(16, policy.max_weight_ratio),
            clip_tolerance=clip_tolerance,
            metrics=_metrics(metrics),
        )
        plan = _checked(
            Plan,
            federation=self.federation.id,
            name=name,
            version=1 if before is None else before.version + 1,
            policy=self._signed(policies.KIND).digest,
            scheme=scheme,
            rounds=rounds,
            initial_state=state.digest(group),
            layout=layout.digest(group),
            dimension=layout.dimension,
            tensors=len(layout.sizes),
            cohort_min=lowest,
            cohort_wanted=min(cohort_wanted or max(members, lowest), highest),
            cohort_max=highest,
            encoding=encoding,
            deadlines=deadlines or Deadlines(),
            strategy=strategy,
            settings={FRAMEWORK_SETTING: framework_of(model), **(settings or {})},
        )
        plan.check_against(policy)
        VectorPlan.of(plan, layout)
        made = self._he_key_for(plan, roster)
        signed = sign_document(self._key, plans.KIND, plan)
        self._publish_state(state, group, signed)
        if made is None:
            self._publish((signed,))
        else:
            key, public = made
            others = tuple(held for held in roster.he_keys if held.scheme != key.scheme)
            self._publish_roster(replace_document(roster, he_keys=(*others, key)), (signed,), (public,))
        return plan

    def _he_key_for(self, plan: Plan, roster: Roster) -> tuple[HeKey, bytes] | None:
        """A new HE key where the roster's doesn't fit the plan."""
        if plan.scheme == "masking":
            return None
        policy = self.policy
        wanted = choose_parameters(
            plan.scheme,
            plan.encoding.bits,
            plan.cohort_max,
            form="seeded" if policy.seeded_uploads else "public-key",
            length=field_count(plan),
            modulus_bits=policy.paillier_bits,
            minimum_security=_security(plan.scheme, policy.paillier_bits),
        )
        held = roster.he_key(plan.scheme)
        if held is not None and (held.parameters, held.bits, held.n_max) == (
            wanted.name,
            wanted.bits,
            wanted.n_max,
        ):
            return None
        return self._new_he_key(plan.scheme, wanted, wanted.bits, wanted.n_max)

    def _new_he_key(
        self, scheme: str, parameters: CipherParameters, bits: int, n_max: int
    ) -> tuple[HeKey, bytes]:
        pair = generate_keys(parameters)
        digest = hashlib.sha256(pair.public).digest()
        write_private(self.path / f"he-{digest.hex()}.key", pair.secret)
        return HeKey(
            scheme=scheme, parameters=parameters.name, bits=bits, n_max=n_max, digest=digest
        ), pair.public

    def _publish_state(self, state: TrainingState, key: GroupKey, plan: SignedDocument) -> None:
        """Send S_0, sealed to the members under the plan's digest."""
        digest = state.digest(key)
        total = sealed_checkpoint_bytes(state)
        proof = self._proof("PublishCheckpoint", digest, total.to_bytes(8, "little"))
        sealed = list(seal_checkpoint(state, key, plan.digest))

        def parts() -> Iterator[enrolment_pb2.PublishCheckpointRequest]:
            start = enrolment_pb2.PublishCheckpointStart(proof=proof, state=digest, total=total)
            yield enrolment_pb2.PublishCheckpointRequest(start=start)
            for piece in sealed:
                for offset in range(0, len(piece), CHUNK_BYTES):
                    yield enrolment_pb2.PublishCheckpointRequest(data=piece[offset : offset + CHUNK_BYTES])

        self._line.retry(
            lambda: self._line.stub.PublishCheckpoint(parts()), what="publishing the first state"
        )

    # Looking

    def status(self) -> enrolment_pb2.GetStatusResponse:
        """What the aggregator says is going on: members, rounds, steps. Nothing that is sealed."""
        request = enrolment_pb2.GetStatusRequest(proof=self._proof("GetStatus"))
        answer: enrolment_pb2.GetStatusResponse = self._line.call(
            self._line.stub.GetStatus, request, what="getting the status"
        )
        return answer

    def model(self) -> dict[str, Any]:
        """The newest model, opened with the group key, in the plan's kind of state dict."""
        plan = self.plan
        if plan is None:
            raise DocumentError("there is no plan yet; start one")
        framework: Literal["numpy", "torch"] = (
            "torch" if plan.settings.get(FRAMEWORK_SETTING) == "torch" else "numpy"
        )
        state = self._newest_state()
        return dress(state.layout, state.tensors(), framework)

    def _newest_state(self) -> TrainingState:
        """The newest training state, verified as a member verifies it."""
        plan, policy = self.plan, self.policy
        if plan is None:
            raise DocumentError("there is no plan yet; start one")
        info, sealed = self._line.retry(self._owner_checkpoint, what="getting the checkpoint")
        claim = StateClaim.parse(info.claim)
        accept_state(
            claim,
            roster=self._earlier_roster(info.roster),
            plan=plan,
            plan_digest=self._signed(plans.KIND).digest,
            n_min=policy.n_min,
            index=info.state_round,
        )
        return open_checkpoint(
            sealed,
            self.group_key,
            claim.h1,
            federation=self.federation.id,
            index=claim.index,
            digest=claim.digest,
        )

    def _owner_checkpoint(self) -> tuple[enrolment_pb2.CheckpointInfo, list[bytes]]:
        request = enrolment_pb2.GetOwnerCheckpointRequest(proof=self._proof("GetOwnerCheckpoint"))
        info: enrolment_pb2.CheckpointInfo | None = None
        pieces: list[bytes] = []
        for part in self._line.stub.GetOwnerCheckpoint(request):
            if part.WhichOneof("part") == "info":
                info = part.info
            else:
                pieces.append(part.data)
        if info is None:
            raise StateMismatch("the aggregator sent a checkpoint without saying of which state")
        return info, pieces

    def _earlier_roster(self, digest: bytes) -> Roster:
        path = self.path / "documents" / f"{digest.hex()}.bin"
        if not digest or not path.exists():
            return self.roster
        signed = parse_signed(read_private(path))
        roster = open_document(signed, self._key.public, rosters.KIND, Roster)
        if not same(signed.digest, digest):
            raise FolderError(f"{path} holds another document than its name says; restore it from a backup")
        return roster


def replace_document(document: D, **changes: Any) -> D:
    """A copy with other values, checked like a new one. Raises `ParameterRefused`."""
    values = {name: getattr(document, name) for name in document.__struct_fields__}
    unknown = changes.keys() - values.keys()
    if unknown:
        raise ParameterRefused(f"there is no setting {min(unknown)!r}; there are {', '.join(sorted(values))}")
    return _checked(type(document), **{**values, **changes})


def _checked(kind: type[D], **values: Any) -> D:
    """A document whose values were checked as if it had been received."""
    try:
        return decode_document(encode_document(kind(**values)), kind, f"the {kind.__name__.lower()}")
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise ParameterRefused(str(error)) from None
    except Refused as refusal:
        raise ParameterRefused(refusal.text) from None


def _metrics(metrics: Mapping[str, MetricRange] | Sequence[Metric]) -> tuple[Metric, ...]:
    if not isinstance(metrics, Mapping):
        return tuple(metrics)
    made = []
    for name, bounds in metrics.items():
        low, high = float(bounds[0]), float(bounds[1])
        resolution = float(bounds[2]) if len(bounds) == 3 else (high - low) / 2**16
        made.append(_checked(Metric, name=name, low=low, high=high, resolution=resolution))
    return tuple(made)


def _security(scheme: str, paillier_bits: int) -> int:
    return 112 if scheme == "paillier" and paillier_bits == 2048 else 128


def _parameters(key: HeKey) -> CipherParameters:
    return restore_parameters(key.parameters, key.bits, key.n_max, minimum_security=112)
