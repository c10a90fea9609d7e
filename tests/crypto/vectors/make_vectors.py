"""Makes the test vectors of masking: python tests/crypto/vectors/make_vectors.py

Everything that would be random is written into the vectors, so another run makes the same files. A change of
any of them is a change of the protocol, and needs another protocol version.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.encoding.vector import VectorDecoder, VectorEncoder, VectorPlan, summed_digest
from blindsum.crypto.errors import ParameterRefused, Refused, ServerViolation, SumCheckFailed
from blindsum.crypto.primitives.derivation import Random, derive_key, labelled, labelled_hash, mac
from blindsum.crypto.primitives.key_agreement import AgreementKey
from blindsum.crypto.primitives.mask_expansion import MaskSet, mask_key, subtract_multiple
from blindsum.crypto.primitives.secret_sharing import COEFFICIENT_BYTES, PRIME, LagrangeBasis, split
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.base import (
    Complaint,
    MemberKeys,
    RoundTerms,
    StepName,
    frame_digest,
    upload_digest,
)
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.aggregator import MaskingAggregator
from blindsum.crypto.schemes.masking.frames import group_mask_key
from blindsum.crypto.schemes.masking.graph import Graph, permutation
from blindsum.crypto.schemes.masking.member import (
    MaskingMember,
    mask_pair,
    pair_mask_key,
    self_mask_key,
)
from blindsum.crypto.schemes.masking.messages import (
    Advertisement,
    AdvertiseRequest,
    BoxComplaint,
    Confirmation,
    ConfirmRequest,
    Result,
    Revealed,
    RevealRequest,
    SealedUpload,
    ShareRequest,
    Shares,
    UploadRequest,
    confirm_root,
    leaf_hash,
    self_commitment,
    share_commitment,
    u32,
)
from blindsum.crypto.schemes.masking.thresholds import ring, thresholds
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import NO_KEY, BoundHeader, Header
from blindsum.crypto.trust.plan import Encoding, Metric
from blindsum.crypto.trust.roster import Roster, RosterEntry

FOLDER = Path(__file__).parents[3] / "crypto/blindsum/crypto/vectors/masking"
MASKING = scheme("masking")

Document = dict[str, Any]


def noise(name: str, length: int = 32) -> bytes:
    """Bytes that look random: SHAKE-256 of a name."""
    return hashlib.shake_256(b"blindsum test vectors/" + name.encode()).digest(length)


def fields_of(name: str, count: int, bits: int) -> list[int]:
    """Integers below 2^bits."""
    data = noise(name, 4 * count)
    return [int.from_bytes(data[4 * i : 4 * i + 4], "little") >> (32 - bits) for i in range(count)]


def array(values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, dtype=np.uint64)


def refusal(action: Callable[[], object]) -> dict[str, str]:
    """How an action ends that must fail."""
    try:
        action()
    except ServerViolation as error:
        return {"violation": error.check}
    except Refused as error:
        return {"refused": error.reason.value}
    raise AssertionError("this was to fail")


# -- single operations --------------------------------------------------------------------------------


def derivation() -> Document:
    inputs = [
        ("header", []),
        ("header", [b""]),
        ("u1", [bytes(32), b"\xff" * 32]),
        ("masking share", [b"ab", b"c"]),
        ("masking share", [b"a", b"bc"]),
    ]
    secret = noise("secret")
    return {
        "labelled": [
            {
                "label": label,
                "fields": fields,
                "bytes": labelled(label, *fields),
                "sha256": labelled_hash(label, *fields),
                "secret": secret,
                "hkdf": derive_key(secret, label, *fields),
                "hmac": mac(secret, label, *fields),
            }
            for label, fields in inputs
        ],
    }


def keys() -> Document:
    h0, h1 = noise("h0"), noise("h1")
    cases = []
    for one, other, low, high in (("a", "b", 0, 1), ("c", "d", 3, 70_000)):
        channels = [AgreementKey(noise(f"channel {who}")) for who in (one, other)]
        pairs = [mask_pair(noise(f"root {who}"), h0) for who in (one, other)]
        shared = channels[0].exchange(channels[1].public)
        cases.append(
            {
                "h0": h0,
                "h1": h1,
                "low": low,
                "high": high,
                "channel_secrets": [noise(f"channel {who}") for who in (one, other)],
                "mask_roots": [noise(f"root {who}") for who in (one, other)],
                "self_seed": noise(f"seed {one}"),
                "channel_keys": [key.public for key in channels],
                "mask_keys": [key.public for key in pairs],
                "self_commitment": self_commitment(h0, noise(f"seed {one}")),
                "box_key_low_to_high": derive_key(shared, "masking box", h1, u32(low), u32(high)),
                "box_key_high_to_low": derive_key(shared, "masking box", h1, u32(high), u32(low)),
                "pair_mask_key": pair_mask_key(pairs[0], pairs[1].public, h1, low, high),
                "self_mask_key": self_mask_key(noise(f"seed {one}"), h1),
            }
        )
    group = GroupKey(noise("group key"), 7)
    return {
        "members": cases,
        "group": {
            "group_key": noise("group key"),
            "epoch": 7,
            "h1": h1,
            "key_id": group.key_id,
            "sum_key": group.sum_key(h1),
            "check_key": group.check_key(h1),
            "sum_mask_key": group_mask_key(group, h1),
        },
        "small_order": [
            value.to_bytes(32, "little") for value in (0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18)
        ],
    }


def mask_expansion() -> Document:
    seeds = [noise(f"mask {i}") for i in range(4)]
    h1 = noise("h1")
    uses = ["masking pair"] * 3 + ["masking self"]
    aes = [mask_key(seed, use, h1) for seed, use in zip(seeds, uses, strict=True)]
    cases = []
    for first, count in ((0, 1), (0, 5), (32_768, 4), (8190, 6)):
        start = np.arange(count, dtype=np.uint64) * np.uint64(2**61 + 1)
        lanes = start.copy()
        MaskSet(aes[:2], aes[2:]).apply(lanes, first)
        less = start.copy()
        subtract_multiple(aes[0], 13, less, first)
        cases.append(
            {
                "first_lane": first,
                "start": start.tobytes(),
                "first_two_added_last_two_subtracted": lanes.tobytes(),
                "thirteen_times_the_first_subtracted": less.tobytes(),
            }
        )
    return {
        "h1": h1,
        "streams": [
            {"seed": seed, "use": use, "aes_key": key}
            for seed, use, key in zip(seeds, uses, aes, strict=True)
        ],
        "cases": cases,
    }


def graph() -> Document:
    cases = []
    for n, k in ((3, 2), (8, 7), (9, 2), (12, 4), (201, 42), (1000, 52)):
        seed = noise(f"graph {n}")
        rows = Graph(n, k, seed).table().tolist()
        case: Document = {
            "n": n,
            "k": k,
            "seed": seed,
            "rows_sha256": hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).digest(),
            "first_row": rows[0],
        }
        if k < n - 1:
            case["order" if n < 20 else "order_starts"] = permutation(n, seed)[:20]
        if n < 20:
            case["rows"] = rows
        cases.append(case)
    return {"graphs": cases}


SETTINGS = ((50, 50), (100, 100), (50, 300), (200, 200))


def limits() -> Document:
    def case(n: int, gamma: int, delta: int, security: int) -> Document:
        try:
            found = thresholds(n, gamma, delta, security)
        except ParameterRefused:
            return {"n": n, "gamma": gamma, "delta": delta, "security": security, "refused": True}
        return {
            "n": n, "gamma": gamma, "delta": delta, "security": security,
            "k": found.neighbours, "t": found.shares,
        }  # fmt: skip

    complete = [case(n, 333, 333, 80) for n in (2, 3, 4, 5, 6, 7, 8, 10, 16, 100, 200)]
    complete += [case(n, gamma, 300, 80) for n in (8, 50) for gamma in (0, 100, 999)]
    rings = [
        case(n, gamma, delta, security)
        for n in (201, 256, 1000, 10_000)
        for gamma, delta in SETTINGS
        for security in (40, 80)
        if n < 10_000 or gamma < 200
    ]
    # More neighbours than members that stay (or than honest ones): most counts are impossible there.
    rings += [
        case(n, gamma, delta, 80) for n, gamma, delta in ((201, 50, 333), (300, 200, 300), (512, 200, 333))
    ]
    refused = [
        case(n, gamma, delta, 80)
        for n, gamma, delta in ((201, 333, 333), (220, 200, 450), (201, 0, 500), (400, 333, 300))
    ]
    published = []
    for gamma, delta in SETTINGS:
        for n in (100, 1000):
            for security in (40, 80):
                found = ring(n, gamma, delta, security, window=False)
                published.append(
                    {
                        "n": n, "gamma": gamma, "delta": delta, "security": security,
                        "k": found.neighbours, "t": found.shares,
                    }
                )  # fmt: skip
    return {
        "complete": complete,
        "rings": rings,
        "refused": refused,
        "rings_without_the_window_check": published,
    }


def shares() -> Document:
    cases = []
    for name, secret, points, threshold in (
        ("zeros", bytes(32), [1, 2, 3], 2),
        ("ones", b"\xff" * 32, [1, 2, 5, 100_000], 3),
        ("noise", noise("shared"), list(range(2, 32)), 27),
    ):
        uniform = noise(f"uniform {name}", (threshold - 1) * COEFFICIENT_BYTES)
        dealt = split(secret, threshold, points, uniform)
        chosen = points[-threshold:]
        rebuilt = LagrangeBasis(chosen).combine(
            [int.from_bytes(part, "little") for part in dealt[-threshold:]]
        )
        assert rebuilt == secret
        cases.append(
            {
                "secret": secret,
                "threshold": threshold,
                "points": points,
                "uniform": uniform,
                "shares": dealt,
                "rebuilt_from": chosen,
            }
        )
    h1, opened = noise("h1"), noise("opened", 65)
    return {
        "prime": str(PRIME),
        "cases": cases,
        "dealer": {
            "seed": noise("dealer"),
            "h1": h1,
            "length": 160,
            "uniform": hashlib.shake_256(derive_key(noise("dealer"), "masking dealer", h1)).digest(160),
        },
        "commitments": [
            {
                "h1": h1,
                "dealer": 2,
                "receiver": 300,
                "kind": kind.decode(),
                "opened": opened,
                "commitment": share_commitment(h1, 2, 300, kind, opened),
            }
            for kind in (b"self", b"root")
        ],
        "not_shares": [
            b"",
            bytes(32),
            bytes(34),
            PRIME.to_bytes(33, "little"),
            b"\xff" * 33,
        ],
        "no_secret": {"points": [1], "shares": [(PRIME - 1).to_bytes(33, "little")]},
    }


def lanes() -> Document:
    cases = []
    for bits, n_max, count in ((16, 16, 7), (22, 16, 5), (21, 128, 4), (17, 1000, 3), (2, 3, 50), (32, 3, 2)):
        layout = LaneLayout.for_cohort(bits, n_max)
        values = fields_of(f"lanes {bits} {n_max}", count, bits)
        packed = layout.pack(array(values))
        cases.append(
            {
                "bits": bits,
                "n_max": n_max,
                "guard_bits": layout.guard_bits,
                "field_bits": layout.field_bits,
                "fields_per_lane": layout.fields_per_lane,
                "fields": values,
                "lanes": packed.tobytes(),
                "n_max_times": (packed * np.uint64(n_max)).tobytes(),
            }
        )
    layout = LaneLayout.for_cohort(16, 16)
    good = layout.pack(array([1, 2, 3, 4])) * np.uint64(3)
    bad = [good.copy() for _ in range(4)]
    bad[0][0] |= np.uint64(8)  # a guard bit
    bad[1][0] += np.uint64(3 * 65535 << 4)  # the first field above three times its maximum
    bad[2][1] |= np.uint64(1 << 44)  # padding behind the last field
    bad[3] = bad[3][:1]
    return {
        "cases": cases,
        "refused_layouts": [{"bits": 32, "n_max": 2_100_000}, {"bits": 53, "n_max": 2}],
        "refused_fields": [{"bits": 16, "n_max": 16, "fields": [0, 65_536]}],
        "not_sums": [
            {"bits": 16, "n_max": 16, "fields": 4, "members": 3, "lanes": data.tobytes()} for data in bad
        ],
    }


def encoding() -> Document:
    cases = []
    for bits, weighting, examples in ((16, "sqrt", 100), (22, "size", 30), (8, "equal", 1)):
        settings = Encoding(
            bits=bits,
            weighting=weighting,  # type: ignore[arg-type]
            max_examples=400,
            clip_tolerance=20_000,
            metrics=(Metric(name="loss", low=0.0, high=8.0, resolution=0.0001220703125),),
        )
        plan = VectorPlan(("body", "head", "still"), (24, 6, 3), settings, 16)
        values = np.frombuffer(noise(f"update {bits}", 4 * 33), "<i4").astype(np.float64) / 2**33
        values[24:30] *= 16  # the second tensor is clipped
        values[30:] = (0.0, 0.0, 0.0)
        update = values.astype(np.float32)
        exponents = (-1, -1, -4)
        check_key = noise("check key")
        members = []
        total = np.zeros(plan.fields, dtype=np.uint64)
        for member in ("clinic-1", "clinic-2", "clinic-3"):
            encoder = VectorEncoder(
                plan,
                exponents,
                update,
                examples=examples,
                metrics={"loss": 1.2345},
                check_key=check_key,
                member=member,
                rounding_seed=noise(f"rounding {member}"),
            )
            made = encoder.fields(0, plan.fields)
            total += made
            members.append(
                {"member": member, "rounding_seed": noise(f"rounding {member}"), "fields": made.tolist()}
            )
        cases.append(
            {
                "encoding": {
                    "bits": bits,
                    "weighting": weighting,
                    "max_examples": 400,
                    "weight_ratio": settings.weight_ratio,
                    "clip_tolerance": 20_000,
                    "metrics": [{"name": "loss", "low": 0.0, "high": 8.0, "resolution": 0.0001220703125}],
                },
                "tensors": [
                    {"exponent": exponent, "float32": update[start:stop].tobytes()}
                    for exponent, start, stop in zip(exponents, (0, 24, 30), (24, 30, 33), strict=True)
                ],
                "examples": examples,
                "metrics": {"loss": 1.2345},
                "check_key": check_key,
                "members": members,
                "sum": total.tolist(),
                "sum_digest": summed_digest(plan, total),
                "sums_that_fail": sums_that_fail(plan, exponents, check_key, total, members),
            }
        )
    return {"cases": cases}


def sums_that_fail(
    plan: VectorPlan,
    exponents: Sequence[int],
    check_key: bytes,
    total: np.ndarray[tuple[int], np.dtype[np.uint64]],
    members: Sequence[Document],
) -> list[Document]:
    """Sums that aren't the survivors' and must be found by the sum check."""
    names = [member["member"] for member in members]
    shifted = total.copy()
    shifted[5] += np.uint64(1)
    shifted[6] -= np.uint64(1)
    doubled = total + array(members[0]["fields"]) - array(members[1]["fields"])
    cases = [
        {"case": "two coordinates shifted", "survivors": names, "sum": shifted.tolist()},
        {"case": "one member twice, another not at all", "survivors": names, "sum": doubled.tolist()},
        {"case": "another survivor set", "survivors": [*names[:2], "clinic-4"], "sum": total.tolist()},
        {"case": "a survivor too few", "survivors": names[:2], "sum": total.tolist()},
    ]
    for case in cases:
        decoder = VectorDecoder(plan, exponents, check_key=check_key)
        decoder.absorb(0, array(case["sum"]))
        try:
            decoder.finish(case["survivors"])
        except SumCheckFailed:
            continue
        raise AssertionError("this was to fail")
    return cases


# -- rounds --------------------------------------------------------------------------------------------


class Round:
    """A federation of the vectors and a round of it, played by the honest machines."""

    def __init__(self, names: Sequence[str], **changes: Any) -> None:
        self.names = tuple(names)
        self.group = GroupKey(noise("group key"), 1)
        self.identities = {name: SigningKey(noise(f"identity {name}")) for name in names}
        self.secrets = {name: noise(f"secrets {name}", 128) for name in names}
        roster = Roster(
            federation=noise("federation"),
            version=1,
            valid_until=2_000_000_000,
            epoch=1,
            group_key=self.group.key_id,
            he_keys=(),
            members=tuple(
                RosterEntry(id=name, organisation="", identity=self.identities[name].public, hpke=bytes(1216))
                for name in names
            ),
        )
        header: dict[str, Any] = {
            "federation": noise("federation"), "round": 12, "plan_name": "vectors", "scheme": "masking",
            "gamma": 100, "delta": 300, "security": 80,
            "state": noise("state"), "state_round": 9, "plan": noise("plan"), "roster": noise("roster"),
            "policy": noise("policy"), "group_key": self.group.key_id, "he_key": NO_KEY,
            "dimension": 13, "layout": noise("layout"), "bits": 16, "fields": 13,
            "n_min": 4, "n_max": 16, "deadline": 1_900_000_000,
        }  # fmt: skip
        self.header = Header(**{**header, **changes})
        self.terms = RoundTerms(BoundHeader.of(self.header), roster)
        self.inputs = {
            name: fields_of(f"input {name}", self.header.fields, self.header.bits) for name in names
        }
        self.aggregator: MaskingAggregator = MASKING.aggregator(self.terms)  # type: ignore[assignment]
        self.machines = {name: self.member(name) for name in names}
        self.messages: list[Document] = []
        self.uploads: dict[str, bytes] = {}
        self.total: bytearray | None = None

    def member(self, name: str) -> MaskingMember:
        pieces = iter([self.secrets[name][i : i + 32] for i in range(0, 128, 32)])
        random: Random = lambda count: next(pieces)[:count]  # noqa: E731
        keys = MemberKeys(name, self.identities[name], self.group)
        return MASKING.member(self.terms, keys, random)  # type: ignore[return-value]

    def replayed(self, name: str, until: str) -> MaskingMember:
        """A member's machine after its honest answers to the steps before `until`."""
        machine = self.member(name)
        for message in self.messages:
            if message["step"] == until:
                break
            if message["member"] == name:
                give(machine, message["step"], message["request"], self.inputs[name])
        return machine

    def step(self, absent: Sequence[str] = ()) -> None:
        step = self.aggregator.step
        assert step is not None
        for name in self.aggregator.participants:
            if name in absent:
                continue
            request = self.aggregator.request(name)
            reply, upload = give(self.machines[name], step, request, self.inputs[name])
            message = {"step": step, "member": name, "request": request, "reply": reply}
            if upload:
                message["upload"] = upload
                self.total = self.aggregator.arithmetic().add(0, self.total, upload)
            self.messages.append(message)
            assert self.aggregator.accept(name, reply)
        self.aggregator.close()

    def request(self, step: str, name: str) -> bytes:
        """The honest request of a step."""
        found = next(m for m in self.messages if m["step"] == step and m["member"] == name)
        return bytes(found["request"])

    def reply(self, step: str, name: str) -> bytes:
        """The honest reply to a step."""
        found = next(m for m in self.messages if m["step"] == step and m["member"] == name)
        return bytes(found["reply"])

    def aggregator_at(self, step: StepName) -> MaskingAggregator:
        """The aggregator with `step` open and no reply to it yet."""
        machine: MaskingAggregator = MASKING.aggregator(self.terms)  # type: ignore[assignment]
        for message in self.messages:
            while machine.step != message["step"]:
                machine.close()
            if machine.step == step:
                break
            machine.accept(message["member"], message["reply"])
        return machine


