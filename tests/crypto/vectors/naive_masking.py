"""Masking a second time: plain integers, one value after another, nothing of Blindsum's.

Written from docs/protocols/masking.md to be read beside it; slow on purpose. Libraries do X25519, Ed25519
and AES, everything else is spelled out: HKDF, CTR, MessagePack, canonical JSON, Shamir, tails, lanes.
"""

import base64
import hashlib
import hmac
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import comb
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FIELD = 2**256 + 297
WORD = 2**64
COMPLETE_UP_TO = 200
FRAME_LANES = 2**15


class Stopped(Exception):
    """A server that lies: the member names the check and answers no more."""


class Refused(Exception):
    """Bytes that aren't accepted: the reason, in one word."""


class NotOpened(Exception):
    """A sum that doesn't open: nothing is output."""


# -- derivations ----------------------------------------------------------------------------------------


def labelled(label: str, *fields: bytes) -> bytes:
    out = b""
    for part in (b"blindsum/v1/" + label.encode(), *fields):
        out += len(part).to_bytes(8, "little") + part
    return out


def digest(label: str, *fields: bytes) -> bytes:
    return hashlib.sha256(labelled(label, *fields)).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    out = block = b""
    counter = 1
    while len(out) < length:
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
        counter += 1
    return out[:length]


def derive(secret: bytes, label: str, *context: bytes) -> bytes:
    return hkdf(secret, b"", labelled(label, *context), 32)


