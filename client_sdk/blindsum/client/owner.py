"""The owner's side: founds a federation, admits members, signs roster, policy and plan.

The owner's folder holds what nobody else has: the owner key, the group key of every epoch, HE secret keys.
The owner is offline most of the time; the aggregator only stores and relays what was signed here.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from blindsum.client.layout import EVERYTHING, StateDict, arrays, framework_of, layout_of
from blindsum.client.member import FRAMEWORK_SETTING
from blindsum.client.owner_folder import OwnerFolder, Place
from blindsum.client.owner_view import OwnerView
from blindsum.client.transport import CHUNK_BYTES, DEFAULT, Patience, Stopped
from blindsum.crypto.canonical import Document, decode_document, encode_document
from blindsum.crypto.encoding.vector import VectorPlan, field_count
from blindsum.crypto.errors import (
    DocumentError,
    ParameterRefused,
    Refused,
)
from blindsum.crypto.primitives.derivation import system_random
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
from blindsum.crypto.trust.documents import SignedDocument, parse_signed, sign_document
from blindsum.crypto.trust.envelope import seal_group_key, seal_he_key
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.joining import (
    FEDERATION_KIND,
    REFUSAL_KIND,
    Federation,
    Invitation,
    Refusal,
)
from blindsum.crypto.trust.plan import Deadlines, Encoding, Metric, Plan
from blindsum.crypto.trust.policy import Policy, SchemeName, Weighting
from blindsum.crypto.trust.roster import HeKey, Roster, RosterEntry
from blindsum.crypto.trust.strategy import Strategy
from blindsum.crypto.trust.training_state import (
    TrainingState,
    seal_checkpoint,
    sealed_checkpoint_bytes,
)
from blindsum.proto.v1 import enrolment_pb2

DAY: Final = 86_400
VALID_DAYS: Final = 30
INVITATION_DAYS: Final = 14
_LOOK_SECONDS: Final = 1.0
_log = logging.getLogger("blindsum.client")
D = TypeVar("D", bound=Document)

MetricRange = tuple[float, float] | tuple[float, float, float]
"""(low, high) or (low, high, resolution)."""


class Owner(OwnerView):
    """An open owner's folder. `init` makes one, `open` opens it; `close` it, or use `with`."""

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
        place = Place(enrolment_address=enrolment_address, member_address=member_address, ca=ca)
        OwnerFolder.create(path, key, group, place, sign_document(key, FEDERATION_KIND, federation))
        opened = OwnerFolder(path)
        opened.keep(sign_document(key, policies.KIND, first))
        opened.keep(sign_document(key, rosters.KIND, roster))
        return cls(opened, patience=patience)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        patience: Patience = DEFAULT,
        stop: threading.Event | None = None,
    ) -> "Owner":
        """Open an owner's folder and lock it. Raises `FolderInUse`, `FolderError`.

        Setting `stop` ends calls that wait for the aggregator, with `Stopped`.
        """
        return cls(OwnerFolder(Path(folder)), patience=patience, stop=stop)

    @staticmethod
    def look(
        folder: str | os.PathLike[str],
        *,
        patience: Patience = DEFAULT,
        stop: threading.Event | None = None,
    ) -> OwnerView:
        """Open an owner's folder for looking only, also while another process has it open."""
        return OwnerView(OwnerFolder(Path(folder), read_only=True), patience=patience, stop=stop)

    # The aggregator

    def register(self) -> None:
        """Create the federation at the aggregator and publish policy and roster. Idempotent.

        Raises `Refused` (policy) as long as the operator hasn't allowed the owner key.
        """
        document = self._folder.signed_federation.to_bytes()
        request = enrolment_pb2.CreateFederationRequest(document=document)
        self._line.call(self._line.stub.CreateFederation, request, what="registering the federation")
        self._send_outbox()
        roster = self.signed(rosters.KIND)
        self._publish((self.signed(policies.KIND), roster), self._envelopes(self.roster, roster.digest))

    def _publish(
        self,
        documents: Sequence[SignedDocument],
        envelopes: Sequence[bytes] = (),
        he_public_keys: Sequence[bytes] = (),
    ) -> None:
        """Publish all or none; what was signed is durable first, so that a lost answer is no problem."""
        self._send_outbox()
        self._folder.fill_outbox(documents, envelopes, he_public_keys)
        self._send_outbox()

    def _send_outbox(self) -> None:
        folder = self._folder
        outbox = folder.outbox()
        if outbox is None:
            return
        request = enrolment_pb2.PublishRequest(
            federation=self.federation.id,
            documents=outbox.documents,
            envelopes=outbox.envelopes,
            he_public_keys=outbox.he_public_keys,
        )
        try:
            self._line.call(self._line.stub.Publish, request, what="publishing")
        except Refused:
            folder.empty_outbox()
            raise
        documents = [parse_signed(data) for data in outbox.documents]
        for signed in documents:
            if signed.kind != REFUSAL_KIND:
                folder.keep(signed)
        if any(signed.kind == plans.KIND for signed in documents):
            folder.keep_plan_epoch(self.roster.epoch)
        for member in self.invited():
            if member in self.roster.position:
                folder.drop_invitation(member)
        folder.empty_outbox()

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
        return self._folder.keep_invitation(invitation)

    def withdraw(self, *members: str) -> list[str]:
        """Withdraw open invitations: their tokens admit nobody any more. Which there were."""
        there = [member for member in members if self._folder.invitation(member) is not None]
        for member in there:
            self._folder.drop_invitation(member)
        return there

    def admit(self, *members: str, keys: Collection[str] = ()) -> list[str]:
        """Admit applicants by name (all whose request is in order, if none is named); who was admitted.

        With `keys` only requests of keys with these fingerprints count. Signs the next roster and a key
        envelope for every member. Raises `DocumentError` for a name whose request is missing or has a
        problem.
        """
        self._send_outbox()
        waiting = [one for one in self.pending() if not keys or one.fingerprint in keys]
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
        return [one.member for one in chosen]

    def refuse(self, member: str, reason: str, fingerprint: str = "") -> int:
        """Refuse every waiting request under this name (of this key, if given); how many there were."""
        refused = [
            sign_document(
                self._key,
                REFUSAL_KIND,
                _checked(Refusal, federation=self.federation.id, request_id=one.request_id, reason=reason),
            )
            for one in self.pending()
            if one.member == member and fingerprint in ("", one.fingerprint)
        ]
        if refused:
            self._publish(refused)
        return len(refused)

    def remove(self, *members: str, wait: bool = True, at_once: bool = False) -> bool:
        """Remove members: from now on no call of theirs is served. Group key and HE keys change.

        In a running round they are dropouts; once it has ended, the plan goes on under the new keys. With
        `wait` this returns then; without, call `finish_rotation` later (`blindsum owner watch` does). With
        `at_once` a running round is aborted. True when the plan goes on already.

        Raises `DocumentError` for a name that isn't in the roster.
        """
        self._begin()
        roster = self.roster
        for member in members:
            roster.entry(member)
        left = tuple(entry for entry in roster.members if entry.id not in members)
        return self._rotate(replace_document(roster, members=left), wait, at_once)

    def rotate(self, *, wait: bool = True, at_once: bool = False) -> bool:
        """Change group key and HE keys without removing anyone. As `remove` in all else."""
        self._begin()
        return self._rotate(self.roster, wait, at_once)

    def _rotate(self, roster: Roster, wait: bool, at_once: bool) -> bool:
        """Publish the roster under new keys; the newest training state is sealed anew as the plan's S_0."""
        plan = self.plan
        group = GroupKey.generate(roster.epoch + 1)
        self._folder.keep_group_key(group)
        pairs = [
            self._new_he_key(key.scheme, _parameters(key), key.bits, key.n_max) for key in roster.he_keys
        ]
        fresh = replace_document(
            roster,
            epoch=group.epoch,
            group_key=group.key_id,
            he_keys=tuple(key for key, _ in pairs),
        )
        public = [public for _, public in pairs]
        if plan is not None and not at_once and self.round_running():
            # The running round goes on under the keys it began with; the plan follows when it has ended.
            self._publish_roster(fresh, (), public)
            return self.finish_rotation(wait=wait)
        carried = None if plan is None else self._newest_state()
        documents = []
        if plan is not None and carried is not None and carried.index < plan.rounds:
            documents.append(self._carry(plan, carried, fresh, group))
        self._publish_roster(fresh, documents, public)
        if not documents:
            self._folder.keep_plan_epoch(fresh.epoch)
        return True

    def _carry(self, plan: Plan, carried: TrainingState, roster: Roster, group: GroupKey) -> SignedDocument:
        """The plan's next version, which goes on from a state under another group key."""
        state = replace(carried, index=0)
        wanted = max(plan.cohort_min, min(plan.cohort_wanted, len(roster.members)))
        continued = replace_document(
            plan,
            version=plan.version + 1,
            rounds=plan.rounds - carried.index,
            cohort_wanted=wanted,
            initial_state=state.digest(group),
            layout=state.layout.digest(group),
        )
        signed = sign_document(self._key, plans.KIND, continued)
        self._publish_state(state, group, signed)
        return signed

    def finish_rotation(self, *, wait: bool = True) -> bool:
        """Let the plan go on under the roster's keys, once the running round has ended; True when it does.

        Without `wait`, returns False at once as long as a round runs.
        """
        self._send_outbox()
        plan, roster = self.plan, self.roster
        if plan is None or not self.rotation_unfinished:
            return True
        while self.round_running():
            if not wait:
                return False
            if self._line.stop.wait(_LOOK_SECONDS):
                raise Stopped("stopped before the running round had ended")
        carried = self._newest_state()
        if carried.index < plan.rounds:
            self._publish((self._carry(plan, carried, roster, self.group_key),))
        else:
            self._folder.keep_plan_epoch(roster.epoch)
        return True

    def _begin(self) -> None:
        """Finish what an earlier command didn't: raises `DocumentError` where that isn't possible yet."""
        self._send_outbox()
        if not self.finish_rotation(wait=False):
            raise DocumentError(
                "the keys have just changed and a round still runs under the old ones; try again when it has "
                "ended"
            )

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
        group = self._folder.group_key(roster.epoch)
        sealed = []
        for entry in roster.members:
            sealed.append(seal_group_key(self._key, group, roster, digest, entry.id).to_bytes())
            for key in roster.he_keys:
                secret = self._folder.he_secret(key.digest)
                sealed.append(seal_he_key(self._key, key.scheme, secret, roster, digest, entry.id).to_bytes())
        return sealed

    # Policy

    def set_policy(self, *, days: int = VALID_DAYS, **changes: Any) -> Policy:
        """Sign and publish the next policy version; a running plan is signed anew under it.

        Raises `ParameterRefused` for values that make no policy, `PolicyViolation` if the plan undercuts it.
        """
        self._begin()
        following = self.next_policy(days=days, **changes)
        signed = sign_document(self._key, policies.KIND, following)
        documents = [signed]
        plan = self.plan
        if plan is not None:
            renewed = replace_document(plan, version=plan.version + 1, policy=signed.digest)
            renewed.check_against(following)
            renewed.cohort_floor(following, len(self.roster.members))
            signed_plan = sign_document(self._key, plans.KIND, renewed)
            state = self._newest_state()
            if state.index == 0:
                self._publish_state(state, self.group_key, signed_plan)
            documents.append(signed_plan)
        self._publish(documents)
        return following

    def next_policy(self, *, days: int = VALID_DAYS, **changes: Any) -> Policy:
        """What `set_policy` would sign. Raises `ParameterRefused`."""
        before = self.policy
        return replace_document(
            before, **changes, version=before.version + 1, valid_until=int(self._now()) + days * DAY
        )

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
        dry_run: bool = False,
    ) -> Plan:
        """Sign a training job and publish it with its first state; members begin as soon as enough are ready.

        With `dry_run` everything is checked and nothing is signed.

        `model` is a state dict (torch or numpy); `shared` patterns choose what of it is trained together.
        `weighting` "sqrt", "size" or "equal" of the examples; more than `max_examples` is refused at the
        member. `metrics`: name -> (low, high[, resolution]). `range_exponent` e: updates up to 2^e at first.

        Raises `EncodingError`, `ParameterRefused`, `PolicyViolation` naming what doesn't fit, `Refused`.
        """
        if not dry_run:
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
            policy=self.signed(policies.KIND).digest,
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
        plan.cohort_floor(policy, members)
        VectorPlan.of(plan, layout)
        if dry_run:
            return plan
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
        self._folder.keep_he_secret(digest, pair.secret)
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