def give(
    machine: MaskingMember, step: StepName, request: bytes, values: Sequence[int]
) -> tuple[bytes, bytes]:
    """A member's reply to a request, and its upload where there is one."""
    if step != "upload":
        return machine.answer(step, request), b""
    started = machine.begin_upload(request)
    if isinstance(started, Complaint):
        return started.reply, b""
    frame = started.protect(0, array(values))
    return machine.seal_upload(upload_digest(started.h1, [frame_digest(frame)])), frame


def header_fields(header: Header) -> Document:
    return {name: getattr(header, name) for name in sorted(Header.__struct_fields__)}


NAMES = tuple(f"clinic-{index}" for index in range(1, 10))
STAYS_AWAY, NEVER_SHARES, NEVER_UPLOADS, NEVER_CONFIRMS = "clinic-3", "clinic-5", "clinic-8", "clinic-9"


def small_round() -> Round:
    """Eight of nine members of the roster; one is gone after each step, as many as t = 4 bears."""
    played = Round(NAMES)
    absent = [STAYS_AWAY]
    for gone in ([], [NEVER_SHARES], [NEVER_UPLOADS], [NEVER_CONFIRMS], []):
        absent += gone
        played.step(absent)
    assert played.aggregator.abort is None
    return played


def whole_round(played: Round) -> Document:
    aggregator = played.aggregator
    assert played.total is not None
    published = aggregator.finish_frame(0, played.total)
    result = aggregator.result()
    opener = played.machines[NAMES[0]].open_sum(result)
    total = opener.open(0, published).tolist()
    assert total == [
        sum(column) for column in zip(*(played.inputs[n] for n in opener.survivors), strict=True)
    ]
    cohort = aggregator._known
    return {
        "header": header_fields(played.header),
        "header_bytes": played.terms.bound.body,
        "h0": played.terms.bound.h0,
        "roster": [{"id": name, "identity": played.identities[name].public} for name in played.names],
        "group_key": noise("group key"),
        "epoch": 1,
        "members": [
            {
                "id": name,
                "identity_secret": played.identities[name].secret_bytes(),
                "secrets": played.secrets[name],
                "fields": played.inputs[name],
            }
            for name in played.names
            if name != STAYS_AWAY
        ],
        "root_u1": cohort.root,
        "h1": cohort.h1,
        "k": cohort.k,
        "t": cohort.t,
        "root_u3": aggregator._root,
        "messages": played.messages,
        "sum_of_uploads": bytes(played.total),
        "published": published,
        "result": result,
        "survivors": list(opener.survivors),
        "sum": total,
    }