def aes_ctr(key: bytes, length: int) -> bytes:
    """AES-256 of the blocks 0, 1, 2, ..., 16 bytes each, big-endian."""
    encrypt = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = (encrypt.update(block.to_bytes(16, "big")) for block in range(-(-length // 16)))
    return b"".join(blocks)[:length]


def lanes_of(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def bytes_of(lanes: Sequence[int]) -> bytes:
    return b"".join(lane.to_bytes(8, "little") for lane in lanes)


def prg(seed: bytes, use: str, h1: bytes, lanes: int) -> list[int]:
    return lanes_of(aes_ctr(derive(seed, f"prg {use}", h1), 8 * lanes))


def public_key(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes) -> bytes | None:
    """The shared secret of X25519; None for a public key of small order."""
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return None


def sign(secret: bytes, label: str, *fields: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(secret).sign(labelled(label, *fields))


def signed_by(public: bytes, signature: bytes, label: str, *fields: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, labelled(label, *fields))
    except InvalidSignature:
        return False
    return True


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


# -- MessagePack, of which only arrays, byte strings and small integers are used ------------------------


def pack(value: Any) -> bytes:
    if isinstance(value, list):
        assert len(value) < 16
        return bytes([0x90 | len(value)]) + b"".join(map(pack, value))
    if isinstance(value, bytes):
        size = len(value)
        if size < 2**8:
            return bytes([0xC4, size]) + value
        if size < 2**16:
            return b"\xc5" + size.to_bytes(2, "big") + value
        return b"\xc6" + size.to_bytes(4, "big") + value
    assert isinstance(value, int)
    if value < 2**7:
        return bytes([value])
    if value < 2**8:
        return bytes([0xCC, value])
    if value < 2**16:
        return b"\xcd" + value.to_bytes(2, "big")
    return b"\xce" + value.to_bytes(4, "big")


def _unpack(data: bytes) -> tuple[Any, bytes]:
    kind, rest = data[0], data[1:]
    if kind < 0x80:
        return kind, rest
    if kind & 0xF0 == 0x90:
        items = []
        for _ in range(kind & 0x0F):
            item, rest = _unpack(rest)
            items.append(item)
        return items, rest
    if kind in (0xC4, 0xC5, 0xC6):
        width = {0xC4: 1, 0xC5: 2, 0xC6: 4}[kind]
        size = int.from_bytes(rest[:width], "big")
        return rest[width : width + size], rest[width + size :]
    if kind in (0xCC, 0xCD, 0xCE):
        width = {0xCC: 1, 0xCD: 2, 0xCE: 4}[kind]
        return int.from_bytes(rest[:width], "big"), rest[width:]
    raise Refused("malformed")


def unpack(data: bytes, tag: int | None, count: int, others: Sequence[int] = ()) -> list[Any]:
    """The fields behind a tag. Only the one encoding that `pack` gives is accepted."""
    try:
        value, rest = _unpack(data)
    except IndexError:
        raise Refused("malformed") from None
    if rest or not isinstance(value, list) or pack(value) != data:
        raise Refused("malformed")
    if tag is None:
        if len(value) != count:
            raise Refused("malformed")
        return value
    if not value or value[0] != tag:
        raise Refused("wrong_step" if value and value[0] in others else "malformed")
    if len(value) != count + 1:
        raise Refused("malformed")
    return value[1:]


def bitmap(flags: Sequence[bool]) -> bytes:
    out = bytearray(-(-len(flags) // 8))
    for index, flag in enumerate(flags):
        out[index // 8] |= flag << (index % 8)
    return bytes(out)


def flags_of(data: bytes, length: int) -> list[bool]:
    if len(data) != -(-length // 8):
        raise Refused("wrong_size")
    bits = [bool(data[index // 8] >> (index % 8) & 1) for index in range(8 * len(data))]
    if any(bits[length:]):
        raise Refused("malformed")
    return bits[:length]


def parts(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


# -- header ---------------------------------------------------------------------------------------------


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no white space, byte strings in base64."""
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in header.items()
    }
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# -- k and t, in exact arithmetic -----------------------------------------------------------------------


def share_of(n: int, per_mille: int) -> int:
    return n // 3 if per_mille == 333 else n * per_mille // 1000


def upper_tail_reach(n: int, marked: int, draws: int, allowed: Fraction, power: int = 1) -> int:
    """Least x with Pr[Hyp(n, marked, draws) > x] ^ power <= allowed."""
    limit = allowed.numerator * comb(n, draws) ** power
    x = min(draws, marked)
    term, tail = comb(marked, x) * comb(n - marked, draws - x), 0
    while x >= 0 and term:
        tail += term
        if tail**power * allowed.denominator > limit:
            return x
        # The term of x - 1 from that of x; the division is exact.
        term = term * x * (n - marked - draws + x) // ((marked - x + 1) * (draws - x + 1))
        x -= 1
    return 0


def shares_in_ring(n: int, k: int, corrupt: int, dropped: int, security: int, window: bool) -> int | None:
    gone = min(corrupt + dropped, n)
    cut = Fraction(n * (n - k - 1) * comb(gone, k), 2 * comb(n, k))
    if cut >= Fraction(1, 2 ** (security + 1)):
        return None
    t1 = upper_tail_reach(n, corrupt, k, Fraction(1, n * 2 ** (security + 1)))
    t2 = k - upper_tail_reach(n, dropped, k, Fraction(1, n * 2**20))
    t = math.ceil((t1 + k - Fraction(5, 4)) / 2) + 1
    if window:
        # n^2 / 2 pairs of windows, and no two may hold t - k/2 colluders each, but with 2^-60.
        allowed = Fraction(2, n * n * 2**60)
        t = max(t, k // 2 + 1 + upper_tail_reach(n, corrupt, k // 2, allowed, power=2))
    return t if t <= t2 else None


@lru_cache
def neighbours_and_shares(
    n: int, gamma: int, delta: int, security: int, window: bool = True, ring: bool = False
) -> tuple[int, int] | None:
    """(k, t), or None if no graph bears gamma and delta."""
    corrupt, dropped = share_of(n, gamma), share_of(n, delta)
    if n <= COMPLETE_UP_TO and not ring:
        t = (n - 1 + corrupt) // 2 + 1
        return (n - 1, t) if n >= 3 and t <= n - 1 else None
    for k in range(2, n, 2):
        t_or_none = shares_in_ring(n, k, corrupt, dropped, security, window)
        if t_or_none is not None:
            return k, t_or_none
    return None


# -- graph ----------------------------------------------------------------------------------------------


def ring_order(n: int, seed: bytes) -> list[int]:
    stream = hashlib.shake_256(labelled("masking graph", seed)).digest(64 * n + 4096)
    words = iter([int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)])
    order = list(range(n))
    for place in range(n - 1, 0, -1):
        word = next(words)
        while word >= 2**32 // (place + 1) * (place + 1):
            word = next(words)
        other = word % (place + 1)
        order[place], order[other] = order[other], order[place]
    return order


def graph(n: int, k: int, seed: bytes) -> list[list[int]]:
    if k == n - 1:
        return [[other for other in range(n) if other != position] for position in range(n)]
    order = ring_order(n, seed)
    rows: list[list[int]] = [[] for _ in range(n)]
    for place, position in enumerate(order):
        for step in range(1, k // 2 + 1):
            rows[position] += [order[(place + step) % n], order[(place - step) % n]]
    return [sorted(row) for row in rows]


# -- sharing --------------------------------------------------------------------------------------------


def share(secret: bytes, threshold: int, points: Sequence[int], uniform: bytes) -> list[bytes]:
    """Uniform bytes hold the coefficients of the highest power first, 48 bytes each."""
    coefficients = [int.from_bytes(part, "little") % FIELD for part in parts(uniform, 48)]
    coefficients = [int.from_bytes(secret, "little"), *reversed(coefficients)]
    assert len(coefficients) == threshold
    out = []
    for x in points:
        value = sum(c * pow(x, power, FIELD) for power, c in enumerate(coefficients)) % FIELD
        out.append(value.to_bytes(33, "little"))
    return out


def rebuild(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret at 0 of the polynomial through the shares; None if it isn't one of 32 bytes."""
    total = 0
    for point, data in shares.items():
        above = below = 1
        for other in shares:
            if other != point:
                above = above * other % FIELD
                below = below * (other - point) % FIELD
        total += int.from_bytes(data, "little") * above * pow(below, -1, FIELD)
    total %= FIELD
    return total.to_bytes(32, "little") if total < 2**256 else None


def is_share(data: bytes) -> bool:
    return len(data) == 33 and int.from_bytes(data, "little") < FIELD


# -- lanes ----------------------------------------------------------------------------------------------


@dataclass
class Lanes:
    """g guard bits, then m fields of f bits; fields by plane."""

    bits: int
    n_max: int
    g: int = field(init=False)
    f: int = field(init=False)
    m: int = field(init=False)

    def __post_init__(self) -> None:
        self.g = int(math.log2(self.n_max))
        self.f = (self.n_max * (2**self.bits - 1)).bit_length()
        self.m = (64 - self.g) // self.f if self.f <= 53 else 0
        if not self.m:
            raise Refused("no layout")

    def pack(self, fields: Sequence[int]) -> list[int]:
        length = -(-len(fields) // self.m)
        lanes = [0] * length
        for index, value in enumerate(fields):
            if not 0 <= value < 2**self.bits:
                raise Refused("field above its maximum")
            plane, lane = divmod(index, length)
            lanes[lane] += value << (self.g + plane * self.f)
        return lanes

    def unpack(self, lanes: Sequence[int], count: int, members: int) -> list[int]:
        length = -(-count // self.m)
        if len(lanes) != length:
            raise NotOpened
        fields = []
        for index in range(self.m * length):
            plane, lane = divmod(index, length)
            fields.append(lanes[lane] >> (self.g + plane * self.f) & (2**self.f - 1))
        used = self.g + self.m * self.f
        if any(lane % 2**self.g or lane >> used for lane in lanes) or any(fields[count:]):
            raise NotOpened
        if max(fields[:count]) > members * (2**self.bits - 1):
            raise NotOpened
        return fields[:count]


# -- encoding -------------------------------------------------------------------------------------------


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def quantised(value: float, units: int, exponent: int, bits: int, dither: int) -> int:
    """One coordinate: weight, clip, scale, round up with the probability of the fraction (15 bits)."""
    limit = (2 ** (bits - 1) - 1) * 2.0**15
    scale = units / 2**20 * math.ldexp(limit, -exponent)
    if bits <= 16:
        scale = float32(scale)
    product = max(-limit, min(limit, value * scale))
    fixed = round(float32(product) if bits <= 16 else product)
    return ((fixed + dither) >> 15) + (1 << (bits - 1))


def vote(values: Sequence[float], units: int, exponent: int, tolerance: int) -> int:
    """0: half the range would do; 1: it fits; 2: too much was clipped."""
    limit = 2.0**exponent / (units / 2**20)

    def above(bound: float) -> int:
        return sum(abs(value) > float32(bound) for value in values)

    if not any(values):
        return 1
    if above(limit) * 10**6 > tolerance * len(values):
        return 2
    return 0 if 4 * above(limit / 2) * 10**6 <= tolerance * len(values) else 1


def limbs(value: int, bits: int, value_bits: int) -> list[int]:
    return [value >> (bits * i) & (2**bits - 1) for i in range(-(-value_bits // bits))]


WEIGHT_UNITS = 1 << 20
TAG_PRIMES = (2**31 - 1, 2**31 - 19)


def check_sums(check_key: bytes, fields: Sequence[int]) -> tuple[int, int]:
    """sum r_i x_i modulo each prime: r_i are the low and the high 31 bits of lane i of the key's stream."""
    key = derive(check_key, "sum check coefficients")
    first = second = 0
    for lane, value in zip(lanes_of(aes_ctr(key, 8 * len(fields))), fields, strict=True):
        first += (lane & (2**31 - 1)) * value
        second += (lane >> 33) * value
    return first % TAG_PRIMES[0], second % TAG_PRIMES[1]


def check_offsets(check_key: bytes, member: str) -> tuple[int, int]:
    raw = derive(check_key, "sum check member", member.encode())
    return (
        int.from_bytes(raw[:16], "little") % TAG_PRIMES[0],
        int.from_bytes(raw[16:], "little") % TAG_PRIMES[1],
    )


def metric_steps(metric: Mapping[str, Any]) -> int:
    low, high, resolution = float(metric["low"]), float(metric["high"]), float(metric["resolution"])
    return math.ceil((high - low) / resolution)


def weight_units(encoding: Mapping[str, Any], examples: int) -> int:
    if encoding["weighting"] == "equal":
        return WEIGHT_UNITS
    relative = examples / int(encoding["max_examples"])
    units = round((math.sqrt(relative) if encoding["weighting"] == "sqrt" else relative) * WEIGHT_UNITS)
    return max(units, math.ceil(WEIGHT_UNITS / int(encoding["weight_ratio"])))


def encode(
    tensors: Sequence[tuple[Sequence[float], int]],
    encoding: Mapping[str, Any],
    examples: int,
    metrics: Mapping[str, float],
    check_key: bytes,
    member: str,
    rounding_seed: bytes,
) -> list[int]:
    """All fields of one member's vector: coordinates, votes, weight, metrics, two tags."""
    bits, units = encoding["bits"], weight_units(encoding, examples)
    count = sum(len(values) for values, _ in tensors)
    noise = aes_ctr(derive(rounding_seed, "stochastic rounding", member.encode()), 2 * count)
    dither = iter([int.from_bytes(pair, "little") >> 1 for pair in parts(noise, 2)])
    fields = [
        quantised(value, units, exponent, bits, next(dither))
        for values, exponent in tensors
        for value in values
    ]
    fields += [vote(values, units, exponent, encoding["clip_tolerance"]) for values, exponent in tensors]
    fields += limbs(units, bits, 21)
    for metric in encoding["metrics"]:
        steps = metric_steps(metric)
        value = min(round((metrics[metric["name"]] - metric["low"]) / metric["resolution"]), steps)
        fields += limbs(value, bits, steps.bit_length())
    sums, offsets = check_sums(check_key, fields), check_offsets(check_key, member)
    for prime, part, offset in zip(TAG_PRIMES, sums, offsets, strict=True):
        fields += limbs((part + offset) % prime, bits, 31)
    return fields


def sum_check_passes(fields: Sequence[int], bits: int, check_key: bytes, survivors: Sequence[str]) -> bool:
    each = -(-31 // bits)
    body, tags = fields[: -2 * each], (fields[-2 * each : -each], fields[-each:])
    for index, prime in enumerate(TAG_PRIMES):
        want = check_sums(check_key, body)[index] + sum(check_offsets(check_key, u)[index] for u in survivors)
        have = sum(limb << (bits * i) for i, limb in enumerate(tags[index]))
        if (want - have) % prime:
            return False
    return True


# -- a round --------------------------------------------------------------------------------------------

REQUESTS, REPLIES = (1, 3, 5, 8, 10), (2, 4, 6, 7, 9, 11)


@dataclass
class World:
    """What everyone knows, and what only members know: the group key."""

    header: Mapping[str, Any]
    roster: Sequence[tuple[str, bytes]]
    group_key: bytes

    def __post_init__(self) -> None:
        self.h0 = digest("header", header_bytes(self.header))
        self.lanes = Lanes(self.header["bits"], self.header["n_max"])
        self.fields = self.header["fields"]
        assert self.fields <= FRAME_LANES * self.lanes.m, "one frame is enough for vectors"
        self.lane_count = -(-self.fields // self.lanes.m)

    def leaf(self, index: int, entry: bytes) -> bytes:
        return digest("masking leaf", self.h0, number(index), entry)

    def sum_mask(self, h1: bytes) -> list[int]:
        return prg(derive(self.group_key, "group key sum", h1), "masking sum", h1, self.lane_count)


@dataclass
class U1:
    """The cohort: positions are indices into `indices`."""

    world: World
    members: bytes
    leaves: bytes

    def __post_init__(self) -> None:
        header, h0 = self.world.header, self.world.h0
        self.indices = [int.from_bytes(part, "little") for part in parts(self.members, 4)]
        self.n = len(self.indices)
        limits = neighbours_and_shares(self.n, header["gamma"], header["delta"], header["security"])
        if limits is None:
            raise Stopped("thresholds")
        self.k, self.t = limits
        root = digest("masking cohort", h0, self.members, self.leaves)
        self.h1 = digest("u1", h0, root)
        self.rows = graph(self.n, self.k, digest("masking graph seed", h0, root))

    def name(self, position: int) -> bytes:
        return self.world.roster[self.indices[position]][0].encode()

    def identity(self, position: int) -> bytes:
        return self.world.roster[self.indices[position]][1]

    def commitment(self, dealer: int, receiver: int, kind: bytes, opened: bytes) -> bytes:
        return digest("masking share commitment", self.h1, number(dealer), number(receiver), kind, opened)

    def confirm_root(self, sharers: bytes, survivors: bytes) -> bytes:
        return digest("masking survivors", self.h1, sharers, survivors)

    def pair_mask(self, own_root: bytes, public: bytes, one: int, other: int) -> list[int]:
        shared = agree(derive(own_root, "masking mask key", self.world.h0), public)
        if shared is None:
            raise Stopped("neighbour_keys")
        low, high = min(one, other), max(one, other)
        seed = derive(shared, "masking pair seed", self.h1, number(low), number(high))
        return prg(seed, "masking pair", self.h1, self.world.lane_count)

    def self_mask(self, seed: bytes) -> list[int]:
        return prg(seed, "masking self", self.h1, self.world.lane_count)


class Member:
    """One member's answers. Secrets: channel secret, mask root, self seed, dealer seed, 32 bytes each."""

    def __init__(self, world: World, index: int, identity: bytes, secrets: bytes) -> None:
        self.world, self.index, self.identity = world, index, identity
        self.name = world.roster[index][0].encode()
        self.channel, self.root, self.seed, self.dealer = parts(secrets, 32)
        self.asked: dict[str, bytes] = {}
        self.confirmed: tuple[bytes, bytes] | None = None
        self.revealed = False
        self.stopped = False
        self.upload = b""

    def answer(self, step: str, request: bytes, fields: Sequence[int] = ()) -> bytes:
        if self.stopped:
            raise Stopped("stopped before")
        if self.asked.get(step, request) != request:
            self.stopped = True
            raise Stopped("second_request")
        try:
            steps = {"advertise": self._advertise, "share": self._share}
            steps |= {"confirm": self._confirm, "reveal": self._reveal}
            reply = self._upload(request, fields) if step == "upload" else steps[step](request)
        except Stopped:
            self.stopped = True
            raise
        self.asked[step] = request
        return reply

    def _advertise(self, request: bytes) -> bytes:
        h0 = self.world.h0
        (asked,) = unpack(request, 1, 1, REQUESTS)
        if len(asked) != 32:
            raise Refused("malformed")
        if asked != h0:
            raise Refused("wrong_round")
        mask_secret = derive(self.root, "masking mask key", h0)
        keys = public_key(self.channel) + public_key(mask_secret) + digest("masking self", h0, self.seed)
        self.entry = keys + sign(self.identity, "masking advertise", h0, self.name, keys)
        return pack([2, self.entry])

    def _share(self, request: bytes) -> bytes:
        world, header = self.world, self.world.header
        members, leaves, entries = unpack(request, 3, 3, REQUESTS)
        if len(members) % 4 or len(leaves) != 8 * len(members):
            raise Refused("wrong_size")
        indices = [int.from_bytes(part, "little") for part in parts(members, 4)]
        if not header["n_min"] <= len(indices) <= header["n_max"]:
            raise Stopped("cohort_size")
        if indices != sorted(set(indices)) or indices[-1] >= len(world.roster):
            raise Stopped("cohort_list")
        own = world.leaf(self.index, self.entry)
        if self.index not in indices or parts(leaves, 32)[indices.index(self.index)] != own:
            raise Stopped("own_leaf")
        u1 = U1(world, members, leaves)
        me = indices.index(self.index)
        if len(entries) != 160 * u1.k:
            raise Stopped("degree")
        public = [self.entry[:32], self.entry[32:64]]
        for v, entry in zip(u1.rows[me], parts(entries, 160), strict=True):
            if world.leaf(indices[v], entry) != parts(leaves, 32)[v]:
                raise Stopped("neighbour_leaf")
            if not signed_by(
                u1.identity(v), entry[96:], "masking advertise", world.h0, u1.name(v), entry[:96]
            ):
                raise Stopped("neighbour_signature")
            public += [entry[:32], entry[32:64]]
        if len(set(public)) != len(public):
            raise Stopped("neighbour_keys")

        points = [v + 1 for v in u1.rows[me]]
        size = 48 * (u1.t - 1)
        stream = hashlib.shake_256(derive(self.dealer, "masking dealer", u1.h1))
        uniform = stream.digest(2 * size + 64 * u1.k)
        seed_shares = share(self.seed, u1.t, points, uniform[:size])
        root_shares = share(self.root, u1.t, points, uniform[size : 2 * size])
        salts = parts(uniform[2 * size :], 32)
        commitments = boxes = b""
        self.box_keys, self.mask_keys = [], []
        for slot, (v, entry) in enumerate(zip(u1.rows[me], parts(entries, 160), strict=True)):
            about_seed = seed_shares[slot] + salts[2 * slot]
            about_root = root_shares[slot] + salts[2 * slot + 1]
            commitments += u1.commitment(me, v, b"self", about_seed)
            commitments += u1.commitment(me, v, b"root", about_root)
            shared = agree(self.channel, entry[:32])
            if shared is None:
                raise Stopped("neighbour_keys")
            key = derive(shared, "masking box", u1.h1, number(me), number(v))
            boxes += AESGCM(key).encrypt(bytes(12), about_seed + about_root, None)
            self.box_keys.append(derive(shared, "masking box", u1.h1, number(v), number(me)))
            self.mask_keys.append(entry[32:64])
        self.u1, self.me = u1, me
        signature = sign(self.identity, "masking share", u1.h1, self.name, commitments, boxes)
        return pack([4, commitments, boxes, signature])

    def _upload(self, request: bytes, fields: Sequence[int]) -> bytes:
        u1, me = self.u1, self.me
        live_bits, commitments, boxes = unpack(request, 5, 3, REQUESTS)
        live = flags_of(live_bits, u1.k)
        if len(commitments) != 64 * sum(live) or len(boxes) != 146 * sum(live):
            raise Refused("wrong_size")
        if sum(live) < u1.t:
            raise Stopped("live_neighbours")
        slots = [slot for slot in range(u1.k) if live[slot]]
        self.received: list[bytes] = []
        for slot, box, pledges in zip(slots, parts(boxes, 146), parts(commitments, 64), strict=True):
            v = u1.rows[me][slot]
            try:
                content = AESGCM(self.box_keys[slot]).decrypt(bytes(12), box, None)
                about_seed, about_root = parts(content, 65)
                good = is_share(about_seed[:33]) and is_share(about_root[:33])
                good = good and u1.commitment(v, me, b"self", about_seed) == pledges[:32]
                good = good and u1.commitment(v, me, b"root", about_root) == pledges[32:]
            except InvalidTag:
                good = False
            if not good:
                self.stopped = True
                signature = sign(self.identity, "masking complaint", u1.h1, self.name, u1.name(v))
                return pack([7, v, signature])
            self.received.append(content)
        y = self.world.lanes.pack(fields)
        masks = [(1, self.world.sum_mask(u1.h1)), (1, u1.self_mask(self.seed))]
        for slot in slots:
            v = u1.rows[me][slot]
            masks.append((1 if me < v else -1, u1.pair_mask(self.root, self.mask_keys[slot], me, v)))
        for sign_of, mask in masks:
            y = [(lane + sign_of * m) % WORD for lane, m in zip(y, mask, strict=True)]
        self.live = live
        self.upload = bytes_of(y)
        promised = digest("upload digest", u1.h1, hashlib.sha256(self.upload).digest())
        return pack([6, promised, sign(self.identity, "masking upload", u1.h1, self.name, promised)])

    def _survivors(self, sharers: bytes, survivors: bytes) -> list[bool]:
        header = self.world.header
        shared, alive = flags_of(sharers, self.u1.n), flags_of(survivors, self.u1.n)
        if any(a and not s for a, s in zip(alive, shared, strict=True)):
            raise Stopped("survivors")
        if not header["n_min"] <= sum(alive) <= header["n_max"]:
            raise Stopped("survivor_count")
        return alive

    def _confirm(self, request: bytes) -> bytes:
        u1 = self.u1
        sharers, survivors = unpack(request, 8, 2, REQUESTS)
        alive = self._survivors(sharers, survivors)
        shared = flags_of(sharers, u1.n)
        if not alive[self.me]:
            raise Stopped("own_survival")
        row = u1.rows[self.me]
        if [shared[v] for v in row] != self.live:
            raise Stopped("sharers")
        if sum(alive[v] for v in row) < u1.t:
            raise Stopped("live_neighbours")
        self.confirmed = (sharers, survivors)
        root = u1.confirm_root(sharers, survivors)
        return pack([9, sign(self.identity, "masking confirm", u1.h1, root)])

    def _reveal(self, request: bytes) -> bytes:
        u1, row = self.u1, self.u1.rows[self.me]
        assert self.confirmed is not None
        signer_bits, signatures = unpack(request, 10, 2, REQUESTS)
        alive = flags_of(self.confirmed[1], u1.n)
        signers = [v for v, flag in zip(row, flags_of(signer_bits, u1.k), strict=True) if flag]
        if len(signers) < u1.t or not all(alive[v] for v in signers):
            raise Stopped("confirmations")
        root = u1.confirm_root(*self.confirmed)
        self._check_confirmations(signers, signatures, root, "confirm_signature")
        live = [v for v, flag in zip(row, self.live, strict=True) if flag]
        shares = b""
        for v, content in zip(live, self.received, strict=True):
            shares += content[:65] if alive[v] else content[65:]
        self.revealed = True
        return pack([11, shares, sign(self.identity, "masking reveal", u1.h1, self.name, root, shares)])

    def _check_confirmations(self, signers: Sequence[int], signatures: bytes, root: bytes, name: str) -> None:
        if len(signatures) != 64 * len(signers):
            raise Refused("wrong_size")
        for v, signature in zip(signers, parts(signatures, 64), strict=True):
            if not signed_by(self.u1.identity(v), signature, "masking confirm", self.u1.h1, root):
                raise Stopped(name)

    def open(self, result: bytes, published: bytes) -> list[int]:
        """The summed fields."""
        u1, world = self.u1, self.world
        sharers, survivors, signer_bits, signatures = unpack(result, 12, 4)
        alive = self._survivors(sharers, survivors)
        signers = flags_of(signer_bits, u1.n)
        if self.confirmed not in (None, (sharers, survivors)):
            raise Stopped("result_survivors")
        if any(s and not a for s, a in zip(signers, alive, strict=True)) or sum(signers) < u1.t:
            raise Stopped("result_signers")
        if not self.revealed:
            root = u1.confirm_root(sharers, survivors)
            who = [v for v in range(u1.n) if signers[v]]
            self._check_confirmations(who, signatures, root, "result_signature")
        if len(published) != 8 * world.lane_count:
            raise NotOpened
        mask = world.sum_mask(u1.h1)
        lanes = [(lane - sum(alive) * k) % WORD for lane, k in zip(lanes_of(published), mask, strict=True)]
        return world.lanes.unpack(lanes, world.fields, sum(alive))


class Aggregator:
    """Collects replies by roster index, in order of arrival, and adds uploads."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.step = "advertise"
        self.entries: dict[int, bytes] = {}
        self.shares: dict[int, list[bytes]] = {}
        self.sharing: list[bool] = []
        self.uploads: dict[int, bytes] = {}
        self.alive: list[bool] = []
        self.confirmations: dict[int, bytes] = {}
        self.revealed: dict[int, bytes] = {}
        self.named: set[str] = set()
        self.replied: dict[int, bytes] = {}

    def position(self, index: int) -> int:
        return self.u1.indices.index(index)

    def asked(self) -> list[int]:
        """Roster indices of who is asked in the open step."""
        if self.step == "advertise":
            return list(range(len(self.world.roster)))
        u1 = self.u1
        if self.step == "share":
            positions = list(range(u1.n))
        elif self.step == "upload":
            positions = [v for v in range(u1.n) if self.sharing[v]]
        elif self.step == "confirm":
            positions = [v for v in range(u1.n) if self.alive[v]]
        else:
            positions = [
                v
                for v in sorted(self.confirmations)
                if sum(w in self.confirmations for w in u1.rows[v]) >= u1.t
            ]
        return [u1.indices[v] for v in positions]

    def request(self, index: int) -> bytes:
        if self.step == "advertise":
            return pack([1, self.world.h0])
        u1, me = self.u1, self.position(index)
        row = u1.rows[me]
        if self.step == "share":
            entries = b"".join(self.entries[u1.indices[v]] for v in row)
            return pack([3, u1.members, u1.leaves, entries])
        if self.step == "upload":
            live = [self.sharing[v] for v in row]
            commitments = boxes = b""
            for v in row:
                if self.sharing[v]:
                    slot = u1.rows[v].index(me)
                    commitments += parts(self.shares[v][0], 64)[slot]
                    boxes += parts(self.shares[v][1], 146)[slot]
            return pack([5, bitmap(live), commitments, boxes])
        if self.step == "confirm":
            return pack([8, bitmap(self.sharing), bitmap(self.alive)])
        chosen = [v for v in row if v in self.confirmations][: u1.t]
        signatures = b"".join(self.confirmations[v] for v in chosen)
        return pack([10, bitmap([v in chosen for v in row]), signatures])

    def accept(self, index: int, reply: bytes, upload: bytes = b"") -> None:
        """Check and record a reply. Raises `Refused`."""
        name, identity = self.world.roster[index][0].encode(), self.world.roster[index][1]
        if self.replied.get(index) == reply:
            return
        if index not in self.asked():
            raise Refused("not_a_participant")
        if index in self.replied:
            raise Refused("conflict")
        if self.step == "advertise":
            (entry,) = unpack(reply, 2, 1, REPLIES)
            if len(entry) != 160:
                raise Refused("malformed")
            used = {key for other in self.entries.values() for key in (other[:32], other[32:64])}
            if {entry[:32], entry[32:64]} & used or entry[:32] == entry[32:64]:
                raise Refused("conflict")
            if not signed_by(identity, entry[96:], "masking advertise", self.world.h0, name, entry[:96]):
                raise Refused("signature")
            if any(agree(b"\x01" * 32, key) is None for key in (entry[:32], entry[32:64])):
                raise Refused("out_of_range")
            self.entries[index] = entry
        else:
            self._accept_later(self.position(index), name, identity, reply, upload)
        self.replied[index] = reply

    def _accept_later(self, me: int, name: bytes, identity: bytes, reply: bytes, upload: bytes) -> None:
        u1 = self.u1
        row = u1.rows[me]
        signed: tuple[Any, ...]
        if self.step == "share":
            commitments, boxes, signature = unpack(reply, 4, 3, REPLIES)
            if len(commitments) != 64 * u1.k or len(boxes) != 146 * u1.k:
                raise Refused("wrong_size")
            signed = ("masking share", u1.h1, name, commitments, boxes)
        elif self.step == "upload" and reply[1] == 7:
            accused, signature = unpack(reply, 7, 2, REPLIES)
            if accused not in row or not self.sharing[accused]:
                raise Refused("out_of_range")
            signed = ("masking complaint", u1.h1, name, u1.name(accused))
        elif self.step == "upload":
            promised, signature = unpack(reply, 6, 2, REPLIES)
            signed = ("masking upload", u1.h1, name, promised)
        elif self.step == "confirm":
            (signature,) = unpack(reply, 9, 1, REPLIES)
            signed = ("masking confirm", u1.h1, self.root)
        else:
            shares, signature = unpack(reply, 11, 2, REPLIES)
            if len(shares) != 65 * sum(self.sharing[v] for v in row):
                raise Refused("wrong_size")
            signed = ("masking reveal", u1.h1, name, self.root, shares)
        if len(signature) != 64:
            raise Refused("malformed")
        if not signed_by(identity, signature, *signed):
            raise Refused("signature")
        if self.step == "share":
            self.shares[me] = [commitments, boxes]
        elif self.step == "upload" and reply[1] == 7:
            self.step = "aborted"
            self.named = {name.decode(), u1.name(accused).decode()}
        elif self.step == "upload":
            assert digest("upload digest", u1.h1, hashlib.sha256(upload).digest()) == promised
            self.uploads[me] = upload
        elif self.step == "confirm":
            self.confirmations[me] = signature
        else:
            self.revealed[me] = shares

    def close(self) -> None:
        """Close the open step, with enough replies."""
        if self.step == "advertise":
            indices = sorted(self.entries)
            members = b"".join(map(number, indices))
            leaves = b"".join(self.world.leaf(index, self.entries[index]) for index in indices)
            self.u1 = U1(self.world, members, leaves)
            following = "share"
        elif self.step == "share":
            u1 = self.u1
            self.sharing = [v in self.shares for v in range(u1.n)]
            while True:
                lonely = [
                    v
                    for v in range(u1.n)
                    if self.sharing[v] and sum(self.sharing[w] for w in u1.rows[v]) < u1.t
                ]
                if not lonely:
                    break
                for v in lonely:
                    self.sharing[v] = False
            following = "upload"
        elif self.step == "upload":
            self.alive = [v in self.uploads for v in range(self.u1.n)]
            self.root = self.u1.confirm_root(bitmap(self.sharing), bitmap(self.alive))
            following = "confirm"
        elif self.step == "confirm":
            following = "reveal"
        else:
            following = "finished"
        self.step = following
        self.replied = {}

    def secrets(self) -> dict[int, bytes | None]:
        """Rebuilt self seeds of survivors and mask roots of the dropped; who sent a bad share is named."""
        u1 = self.u1
        found: dict[int, bytes | None] = {}
        for dealer in range(u1.n):
            if not self.sharing[dealer]:
                continue
            kind, offset = (b"self", 0) if self.alive[dealer] else (b"root", 32)
            good: dict[int, bytes] = {}
            for slot, receiver in enumerate(u1.rows[dealer]):
                if receiver not in self.revealed:
                    continue
                live = [v for v in u1.rows[receiver] if self.sharing[v]]
                opened = parts(self.revealed[receiver], 65)[live.index(dealer)]
                pledge = parts(self.shares[dealer][0], 64)[slot][offset : offset + 32]
                if is_share(opened[:33]) and u1.commitment(dealer, receiver, kind, opened) == pledge:
                    good[receiver + 1] = opened[:33]
                else:
                    self.named.add(u1.name(receiver).decode())
            assert len(good) >= u1.t
            found[dealer] = rebuild(dict(list(good.items())[: u1.t]))
        return found

    def result(self) -> tuple[bytes, bytes]:
        """The result message and the published sum."""
        u1 = self.u1
        total = [0] * self.world.lane_count
        for upload in self.uploads.values():
            total = [(a + b) % WORD for a, b in zip(total, lanes_of(upload), strict=True)]
        for dealer, secret in self.secrets().items():
            entry = self.entries[u1.indices[dealer]]
            assert secret is not None
            masks: list[tuple[int, list[int]]] = []
            if self.alive[dealer]:
                assert digest("masking self", self.world.h0, secret) == entry[64:96]
                masks.append((-1, u1.self_mask(secret)))
            else:
                assert public_key(derive(secret, "masking mask key", self.world.h0)) == entry[32:64]
                for v in u1.rows[dealer]:
                    if self.alive[v]:
                        key = self.entries[u1.indices[v]][32:64]
                        masks.append((-1 if v < dealer else 1, u1.pair_mask(secret, key, dealer, v)))
            for sign_of, mask in masks:
                total = [(a + sign_of * m) % WORD for a, m in zip(total, mask, strict=True)]
        signers = sorted(self.confirmations)[: u1.t]
        signatures = b"".join(self.confirmations[v] for v in signers)
        flags = bitmap([v in signers for v in range(u1.n)])
        return pack([12, bitmap(self.sharing), bitmap(self.alive), flags, signatures]), bytes_of(total)
