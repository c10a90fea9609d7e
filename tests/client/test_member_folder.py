import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from blindsum.client.member_folder import (
    MemberFolder,
    Pin,
    StateMark,
    StoredRound,
    certificate_request,
    transport_key,
)
from blindsum.client.private_files import FolderError, FolderInUse, write_private
from blindsum.crypto.primitives.sealing import HpkeKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.group_key import GroupKey


def make(path: Path) -> MemberFolder:
    transport = transport_key()
    pin = Pin(
        federation=bytes(32),
        name="clinics",
        owner=bytes(32),
        member="clinic-1",
        organisation="",
        enrolment_address="localhost:1",
        member_address="localhost:2",
        ca="",
        request_id=bytes(32),
    )
    request = certificate_request(transport, "clinic-1")
    return MemberFolder.create(
        path, pin, SigningKey.generate(), HpkeKey.generate(), transport, b"body", request
    )


def test_every_file_is_private(tmp_path: Path) -> None:
    with make(tmp_path / "m") as folder:
        folder.keep_group_key(GroupKey.generate(1))
        folder.keep_he_secret(bytes(32), b"secret")
        folder.keep_certificate(b"chain")
        folder.keep_local({"head": np.zeros(3)})
        folder.enter_round(StoredRound(1, b"h", b"r", b"p", b"snapshot"), bytes(32))
        write_private(folder.spool(1), b"masked")
        folder.keep_state("current", StateMark(bytes(32), 0, bytes(32), 0), [b"state"])
        files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
        assert len(files) > 10
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o700


def test_a_folder_is_open_once(tmp_path: Path) -> None:
    with make(tmp_path / "m"):
        with pytest.raises(FolderInUse, match="open elsewhere"):
            MemberFolder(tmp_path / "m")
        MemberFolder(tmp_path / "m", read_only=True).close()
    MemberFolder(tmp_path / "m").close()


def test_another_process_is_kept_out_too(tmp_path: Path) -> None:
    with make(tmp_path / "m"):
        child = os.fork()
        if child == 0:
            try:
                MemberFolder(tmp_path / "m")
            except FolderInUse:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "m").close()
    with pytest.raises(FolderError, match="isn't empty"):
        make(tmp_path / "m")


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "m").close()
    (tmp_path / "m" / "identity.key").chmod(0o644)
    with pytest.raises(FolderError, match="chmod 600"):
        MemberFolder(tmp_path / "m")


def test_a_missing_folder_or_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="nowhere"):
        MemberFolder(tmp_path / "nowhere")
    make(tmp_path / "m").close()
    (tmp_path / "m" / "hpke.key").unlink()
    with pytest.raises(FolderError, match=r"hpke\.key"):
        MemberFolder(tmp_path / "m")


def test_a_round_survives_a_restart_byte_for_byte(tmp_path: Path) -> None:
    with make(tmp_path / "m") as folder:
        record = StoredRound(5, b"header", b"roster", b"plan", b"snapshot")
        folder.enter_round(record, b"0" * 32)
        record.snapshot = b"later"
        folder.keep_round(record, "advertise", b"reply")
        record.upload, record.upload_digest, record.confirmed = b"sealed", b"d" * 32, True
        folder.keep_round(record, "confirm", b"signed")
    with MemberFolder(tmp_path / "m") as folder:
        assert folder.round() == record
        assert folder.reply(5, "advertise") == b"reply"
        assert folder.reply(5, "share") is None
        assert folder.number("last_round") == 5
        assert folder.fact("last_h0") == b"0" * 32


def test_a_reply_is_stored_once(tmp_path: Path) -> None:
    with make(tmp_path / "m") as folder:
        record = StoredRound(5, b"header", b"roster", b"plan", b"snapshot")
        folder.enter_round(record, bytes(32))
        folder.keep_round(record, "advertise", b"reply")
        changed = StoredRound(5, b"header", b"roster", b"plan", b"another")
        with pytest.raises(Exception, match="UNIQUE"):
            folder.keep_round(changed, "advertise", b"another reply")
        stored = folder.round()
        assert stored is not None
        assert stored.snapshot == b"snapshot"


def test_leaving_a_round_leaves_no_secret_on_disk(tmp_path: Path) -> None:
    secret = b"a mask root that must not stay!!"
    with make(tmp_path / "m") as folder:
        folder.enter_round(StoredRound(5, b"header", b"roster", b"plan", secret), bytes(32))
        assert secret in (tmp_path / "m" / "member.db").read_bytes()
        write_private(folder.spool(5), b"masked")
        folder.leave_round(5)
        for path in (tmp_path / "m").iterdir():
            assert secret not in path.read_bytes(), path
        assert not folder.spool(5).exists()
        assert folder.number("last_round") == 5


def test_states_are_adopted_or_dropped_whole(tmp_path: Path) -> None:
    with make(tmp_path / "m") as folder:
        old, new = StateMark(bytes(32), 1, b"a" * 32, 3), StateMark(bytes(32), 2, b"b" * 32, 4)
        folder.keep_state("current", old, [b"old"])
        folder.keep_state("pending", new, [b"n", b"ew"])
        assert folder.read_state(old) == b"old"
        folder.drop_pending()
        assert folder.state_mark("pending") is None
        assert not (tmp_path / "m" / new.file_name).exists()
        folder.keep_state("pending", new, [b"new"])
        folder.adopt_pending()
        assert folder.state_mark("current") == new
        assert folder.read_state(new) == b"new"
        assert not (tmp_path / "m" / old.file_name).exists()


def test_a_state_adopted_while_older_ones_are_dropped_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found by a demo: the other thread adopted the new state between the two marks that dropping looks at.
    with make(tmp_path / "m") as folder:
        old, new = StateMark(bytes(32), 1, b"a" * 32, 3), StateMark(bytes(32), 2, b"b" * 32, 4)
        folder.keep_state("current", old, [b"old"])
        adopting = threading.Thread(target=folder.adopt_pending)
        read, main = folder.state_mark, threading.get_ident()

        def state_mark(name: str) -> StateMark | None:
            found = read(name)
            if name == "current" and threading.get_ident() == main and not adopting.ident:
                adopting.start()
                adopting.join(0.5)
            return found

        monkeypatch.setattr(folder, "state_mark", state_mark)
        folder.keep_state("pending", new, [b"new"])
        adopting.join()
        assert folder.state_mark("current") == new
        assert folder.read_state(new) == b"new"


def test_local_tensors_come_back(tmp_path: Path) -> None:
    tensors = {"head/weight": np.ones((2, 2), np.float32), "file": np.array(3)}
    with make(tmp_path / "m") as folder:
        assert folder.local() == {}
        folder.keep_local(tensors)
        back = folder.local()
    assert list(back) == list(tensors)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