def headers(played: Round) -> Document:
    cases: list[Document] = []
    for changes in ({}, {"round": 13}, {"scheme": "bfv", "he_key": noise("he key"), "plan_name": "Größe"}):
        header = Header(
            **{**{name: getattr(played.header, name) for name in Header.__struct_fields__}, **changes}
        )
        bound = BoundHeader.of(header)
        cases.append({"header": header_fields(header), "bytes": bound.body, "h0": bound.h0})
    h0, h1 = cases[0]["h0"], noise("h1")
    entry = noise("entry", 160)
    members, leaves = u32(0) + u32(2) + u32(70_000), noise("leaves", 96)
    root = labelled_hash("masking cohort", h0, members, leaves)
    body = cases[0]["bytes"]
    return {
        "headers": cases,
        "leaf": {"h0": h0, "index": 70_000, "entry": entry, "leaf": leaf_hash(h0, 70_000, entry)},
        "cohort": {
            "h0": h0,
            "members": members,
            "leaves": leaves,
            "root_u1": root,
            "h1": labelled_hash("u1", h0, root),
            "graph_seed": labelled_hash("masking graph seed", h0, root),
        },
        "survivors": {
            "h1": h1,
            "sharers": b"\x7f\x01",
            "survivors": b"\x6f\x01",
            "root_u3": confirm_root(h1, b"\x7f\x01", b"\x6f\x01"),
        },
        "upload": {
            "h1": h1,
            "frames": [b"one", b"two", b"three"],
            "digest": upload_digest(h1, map(frame_digest, [b"one", b"two", b"three"])),
        },
        "refused": [
            body + b" ",
            body[:-1],
            body.replace(b'"bits":16,', b'"bits":16, '),
            body.replace(b'"bits":16', b'"bits":"16"'),
            body.replace(b'"bits":16', b'"bits":33'),
            body.replace(b'"bits":16,', b'"bits":16,"bits":16,'),
            body.replace(b'"bits":16,', b'"bits":16,"bots":16,'),
            body.replace(b'"bits":16,', b""),
        ],
    }


