"""The documents and keys of one round to measure: a roster of members, a header, and an HE key if any."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from blindsum.bench.cpu_time import process_cpu
from blindsum.client.frame_workers import start_workers
from blindsum.crypto.encoding.layout import Layout, TensorLayout, Vector
from blindsum.crypto.encoding.vector import VectorPlan
from blindsum.crypto.primitives.sealing import HPKE_PUBLIC_BYTES
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.base import MemberKeys, RoundTerms
from blindsum.crypto.schemes.homomorphic.cipher import (
    CipherParameters,
    UploadForm,
    choose_parameters,
    generate_keys,
)
from blindsum.crypto.schemes.homomorphic.worker_cipher import PieceWork
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import NO_KEY, BoundHeader, Header
from blindsum.crypto.trust.plan import Encoding
from blindsum.crypto.trust.policy import SchemeName
from blindsum.crypto.trust.roster import HeKey, Roster, RosterEntry

RANGE_EXPONENT = 0
EXAMPLES = 100
_COHORT_CLASSES = (16, 128, 1000, 10_000, 100_000)
_FAR_FUTURE = 2**39


@dataclass(frozen=True)
class Work:
    """What is measured: one round of a scheme. gamma, delta in per mille; `dropout` a share of members.

    Dropped members leave after sharing (masking), or never upload.
    """

    scheme: SchemeName
    members: int
    dimension: int
    bits: int
    n_max: int
    dropout: float = 0.0
    gamma: int = 333
    delta: int = 333
    security: int = 80
    form: UploadForm = "seeded"
    modulus_bits: int = 3072

    @property
    def dropped(self) -> int:
        """Members that drop out."""
        return int(self.members * self.dropout)


@dataclass(frozen=True, repr=False)
class Federation:
    """A round that is ready to run: terms for both sides, and each member's keys by name.

    `key_cpu_s` made the HE key, `table_cpu_s` is what a member does once before its first ciphertext.
    """

    work: Work
    terms: RoundTerms
    keys: dict[str, MemberKeys]
    vector: VectorPlan
    parameters: CipherParameters | None
    key_cpu_s: float
    table_cpu_s: float

    @property
    def dropouts(self) -> frozenset[str]:
        """The members that drop out: the last ones of the roster."""
        names = list(self.keys)
        return frozenset(names[len(names) - self.work.dropped :])

    def update(self, index: int) -> Vector:
        """The float vector of a member: normal values of a quarter of the range, the same at every call."""
        generator = np.random.default_rng(1 + index)
        update = generator.standard_normal(self.work.dimension, np.float32)
        np.multiply(update, np.float32(0.25), out=update)
        return update


def cohort_class(members: int) -> int:
    """The usual n_max for so many members: packing depends on it."""
    return next((size for size in _COHORT_CLASSES if members <= size), members)


def found_federation(work: Work, tick: Callable[[], None] = lambda: None) -> Federation:
    """Fresh keys and documents for `work`. Raises `ParameterRefused` where no sound set-up exists."""
    group_key = GroupKey.generate(1)
    identities = {}
    for index in range(work.members):
        identities[f"m{index:06}"] = SigningKey.generate()
        tick()
    layout = Layout(tensors=(TensorLayout(name="parameters", shape=(work.dimension,), dtype="float32"),))
    encoding = Encoding(bits=work.bits, max_examples=EXAMPLES)
    vector = VectorPlan(layout.names, layout.sizes, encoding, work.n_max)

    start = process_cpu()
    parameters, public, secret = _he_key(work, vector.fields)
    key_cpu_s = process_cpu() - start
    # Starts the SDK's workers, which import native libraries: no round is charged for that.
    table_cpu_s = _table_cost(parameters, public, secret) if parameters else 0.0
    he_keys: tuple[HeKey, ...] = ()
    he_digest = NO_KEY
    if parameters is not None:
        he_digest = hashlib.sha256(public).digest()
        he_keys = (
            HeKey(
                scheme=work.scheme,
                parameters=parameters.name,
                bits=work.bits,
                n_max=work.n_max,
                digest=he_digest,
            ),
        )
    federation = os.urandom(32)
    roster = Roster(
        federation=federation,
        version=1,
        valid_until=_FAR_FUTURE,
        epoch=1,
        group_key=group_key.key_id,
        he_keys=he_keys,
        # No envelope is opened in a round, so bytes of the right length stand for the HPKE keys.
        members=tuple(
            RosterEntry(
                id=name, organisation="", identity=identity.public, hpke=os.urandom(HPKE_PUBLIC_BYTES)
            )
            for name, identity in identities.items()
        ),
    )
    header = Header(
        federation=federation,
        round=1,
        plan_name="bench",
        scheme=work.scheme,
        gamma=work.gamma,
        delta=work.delta,
        security=80 if work.security == 80 else 40,
        state=os.urandom(32),
        state_round=0,
        plan=os.urandom(32),
        roster=os.urandom(32),
        policy=os.urandom(32),
        group_key=group_key.key_id,
        he_key=he_digest,
        dimension=work.dimension,
        layout=layout.digest(group_key),
        bits=work.bits,
        fields=vector.fields,
        n_min=max(3, work.members - work.dropped),
        n_max=work.n_max,
        deadline=_FAR_FUTURE,
    )
    terms = RoundTerms(BoundHeader.of(header), roster, parameters.name if parameters else "", public)
    keys = {name: MemberKeys(name, identity, group_key, secret) for name, identity in identities.items()}
    return Federation(work, terms, keys, vector, parameters, key_cpu_s, table_cpu_s)


def _table_cost(parameters: CipherParameters, public: bytes, secret: bytes) -> float:
    """CPU seconds by which a member's first frame costs more than any other: its workers, key and tables."""
    work = PieceWork(parameters, public, secret)
    nothing = np.zeros(parameters.fields_per_frame, np.uint32)
    start = process_cpu()
    workers = start_workers(work)
    if workers is None:
        raise RuntimeError("a member's worker processes can't be started on this machine")
    workers.encrypt(work, nothing)
    first = process_cpu()
    workers.encrypt(work, nothing)
    return max(first - start - (process_cpu() - first), 0.0)


def _he_key(work: Work, fields: int) -> tuple[CipherParameters | None, bytes, bytes]:
    if work.scheme == "masking":
        return None, b"", b""
    parameters = choose_parameters(
        work.scheme,
        work.bits,
        work.n_max,
        form=work.form,
        length=fields,
        modulus_bits=work.modulus_bits,
        minimum_security=112,
    )
    pair = generate_keys(parameters)
    return parameters, pair.public, pair.secret
