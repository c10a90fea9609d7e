"""The round of bfv, ckks and paillier: exact sums, and every lie that members can detect."""

import pickle
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.encoding.vector import summed_digest
from blindsum.crypto.errors import (
    BlindsumError,
    EncodingError,
    OpeningFailed,
    ParameterRefused,
    RefusalReason,
    Refused,
    ServerViolation,
    SumCheckFailed,
)
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.homomorphic.rounds import SignedUpload, UploadList, scheme
from blindsum.crypto.trust.header import BoundHeader
from small_he_round import MEMBERS, UPLOADING, SmallHeRound


@pytest.fixture(scope="module")
def done(setting):
    """A finished round: aggregator, machines, published sum."""
    return setting.run()


def test_all_members_open_the_same_exact_sum_the_dropout_too(setting, done):
    aggregator, machines, published = done
    assert aggregator.survivors == UPLOADING
    assert aggregator.step is None
    plain = setting.plain_sum()
    for member in MEMBERS:
        opened, error = setting.open(machines[member], aggregator.result(), published)
        assert opened.digest == summed_digest(setting.vector, plain)
        assert opened.survivors == UPLOADING
        assert opened.metrics["loss"] == pytest.approx(1.25)
        assert error < 0.25
        assert (error == 0) == (setting.name != "ckks")


def test_uploads_and_sums_have_the_promised_sizes_and_never_repeat(setting):
    aggregator = setting.scheme.aggregator(setting.terms)
    layout = setting.scheme.bulk_layout(setting.terms)
    assert layout.frames >= 2
    first, _ = setting.upload(setting.member("ann"), "ann", aggregator)
    second, _ = setting.upload(setting.member("ann"), "ann", aggregator)
    assert [len(frame) for frame in first] == [layout.upload_bytes(index) for index in range(layout.frames)]
    assert all(one != two for one, two in zip(first, second, strict=True))


