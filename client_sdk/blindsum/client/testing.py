"""A whole federation in one process, for tests: real server, real TLS on loopback, real folders.

    with Federation(members=3, model=model.state_dict()) as federation:
        receipts = federation.run(lambda member: my_app(member))

The server runs in a thread of its own (`blindsum.aggregator.embedding`, needs the `server` extra), each
member's app in a thread. Everything lives in a temporary folder that `close` removes.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from blindsum.client.joining import join, poll
from blindsum.client.layout import EVERYTHING, StateDict
from blindsum.client.member import Member
from blindsum.client.owner import MetricRange, Owner
from blindsum.client.progress import OnProgress, silent
from blindsum.client.receipts import RoundReceipt
from blindsum.client.transport import Patience
from blindsum.crypto.errors import MissingExtra
from blindsum.crypto.trust.plan import Deadlines
from blindsum.crypto.trust.policy import SchemeName

T = TypeVar("T")

QUICK = Deadlines(gather=2, advertise=20, share=20, upload=60, confirm=20, reveal=20, conclude=20)


class Federation:
    """An owner, an aggregator and `members` members that were admitted, named member-1, member-2, ...

    With `model` a plan is started at once; `start` starts one later. `server_settings` are fields of the
    aggregator's settings, `make_server` makes a server from them (a test may bring one that lies);
    everything else is as in `Owner.start_plan` and `Owner.init`.
    """

    def __init__(
        self,
        members: int | Sequence[str] = 3,
        *,
        scheme: SchemeName = "masking",
        model: StateDict | None = None,
        rounds: int = 1,
        shared: Sequence[str] = EVERYTHING,
        metrics: Mapping[str, MetricRange] | None = None,
        plan: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        server_settings: Mapping[str, Any] | None = None,
        make_server: Callable[[Any], Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        try:
            from blindsum.aggregator.embedding import (  # noqa: PLC0415
                AggregatorSettings,
                configure_logs,
                serve_in_thread,
            )
        except ModuleNotFoundError:
            raise MissingExtra("server", "a federation in one process runs the real server, and it") from None
        configure_logs(dict(server_settings or {}).get("log_level", "ERROR"), json=False)
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="blindsum-")) if folder is None else folder
        self._serve = serve_in_thread
        self._make_server = make_server
        self._settings_type = AggregatorSettings
        self._server_settings = dict(server_settings or {})
        self._ports = (0, 0)
        self._opened: list[Member] = []
        names = [f"member-{i + 1}" for i in range(members)] if isinstance(members, int) else list(members)
        try:
            self.start_server()
            self.owner = Owner.init(
                self.folder / "owner",
                "test federation",
                enrolment_address=f"localhost:{self.server.enrolment_port}",
                member_address=f"localhost:{self.server.member_port}",
                ca=self.server.ca_pem.decode(),
                **{"schemes": (scheme,), **(policy or {})},
            )
            self.owner.register()
            self.names: list[str] = []
            self.admit(*names)
            if model is not None:
                self.start(
                    model, scheme=scheme, rounds=rounds, shared=shared, metrics=metrics or {}, **(plan or {})
                )
        except BaseException:
            self.close()
            raise

    # The server

    def start_server(self) -> None:
        """Start the server, on the ports it had before if any."""
        settings = self._settings_type(
            **{
                "data_dir": self.folder / "server",
                "allow_any_owner": True,
                "enrolment_port": self._ports[0],
                "member_port": self._ports[1],
                "presence_grace": 0.5,
                "retry_pause": 0.1,
                "disk_reserve": 0,
                "log_level": "ERROR",
                **self._server_settings,
            }
        )
        self.server = (
            self._serve(settings) if self._make_server is None else self._serve(settings, self._make_server)
        )
        self._ports = (self.server.enrolment_port, self.server.member_port)

    def stop_server(self) -> None:
        """Stop the server; what it stored stays."""
        self.server.stop()

    # The owner

    def admit(self, *names: str) -> None:
        """Invite, join and admit members of these names."""
        for name in names:
            invitation = self.owner.invite(name)
            join(invitation, self.path(name), organisation=name, wait=False)
        self.owner.admit(*names)
        for name in names:
            if not poll(self.path(name)):
                raise AssertionError(f"{name} was admitted, but the aggregator doesn't say so")
        self.names += names

    def start(
        self,
        model: StateDict,
        *,
        name: str = "test",
        rounds: int = 1,
        scheme: SchemeName = "masking",
        deadlines: Deadlines = QUICK,
        **plan: Any,
    ) -> None:
        """Start a training plan; see `Owner.start_plan`."""
        self.owner.start_plan(name, model, rounds=rounds, scheme=scheme, deadlines=deadlines, **plan)

    # The members

    def path(self, name: str) -> Path:
        """A member's folder."""
        return self.folder / name

    def open(self, name: str, *, on_progress: OnProgress = silent, **options: Any) -> Member:
        """A member, opened; closed with the federation."""
        member = Member.open(
            self.path(name), on_progress=on_progress, **{"patience": Patience(total=20.0), **options}
        )
        self._opened.append(member)
        return member

    def run(
        self,
        app: Callable[[Member], T],
        names: Sequence[str] | None = None,
        *,
        seconds: float = 60.0,
        **options: Any,
    ) -> dict[str, T]:
        """Run `app(member)` for each member in a thread of its own; what each returned.

        `options` go to `Member.open`.

        Raises the first error that an app raised, and `TimeoutError` after `seconds`.
        """
        results: dict[str, T] = {}
        errors: list[BaseException] = []
        members = [self.open(name, **options) for name in (self.names if names is None else names)]

        def work(member: Member) -> None:
            try:
                results[member.name] = app(member)
            except BaseException as error:
                errors.append(error)
            finally:
                member.close()

        threads = [threading.Thread(target=work, args=(member,), daemon=True) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
            if errors:
                break
        if errors:
            for member in members:
                member.close()
            raise errors[0]
        if any(thread.is_alive() for thread in threads):
            raise TimeoutError(f"the apps weren't done after {seconds} s")
        return results

    def train(
        self,
        update: Callable[[str, int], StateDict],
        *,
        examples: int = 1,
        metrics: Mapping[str, float] | None = None,
    ) -> dict[str, list[RoundReceipt]]:
        """All rounds of the plan, where `update(member, index)` gives what is added to the weights."""

        def app(member: Member) -> list[RoundReceipt]:
            receipts = []
            for rnd in member.rounds():
                weights = rnd.weights()
                added = update(member.name, rnd.index)
                after = {name: value + added[name] for name, value in weights.items()}
                receipts.append(rnd.submit(after, examples=examples, metrics=metrics))
            return receipts

        return self.run(app)

    # Life

    def close(self) -> None:
        """Stop everything and remove the folder if it is temporary."""
        for member in self._opened:
            member.close()
        if hasattr(self, "owner"):
            self.owner.close()
        if hasattr(self, "server"):
            self.server.stop()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def small_model(kind: Literal["zeros", "ramp"] = "ramp", size: int = 100) -> dict[str, np.ndarray[Any, Any]]:
    """A tiny numpy model for tests: a matrix and a vector."""
    rows = size // 10
    values = (
        np.linspace(-1, 1, rows * 10, dtype=np.float32) if kind == "ramp" else np.zeros(rows * 10, np.float32)
    )
    return {"weight": values.reshape(rows, 10), "bias": np.zeros(10, np.float32)}
