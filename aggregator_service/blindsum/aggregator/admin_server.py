"""The operator's port: health, metrics, and the pages that are mounted on it. HTTP, on loopback by default.

`/livez` and `/readyz` answer anyone, with a word: a supervisor has no token. Everything else asks for the
admin token, which lies in a file that only the service's user may read: as `Authorization: Bearer <token>`
(Prometheus: `authorization: {credentials_file: ...}`), or as the session cookie that a page got for it.
Members' certificates and owners' keys open nothing here, and the admin token opens nothing there.
"""

import asyncio
import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import uvicorn
from blindsum.aggregator.metrics import CONTENT_TYPE
from blindsum.aggregator.structured_logs import logger
from blindsum.crypto.errors import BlindsumError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

SESSION_COOKIE = "blindsum_admin"
SESSION_SECONDS = 12 * 3600
_TOKEN_BYTES = 32
_OPEN_PATHS = ("/livez", "/readyz")


class AdminCredentials:
    """The admin token, and the sessions that were opened with it."""

    def __init__(self, token: str, clock: Callable[[], float] = time.time) -> None:
        self._token = token.encode()
        self._clock = clock

    @classmethod
    def from_file(cls, path: Path) -> "AdminCredentials":
        """Read the token, or make one (mode 0600). Raises `BlindsumError` if others may read the file."""
        try:
            if not path.exists():
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    file.write(secrets.token_hex(_TOKEN_BYTES) + "\n")
            if path.stat().st_mode & 0o077:
                raise BlindsumError(f"others may read the admin token in {path}; run chmod 600 on it")
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BlindsumError(f"the admin token in {path} can't be read or made: {error}") from None
        if len(token) < _TOKEN_BYTES:
            raise BlindsumError(
                f"the admin token in {path} is shorter than {_TOKEN_BYTES} characters; delete the file, and "
                "the server makes a new one"
            )
        return cls(token)

    def is_token(self, token: str) -> bool:
        """Whether this is the admin token."""
        return hmac.compare_digest(token.encode(), self._token)

    def new_session(self) -> str:
        """The value of a session cookie that is good for `SESSION_SECONDS`."""
        until = str(int(self._clock()) + SESSION_SECONDS)
        return f"{until}.{self._seal(until)}"

    def is_session(self, cookie: str) -> bool:
        """Whether this cookie was made by `new_session` under the same token, and hasn't expired."""
        until, _, seal = cookie.partition(".")
        if not hmac.compare_digest(seal.encode(), self._seal(until).encode()):
            return False
        return self._clock() < int(until)

    def _seal(self, until: str) -> str:
        return hmac.new(self._token, b"blindsum admin session " + until.encode(), hashlib.sha256).hexdigest()

    def admits(self, connection: HTTPConnection) -> bool:
        """Whether a request carries the token or a session."""
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.is_token(token.strip())
        return self.is_session(connection.cookies.get(SESSION_COOKIE, ""))


class _RequireCredentials:
    """Lets only health checks, and paths that say so, through without the token."""

    def __init__(self, app: ASGIApp, credentials: AdminCredentials, open_paths: frozenset[str]) -> None:
        self._app = app
        self._credentials = credentials
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            connection = HTTPConnection(scope)
            # The path that is routed by; `url` may have been made from what the caller says its host is.
            path = scope["path"]
            if path not in self._open_paths and not self._credentials.admits(connection):
                if "text/html" in connection.headers.get("accept", "") and scope["method"] == "GET":
                    await RedirectResponse("/login", 303)(scope, receive, send)
                    return
                refusal: Response = PlainTextResponse(
                    "the admin token is needed: see the file admin.token in the server's data directory\n",
                    401,
                    {"WWW-Authenticate": 'Bearer realm="blindsum admin"'},
                )
                await refusal(scope, receive, send)
                return
        elif scope["type"] != "lifespan":
            return
        await self._app(scope, receive, send)


def admin_app(
    credentials: AdminCredentials,
    readiness: Callable[[], tuple[bool, dict[str, str]]],
    metrics: Callable[[], Awaitable[bytes]],
    routes: Sequence[BaseRoute] = (),
    open_paths: Iterable[str] = (),
) -> Starlette:
    """The admin port's application.

    `readiness` says whether the server can do its work, and each check's result. `routes` are further
    pages; they are behind the token, except for exact paths in `open_paths` (a login page, style sheets).
    """

    async def livez(_request: Request) -> Response:
        return PlainTextResponse("live\n")

    async def readyz(_request: Request) -> Response:
        ready, checks = readiness()
        return JSONResponse({"ready": ready, "checks": checks}, 200 if ready else 503)

    async def exposition(_request: Request) -> Response:
        return Response(await metrics(), media_type=None, headers={"Content-Type": CONTENT_TYPE})

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", exposition),
            *routes,
        ],
        middleware=[
            Middleware(
                _RequireCredentials,
                credentials=credentials,
                open_paths=frozenset((*_OPEN_PATHS, *open_paths)),
            )
        ],
    )


class _Quiet(uvicorn.Server):
    """Signals belong to whoever runs the aggregator."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class AdminServer:
    """The admin port on the running event loop. `start` binds, `stop` closes."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        self._app = app
        self._host = host
        self._port = port
        self.port = 0
        """The port that was bound."""
        self._log = logger(part="admin")

    async def start(self) -> None:
        """Bind and serve. Raises `BlindsumError` if the port is taken."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
        except OSError as error:
            listener.close()
            raise BlindsumError(
                f"admin port {self._port} on {self._host} can't be bound: {error.strerror}; "
                "is another server running there?"
            ) from None
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=30,
            limit_concurrency=64,
            ws="none",
        )
        self._server = _Quiet(config)
        self._listener = listener
        self._task = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0)
        self._log.info("admin port", host=self._host, port=self.port)

    async def stop(self) -> None:
        """Close every connection and the port."""
        self._server.should_exit = True
        await self._task
        self._listener.close()