class TestLyingServer:
    """What the aggregator adds is its own affair; whether members accept it isn't."""

    def refused(self, setting, round_, error=(SumCheckFailed, OpeningFailed)):
        aggregator, machines, published = round_
        with pytest.raises(error):
            setting.open(machines["ann"], aggregator.result(), published)

    def test_one_member_doubled(self, setting):
        self.refused(setting, setting.run(change=lambda member: 2 if member == "bob" else 1))

    def test_one_member_left_out(self, setting):
        self.refused(setting, setting.run(change=lambda member: int(member != "bob")))

    def test_one_members_upload_as_the_sum(self, setting):
        self.refused(setting, setting.run(change=lambda member: int(member == "bob")))

    def test_a_sum_of_another_round(self, setting, done):
        later = SmallHeRound(setting.name, 8, like=setting)
        aggregator, machines, _ = later.run()
        self.refused(later, (aggregator, machines, done[2]))

    def test_frames_swapped_cut_or_changed(self, setting, done):
        aggregator, machines, published = done
        flipped = bytearray(published[0])
        flipped[len(flipped) // 2] ^= 1
        for wrong in (
            [published[1], published[0], *published[2:]],
            [published[0][:-1], *published[1:]],
            [published[0] + b"\0", *published[1:]],
            [b"", *published[1:]],
            [bytes(len(published[0])), *published[1:]],
            [bytes(flipped), *published[1:]],
            published[:-1],
        ):
            self.refused(setting, (aggregator, machines, wrong))

    def listed(self, done) -> UploadList:
        return decode_message(done[0].result(), UploadList, "list")

    def test_a_list_that_is_not_the_rounds(self, setting, done):
        good = self.listed(done)
        stranger = SigningKey.generate()
        digest = good.uploads[0].digest
        forged = SignedUpload(
            "cid", setting.h1, digest, stranger.sign("he upload", setting.h1, b"cid", digest)
        )
        ann = setting.identities["ann"]
        another = SignedUpload(
            "ann", setting.h1, bytes(32), ann.sign("he upload", setting.h1, b"ann", bytes(32))
        )
        for check, uploads in (
            ("result_cohort", good.uploads[:2]),
            ("result_cohort", ()),
            ("result_cohort", good.uploads * 2),
            ("result_members", (*good.uploads[:2], good.uploads[1])),
            ("result_members", good.uploads[::-1]),
            ("result_members", (*good.uploads[:3], replaced(good.uploads[3], member="mallory"))),
            ("result_signature", (*good.uploads[:2], forged, good.uploads[3])),
            ("result_signature", (*good.uploads[:3], replaced(good.uploads[3], digest=bytes(32)))),
            ("result_signature", (*good.uploads[:3], replaced(good.uploads[2], member="eve"))),
            ("result_signature", (*good.uploads[:3], replaced(good.uploads[3], h1=bytes(32)))),
            ("result_own_upload", (another, *good.uploads[1:])),
        ):
            machine = setting.restored("ann", done[1]["ann"].snapshot())
            with pytest.raises(ServerViolation) as caught:
                machine.open_sum(encode_message(UploadList(setting.h1, uploads)))
            assert caught.value.check == check
            with pytest.raises(ServerViolation):
                machine.open_sum(done[0].result())
            with pytest.raises(ServerViolation):
                setting.restored("ann", machine.snapshot()).open_sum(done[0].result())

    def test_a_list_of_another_round(self, setting, done):
        machine = setting.restored("ann", done[1]["ann"].snapshot())
        with pytest.raises(ServerViolation):
            machine.open_sum(encode_message(replaced(self.listed(done), h1=bytes(32))))

    def test_a_shorter_list_than_the_sum_has(self, setting, done):
        _, machines, published = done
        machine = setting.restored("eve", machines["eve"].snapshot())
        shorter = encode_message(UploadList(setting.h1, self.listed(done).uploads[:3]))
        with pytest.raises((SumCheckFailed, OpeningFailed)):
            setting.open(machine, shorter, published)

    def test_a_request_for_another_round(self, setting):
        machine = setting.member("ann")
        with pytest.raises(ServerViolation):
            machine.begin_upload(encode_message([bytes(32)]))
        assert machine.waiting_for is None
        with pytest.raises(ServerViolation):
            machine.begin_upload(setting.scheme.aggregator(setting.terms).request("ann"))


class TestMember:
    def test_the_upload_is_sealed_once(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms)
        machine = setting.member("ann")
        with pytest.raises(Refused):
            machine.seal_upload(bytes(32))
        protector = machine.begin_upload(aggregator.request("ann"))
        with pytest.raises(Refused, match="frames"):
            machine.seal_upload(bytes(32))
        fields = setting.fields("ann")
        for index in range(protector.layout.frames):
            protector.protect(index, fields[slice(*protector.layout.field_range(index))])
        with pytest.raises(Refused):
            protector.protect(0, fields[slice(*protector.layout.field_range(0))])
        reply = machine.seal_upload(bytes(32))
        assert machine.seal_upload(bytes(32)) == reply
        assert machine.waiting_for is None
        with pytest.raises(Refused) as caught:
            machine.seal_upload(bytes([1]) * 32)
        assert caught.value.reason is RefusalReason.CONFLICT
        with pytest.raises(Refused):
            machine.begin_upload(aggregator.request("ann"))

    def test_a_snapshot_continues_at_every_step(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms)
        machine = setting.restored("ann", setting.member("ann").snapshot())
        assert machine.waiting_for == "upload"
        machine.begin_upload(aggregator.request("ann"))
        machine = setting.restored("ann", machine.snapshot())
        _, reply = setting.upload(machine, "ann", aggregator)
        machine = setting.restored("ann", machine.snapshot())
        assert machine.waiting_for is None
        assert machine.seal_upload(aggregator.expected_digest(reply)) == reply
        assert setting.he_keys.secret not in machine.snapshot()

    def test_a_snapshot_of_another_member_round_or_form(self, setting):
        snapshot = setting.member("ann").snapshot()
        later = SmallHeRound(setting.name, 8, like=setting)
        with pytest.raises(Refused):
            setting.restored("bob", snapshot)
        with pytest.raises(Refused):
            later.restored("ann", snapshot)
        for bad in (b"", snapshot[:-1], snapshot + b"\0"):
            with pytest.raises(Refused):
                setting.restored("ann", bad)

    def test_there_are_no_message_steps(self, setting):
        with pytest.raises(Refused):
            setting.member("ann").answer("advertise", b"")

    def test_erased_keys_open_nothing(self, setting, done):
        machine = setting.restored("ann", done[1]["ann"].snapshot())
        machine.erase()
        for attempt in (lambda: machine.open_sum(done[0].result()), lambda: machine.begin_upload(b"")):
            with pytest.raises(Refused):
                attempt()
        assert machine.waiting_for is None

    def test_it_does_not_pickle_or_print_secrets(self, setting):
        machine = setting.member("ann")
        with pytest.raises(TypeError):
            pickle.dumps(machine)
        assert setting.he_keys.secret[:16].hex() not in repr(machine)

    def test_fields_that_do_not_fit(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms)
        protector = setting.member("ann").begin_upload(aggregator.request("ann"))
        start, stop = protector.layout.field_range(0)
        good = np.zeros(stop - start, np.uint32)
        high = good.copy()
        high[3] = 2**16
        for index, fields in (
            (0, good[:-1]),
            (0, high),
            (0, good.astype(np.int64)),
            (0, good.reshape(1, -1)),
            (protector.layout.frames, good),
            (-1, good),
        ):
            with pytest.raises(EncodingError):
                protector.protect(index, fields)


class TestAggregator:
    def refused(self, reason, aggregator, member, reply):
        for method in (aggregator.accept, aggregator.check_reply):
            with pytest.raises(Refused) as caught:
                method(member, reply)
            assert caught.value.reason is reason
        assert aggregator.replied == frozenset()

    def test_replies_that_are_not_the_members_own(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms, frozenset({"eve"}))
        _, reply = setting.upload(setting.member("ann"), "ann", aggregator)
        good = decode_message(reply, SignedUpload, "reply")
        for reason, member, data in (
            (RefusalReason.MALFORMED, "ann", b""),
            (RefusalReason.MALFORMED, "ann", reply + b"\0"),
            (RefusalReason.MALFORMED, "ann", reply[:-1]),
            (RefusalReason.NOT_A_PARTICIPANT, "bob", reply),
            (RefusalReason.NOT_A_PARTICIPANT, "eve", reply),
            (RefusalReason.UNKNOWN_MEMBER, "mallory", reply),
            (RefusalReason.SIGNATURE, "bob", encode_message(replaced(good, member="bob"))),
            (RefusalReason.SIGNATURE, "ann", encode_message(replaced(good, digest=bytes(32)))),
            (RefusalReason.SIGNATURE, "ann", encode_message(replaced(good, signature=bytes(64)))),
            (RefusalReason.WRONG_ROUND, "ann", encode_message(replaced(good, h1=bytes(32)))),
        ):
            self.refused(reason, aggregator, member, data)

    def test_an_upload_of_an_earlier_round(self, setting):
        later = SmallHeRound(setting.name, 8, like=setting)
        _, reply = setting.upload(setting.member("ann"), "ann", setting.scheme.aggregator(setting.terms))
        self.refused(RefusalReason.WRONG_ROUND, later.scheme.aggregator(later.terms), "ann", reply)

    def test_the_same_upload_twice_counts_once_and_another_is_refused(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms)
        _, reply = setting.upload(setting.member("ann"), "ann", aggregator)
        _, other = setting.upload(setting.member("ann"), "ann", aggregator)
        assert aggregator.check_reply("ann", reply)
        assert aggregator.accept("ann", reply)
        assert not aggregator.check_reply("ann", reply)
        assert not aggregator.accept("ann", reply)
        with pytest.raises(Refused) as caught:
            aggregator.accept("ann", other)
        assert caught.value.reason is RefusalReason.CONFLICT
        assert aggregator.replied == {"ann"}

    def test_below_n_min_it_aborts_and_above_n_max_it_is_full(self, setting, done):
        listed = {
            upload.member: encode_message(upload)
            for upload in decode_message(done[0].result(), UploadList, "list").uploads
        }
        aggregator = setting.scheme.aggregator(setting.terms)
        for member in UPLOADING[:2]:
            aggregator.accept(member, listed[member])
        aggregator.close()
        assert aggregator.abort is not None
        assert aggregator.survivors == ()
        for attempt in (
            aggregator.result,
            aggregator.close,
            lambda: aggregator.finish_frame(0, b""),
            lambda: aggregator.request("ann"),
            lambda: aggregator.accept("cid", listed["cid"]),
        ):
            with pytest.raises(Refused):
                attempt()

        full = setting.scheme.aggregator(setting.terms)
        for member in UPLOADING:
            full.accept(member, listed[member])
        with pytest.raises(Refused) as caught:
            full.accept("eve", self.reply_of(setting, "eve"))
        assert caught.value.reason is RefusalReason.LIMIT

    def reply_of(self, setting, member) -> bytes:
        signature = setting.identities[member].sign("he upload", setting.h1, member.encode(), bytes(32))
        return encode_message(SignedUpload(member, setting.h1, bytes(32), signature))

    def test_a_replay_of_its_replies_restores_it(self, setting, done):
        again = setting.scheme.aggregator(setting.terms)
        for upload in reversed(decode_message(done[0].result(), UploadList, "list").uploads):
            again.accept(upload.member, encode_message(upload))
        again.close()
        assert again.result() == done[0].result()
        assert again.participants == ()
        assert again.named == {}

    def test_frames_that_do_not_fit(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms)
        arithmetic = aggregator.arithmetic()
        frames, _ = setting.upload(setting.member("ann"), "ann", aggregator)
        total = arithmetic.add(0, None, frames[0])
        before = bytes(total)
        for index, frame in (
            (0, frames[0][:-1]),
            (0, frames[0] + b"\0"),
            (0, b""),
            (len(frames), frames[0]),
            (-1, frames[0]),
            (0, bytes(len(frames[0]))),
        ):
            with pytest.raises(Refused):
                arithmetic.check(index, frame)
            with pytest.raises(Refused):
                arithmetic.add(index, total, frame)
        assert bytes(total) == before

    def test_seeds_name_every_upload(self, setting):
        aggregator = setting.scheme.aggregator(setting.terms)
        arithmetic = aggregator.arithmetic()
        frames, _ = setting.upload(setting.member("ann"), "ann", aggregator)
        seen = [seed for index, frame in enumerate(frames) for seed in arithmetic.seeds(index, frame)]
        assert len(set(seen)) == len(seen)


class TestTerms:
    def test_the_trust_line_says_who_opens_everything(self, setting):
        line = setting.scheme.trust_line(setting.terms)
        assert setting.name in line
        assert "any one holder of the key" in line

    def test_what_the_key_was_not_made_for(self, setting):
        terms = setting.terms
        header = terms.bound.header
        for wrong in (
            replace(terms, he_public=terms.he_public + b"\0"),
            replace(terms, he_parameters="other"),
            replace(terms, roster=replaced(terms.roster, he_keys=())),
            replace(terms, bound=BoundHeader.of(replaced(header, bits=17))),
            replace(terms, bound=BoundHeader.of(replaced(header, n_max=7))),
            replace(terms, bound=BoundHeader.of(replaced(header, he_key=bytes(32)))),
            replace(terms, bound=BoundHeader.of(replaced(header, scheme="masking"))),
        ):
            for attempt in (setting.scheme.check_terms, setting.scheme.aggregator):
                with pytest.raises(ParameterRefused):
                    attempt(wrong)

    def test_a_member_without_the_secret_key_or_with_another_identity(self, setting):
        keys = setting.keys("ann")
        for wrong in (replace(keys, he_secret=b""), replace(keys, identity=SigningKey.generate())):
            with pytest.raises(ParameterRefused):
                setting.scheme.member(setting.terms, wrong, lambda size: bytes(size))

    def test_a_secret_that_does_not_belong_to_the_public_key(self, setting):
        keys = replace(setting.keys("ann"), he_secret=bytes(len(setting.he_keys.secret)))
        machine = setting.scheme.member(setting.terms, keys, lambda size: bytes(size))
        with pytest.raises(BlindsumError):
            machine.begin_upload(setting.scheme.aggregator(setting.terms).request("ann"))


def test_other_names_are_no_schemes():
    for name in ("plain", "masking", "BFV", ""):
        with pytest.raises(ParameterRefused):
            scheme(name)


def replaced(value, **changes):
    return msgspec.structs.replace(value, **changes)