# -- what must fail --------------------------------------------------------------------------------------


def slot_of(position: int, own: int) -> int:
    """The slot of a position among a member's neighbours in a complete graph."""
    return position - (position > own)


def put(data: bytes, size: int, slot: int, record: bytes) -> bytes:
    return data[: size * slot] + record + data[size * (slot + 1) :]


def failing_requests(played: Round) -> list[tuple[str, str, str, bytes]]:
    """(name of the case, step, member, request that must fail)."""
    victim, own = "clinic-2", 1
    other, position = "clinic-6", 4  # at position 4 of U1, roster index 5
    h0, identities = played.terms.bound.h0, played.identities
    found: list[tuple[str, str, str, bytes]] = []

    def add(step: str, name: str, request: bytes | msgspec.Struct, member: str = victim) -> None:
        data = request if isinstance(request, bytes) else encode_message(request)
        found.append((name, step, member, data))

    request = played.request("advertise", victim)
    add("advertise", "another round's h0", AdvertiseRequest(noise("another h0")))
    add("advertise", "a byte more", request + b"\0")
    add("advertise", "a byte less", request[:-1])
    add("advertise", "a length in more bytes than needed", request[:2] + b"\xc5\0\x20" + request[4:])
    add("advertise", "another step's message", played.request("confirm", victim))

    request = played.request("share", victim)
    share = decode_message(request, ShareRequest, "the request")

    def with_entry(entry: bytes, fits: bool) -> ShareRequest:
        leaves = put(share.leaves, 32, position, leaf_hash(h0, 5, entry)) if fits else share.leaves
        return ShareRequest(share.members, leaves, put(share.entries, 160, slot_of(position, own), entry))

    def entry_of(keys_: bytes, signer: str, name: str) -> bytes:
        return keys_ + identities[signer].sign("masking advertise", h0, name.encode(), keys_)

    server = AgreementKey(noise("server 1")).public + AgreementKey(noise("server 2")).public + bytes(32)
    own_keys = decode_message(played.reply("advertise", victim), Advertisement, "the reply").entry[:96]
    add("share", "leaves and members of different length", ShareRequest(share.members[4:], share.leaves, b""))
    add("share", "a cohort below n_min", ShareRequest(share.members[:12], share.leaves[:96], b""))
    add("share", "a member twice", msgspec.structs.replace(share, members=put(share.members, 4, 3, u32(3))))
    add(
        "share",
        "members out of order",
        msgspec.structs.replace(share, members=put(put(share.members, 4, 3, u32(5)), 4, 4, u32(4))),
    )
    add(
        "share",
        "a member that isn't in the roster",
        msgspec.structs.replace(share, members=put(share.members, 4, 7, u32(9))),
    )
    add(
        "share",
        "a cohort without the member itself",
        ShareRequest(
            share.members[:4] + share.members[8:], share.leaves[:32] + share.leaves[64:], share.entries[:960]
        ),
    )
    add(
        "share",
        "another leaf in the member's own place",
        msgspec.structs.replace(share, leaves=put(share.leaves, 32, own, noise("leaf"))),
    )
    add("share", "a neighbour too few", msgspec.structs.replace(share, entries=share.entries[:-160]))
    add("share", "an entry that isn't the leaf's", with_entry(entry_of(server, other, other), fits=False))
    add("share", "the server's keys without a signature", with_entry(server + bytes(64), fits=True))
    add("share", "the server's keys, signed by another member", with_entry(
        entry_of(server, "clinic-7", "clinic-7"), fits=True))  # fmt: skip
    add("share", "the member's own keys, signed by a colluder", with_entry(
        entry_of(own_keys, other, other), fits=True))  # fmt: skip
    add("share", "a colluder's channel key of small order", with_entry(
        entry_of(bytes(32) + server[32:], other, other), fits=True))  # fmt: skip

    request = played.request("upload", victim)
    upload = decode_message(request, UploadRequest, "the request")
    boxes = [upload.boxes[i : i + 146] for i in range(0, len(upload.boxes), 146)]
    elsewhere = decode_message(played.request("upload", "clinic-1"), UploadRequest, "the request").boxes
    add("upload", "a bitmap that is too long", msgspec.structs.replace(upload, live=upload.live + b"\0"))
    add(
        "upload",
        "padding bits of a bitmap",
        msgspec.structs.replace(upload, live=bytes([upload.live[0] | 0x80])),
    )
    add("upload", "a box too few", msgspec.structs.replace(upload, boxes=upload.boxes[:-146]))
    add(
        "upload",
        "fewer than t live neighbours",
        UploadRequest(b"\x07", upload.commitments[:192], upload.boxes[:438]),
    )
    add(
        "upload",
        "a damaged box",
        msgspec.structs.replace(upload, boxes=put(upload.boxes, 146, 3, boxes[3][:-1] + b"\0")),
    )
    add("upload", "a box twice", msgspec.structs.replace(upload, boxes=put(upload.boxes, 146, 3, boxes[2])))
    add(
        "upload",
        "the box for another member",
        msgspec.structs.replace(upload, boxes=put(upload.boxes, 146, 3, elsewhere[438:584])),
    )
    add(
        "upload",
        "another commitment",
        msgspec.structs.replace(upload, commitments=put(upload.commitments, 32, 7, bytes(32))),
    )

    # Positions 0..7 of U1; clinic-5 (3) never shared, clinic-8 (6) never uploaded.
    confirm = decode_message(played.request("confirm", victim), ConfirmRequest, "the request")
    assert (confirm.sharers, confirm.survivors) == (b"\xf7", b"\xb7")
    add("confirm", "without the member itself", ConfirmRequest(b"\xf7", b"\xb5"))
    add("confirm", "fewer than t neighbours survive", ConfirmRequest(b"\xf7", b"\x17"))
    add("confirm", "fewer than n_min survivors", ConfirmRequest(b"\xf7", b"\x07"))
    add("confirm", "a survivor that never shared", ConfirmRequest(b"\xf7", b"\xbf"))
    add("confirm", "a sharer more than at the upload", ConfirmRequest(b"\xff", b"\xb7"))
    add("confirm", "a sharer fewer than at the upload", ConfirmRequest(b"\xb7", b"\xb7"))
    add("confirm", "bitmaps of another cohort", ConfirmRequest(b"\xf7\0", b"\xb7"))

    reveal = decode_message(played.request("reveal", victim), RevealRequest, "the request")
    assert reveal.signers == b"\x1b"
    add("reveal", "fewer than t confirmations", RevealRequest(b"\x0b", reveal.signatures[:192]))
    add("reveal", "a confirmation of a member that was dropped", RevealRequest(b"\x3a", reveal.signatures))
    add("reveal", "a signature too few", RevealRequest(b"\x1b", reveal.signatures[:-64]))
    add(
        "reveal",
        "confirmations in each other's place",
        RevealRequest(b"\x1b", reveal.signatures[64:128] + reveal.signatures[:64] + reveal.signatures[128:]),
    )
    root = confirm_root(played.aggregator.h1, b"\xf7", b"\x97")
    two_sets = identities["clinic-1"].sign("masking confirm", played.aggregator.h1, root)
    add("reveal", "a confirmation of another survivor set", RevealRequest(
        b"\x1b", put(reveal.signatures, 64, 0, two_sets)))  # fmt: skip

    result = decode_message(played.aggregator.result(), Result, "the result")
    add("result", "another survivor set", msgspec.structs.replace(result, survivors=b"\x97"))
    add("result", "a survivor that never shared", msgspec.structs.replace(result, survivors=b"\xbf"))
    add("result", "fewer than n_min survivors", msgspec.structs.replace(result, survivors=b"\x07"))
    fewer = msgspec.structs.replace(result, signers=b"\x07", signatures=result.signatures[:192])
    add("result", "fewer than t confirmations", fewer)
    add("result", "another survivor set, to a member that was dropped", msgspec.structs.replace(
        result, survivors=b"\x97"), NEVER_UPLOADS)  # fmt: skip
    return found


