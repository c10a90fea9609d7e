"""A folder belongs to one process at a time: a second server, or a second member, is refused."""

from pathlib import Path

from process_federation import PATIENCE, ProcessFederation


def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with ProcessFederation(tmp_path, scheme="masking", size=101, rounds=1) as federation:
        second = federation.serve((0, 0), "second.log")
        second.process.join(PATIENCE)
        assert second.process.exitcode == 1
        log = (tmp_path / "second.log").read_text(encoding="utf-8")
        assert f"{tmp_path / 'server'} is in use by another server" in log
        assert "Traceback" not in log
        # The first one goes on, and a third may follow it.
        federation.kill_server()
        federation.start_server()
        federation.start()
        federation.finish()
        federation.check_sum(1)


def test_a_second_member_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with ProcessFederation(tmp_path, scheme="masking", size=101, rounds=1) as federation:
        federation.start("member-1")
        first = federation.members["member-1"]
        first.until("open")
        federation.start("member-1")
        kind, name, text = federation.members["member-1"].until("failed")
        assert (kind, name) == ("failed", "FolderInUse")
        assert str(federation.path("member-1")) in text
        assert "one process at a time" in text
        federation.members["member-1"] = first
        federation.start("member-2", "member-3")
        federation.finish()
        federation.check_sum(1)