def failing_replies(played: Round) -> list[tuple[str, StepName, list[tuple[str, bytes]], bytes, str]]:
    """(name of the case, step, replies before, reply that must be refused, its sender)."""
    name = "clinic-2"
    h0, h1, identity = played.terms.bound.h0, played.aggregator.h1, played.identities[name]
    found: list[tuple[str, StepName, list[tuple[str, bytes]], bytes, str]] = []

    def add(
        step: StepName,
        case: str,
        reply: bytes | msgspec.Struct,
        sender: str = name,
        before: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        data = reply if isinstance(reply, bytes) else encode_message(reply)
        found.append((case, step, list(before), data, sender))

    def advertisement(data: bytes, signer: str = name) -> Advertisement:
        return Advertisement(
            data + played.identities[signer].sign("masking advertise", h0, signer.encode(), data)
        )

    honest = played.reply("advertise", name)
    entry = decode_message(honest, Advertisement, "the reply").entry
    channel, mask, commitment = entry[:32], entry[32:64], entry[64:96]
    add("advertise", "a byte more", honest + b"\0")
    add("advertise", "a signature of zeros", Advertisement(entry[:96] + bytes(64)))
    add("advertise", "another member's reply", played.reply("advertise", "clinic-1"))
    changed = Advertisement(channel + mask + bytes(32) + entry[96:])
    add("advertise", "another commitment under the signature", changed)
    add("advertise", "a channel key of small order", advertisement(bytes(32) + mask + commitment))
    add("advertise", "a mask key of small order", advertisement(channel + bytes(32) + commitment))
    add("advertise", "one key for both", advertisement(channel + channel + commitment))
    before = [(name, honest)]
    add("advertise", "another member's keys", advertisement(entry[:96], "clinic-4"), "clinic-4", before)
    swapped = advertisement(mask + channel + commitment)
    add("advertise", "a second, other reply", swapped, before=before)

    dealt = decode_message(played.reply("share", name), Shares, "the reply")

    def shared(commitments: bytes, boxes: bytes, h: bytes = h1) -> Shares:
        return Shares(
            commitments, boxes, identity.sign("masking share", h, name.encode(), commitments, boxes)
        )

    add("share", "from a member outside the cohort", played.reply("share", name), STAYS_AWAY)
    add("share", "a commitment too few", shared(dealt.commitments[:-64], dealt.boxes))
    add("share", "a box too many", shared(dealt.commitments, dealt.boxes + dealt.boxes[-146:]))
    add("share", "signed under another h1", shared(dealt.commitments, dealt.boxes, noise("h1")))
    add("share", "another member's reply", played.reply("share", "clinic-1"))

    sealed = decode_message(played.reply("upload", name), SealedUpload, "the reply")
    under_h0 = identity.sign("masking upload", h0, name.encode(), sealed.digest)
    add("upload", "from a member that didn't share", played.reply("upload", name), NEVER_SHARES)
    add("upload", "a digest that wasn't signed", SealedUpload(noise("digest"), sealed.signature))
    add("upload", "signed under h0", SealedUpload(sealed.digest, under_h0))
    for case, accused, whom in (
        ("a complaint about a member that shared nothing", 3, NEVER_SHARES),
        ("a complaint about itself", 1, name),
        ("a complaint about a position outside the cohort", 8, STAYS_AWAY),
    ):
        signature = identity.sign("masking complaint", h1, name.encode(), whom.encode())
        add("upload", case, BoxComplaint(accused, signature))

    root = confirm_root(h1, b"\xf7", b"\x97")
    add("confirm", "of another survivor set", Confirmation(identity.sign("masking confirm", h1, root)))
    add("confirm", "another member's reply", played.reply("confirm", "clinic-1"))

    told = decode_message(played.reply("reveal", name), Revealed, "the reply")
    fewer = told.shares[:-65]
    signature = identity.sign("masking reveal", h1, name.encode(), played.aggregator._root, fewer)
    add("reveal", "from a member that didn't confirm", played.reply("reveal", name), NEVER_CONFIRMS)
    add("reveal", "a share too few", Revealed(fewer, signature))
    add("reveal", "another share than was signed", Revealed(bytes(65) + told.shares[65:], told.signature))
    return found


def failures(played: Round) -> Document:
    at_members = []
    for case, step, name, request in failing_requests(played):
        machine = played.replayed(name, step)
        ending: Mapping[str, Any]
        if step == "result":
            ending = refusal(lambda m=machine, r=request: m.open_sum(r))  # type: ignore[misc]
        elif step == "upload":
            ending = complaint_or_refusal(machine, request)
        else:
            ending = refusal(lambda m=machine, s=step, r=request: m.answer(s, r))  # type: ignore[misc]
        at_members.append({"case": case, "step": step, "member": name, "request": request, **ending})
    second = []
    others: dict[StepName, msgspec.Struct] = {
        "share": ShareRequest(u32(0), bytes(32), b""),
        "confirm": ConfirmRequest(b"\xf7", b"\xb6"),
        "reveal": RevealRequest(b"\x1b", bytes(256)),
    }
    for step, following in (("share", "upload"), ("confirm", "reveal"), ("reveal", "result")):
        machine = played.replayed("clinic-2", following)
        request = encode_message(others[step])  # type: ignore[index]
        ending = refusal(lambda m=machine, s=step, r=request: m.answer(s, r))  # type: ignore[misc]
        second.append({"step": step, "member": "clinic-2", "request": request, **ending})
    at_aggregator = []
    for case, open_step, before, reply, sender in failing_replies(played):
        aggregator = played.aggregator_at(open_step)
        for member, data in before:
            aggregator.accept(member, data)
        ending = refusal(lambda a=aggregator, s=sender, r=reply: a.accept(s, r))  # type: ignore[misc]
        at_aggregator.append(
            {
                "case": case,
                "step": open_step,
                "before": [{"member": member, "reply": data} for member, data in before],
                "member": sender,
                "reply": reply,
                **ending,
            }
        )
    return {
        "requests": at_members,
        "second_requests": second,
        "replies": at_aggregator,
        "lying_share": lying_share(),
    }


def complaint_or_refusal(machine: MaskingMember, request: bytes) -> Mapping[str, Any]:
    try:
        started = machine.begin_upload(request)
    except (ServerViolation, Refused):
        return refusal(lambda: machine.begin_upload(request))
    assert isinstance(started, Complaint)
    return {"complaint": started.reply, "accused": started.accused}


def lying_share() -> Document:
    """A sixth member confirms and reveals, so that one lying share can be done without."""
    fuller = Round(NAMES)
    for absent in ([STAYS_AWAY], [STAYS_AWAY], [STAYS_AWAY, NEVER_UPLOADS], [STAYS_AWAY, NEVER_UPLOADS]):
        fuller.step(absent)
    liar = "clinic-4"
    aggregator = fuller.aggregator
    for name in aggregator.participants:
        reply, _ = give(fuller.machines[name], "reveal", aggregator.request(name), ())
        if name == liar:
            honest = decode_message(reply, Revealed, "the reply").shares
            lie = bytes(33) + honest[33:]
            signature = fuller.identities[liar].sign(
                "masking reveal", aggregator.h1, liar.encode(), aggregator._root, lie
            )
            reply = encode_message(Revealed(lie, signature))
        fuller.messages.append({"step": "reveal", "member": name, "reply": reply})
        aggregator.accept(name, reply)
    aggregator.close()
    assert fuller.total is not None
    opener = fuller.machines["clinic-1"].open_sum(aggregator.result())
    return {
        "about": "The same federation; everyone but clinic-3 shares, clinic-8 doesn't upload, "
        "clinic-4 reveals a share of zero in its first place.",
        "reveal_replies": [
            {"member": m["member"], "reply": m["reply"]} for m in fuller.messages if m["step"] == "reveal"
        ],
        "named": sorted(aggregator.named),
        "survivors": list(opener.survivors),
        "sum": opener.open(0, aggregator.finish_frame(0, fuller.total)).tolist(),
    }


def ring_round() -> Document:
    """201 members on a ring, of whom three drop out: digests of all messages only."""
    names = tuple(f"member-{index:03d}" for index in range(201))
    changes = {"gamma": 50, "delta": 50, "n_min": 50, "n_max": 256, "bits": 8, "fields": 20, "dimension": 20}
    played = Round(names, **changes)
    gone = {"share": names[7], "upload": names[100], "confirm": names[200]}
    absent: list[str] = []
    digests = {}
    while played.aggregator.step is not None:
        step = played.aggregator.step
        absent += [gone[step]] if step in gone else []
        played.step(absent)
        told = hashlib.sha256()
        for message in played.messages:
            if message["step"] == step:
                for part in (message["request"], message["reply"], message.get("upload", b"")):
                    told.update(len(part).to_bytes(8, "little") + part)
        digests[step] = told.digest()
    assert played.aggregator.abort is None
    assert played.total is not None
    published = played.aggregator.finish_frame(0, played.total)
    opener = played.machines[names[0]].open_sum(played.aggregator.result())
    cohort = played.aggregator._known
    return {
        "header": header_fields(played.header),
        "group_key": noise("group key"),
        "names": list(names),
        "absent_from": gone,
        "k": cohort.k,
        "t": cohort.t,
        "h1": cohort.h1,
        "steps_sha256": digests,
        "result_sha256": hashlib.sha256(played.aggregator.result()).digest(),
        "published": published,
        "sum": opener.open(0, published).tolist(),
    }


def documents() -> dict[str, Document]:
    """All files by name."""
    played = small_round()
    made = {
        "derivation": derivation(),
        "keys": keys(),
        "mask_expansion": mask_expansion(),
        "graph": graph(),
        "thresholds": limits(),
        "shares": shares(),
        "lanes": lanes(),
        "encoding": encoding(),
        "header": headers(played),
        "round": whole_round(played),
        "failures": failures(played),
        "ring": ring_round(),
    }
    return {name: {"format": 1, "protocol": 1, **document} for name, document in made.items()}


def text(document: Document) -> str:
    """A file's text: byte strings in hexadecimal."""
    return json.dumps(document, indent=1, default=bytes.hex, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for file_name, content in documents().items():
        (FOLDER / f"{file_name}.json").write_text(text(content), encoding="utf-8")
