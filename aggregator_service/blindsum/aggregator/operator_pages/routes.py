"""The pages' routes: a login, an overview, a page a federation, and its live parts as server-sent events.

Pages only read. They come with a policy that lets the browser load nothing from elsewhere and run no script
but the two files of htmx that are served here.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

from blindsum.aggregator.admin_server import SESSION_COOKIE, SESSION_SECONDS, AdminCredentials
from blindsum.aggregator.clock import Clock
from blindsum.aggregator.engine import FederationEngine
from blindsum.aggregator.observed_state import ObservedState
from blindsum.aggregator.operator_pages import federation_view as views
from blindsum.aggregator.operator_pages.recent_refusals import RecentRefusals
from blindsum.aggregator.store.state import Change
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

STATIC: Final = Path(__file__).parent / "static"
OPEN_PATHS: Final = ("/login", *(f"/static/{file.name}" for file in sorted(STATIC.iterdir())))
"""What a browser gets without the token: the login page, and what it is drawn with."""

LIVE_PARTS: Final = ("running", "members", "history", "refusals", "events")
_MAX_LIVE: Final = 16
_MAX_FORM: Final = 4096
_TICK_SECONDS: Final = 1.0
"""The page counts down to the deadline, so it is drawn at least this often while a round runs."""
_PAUSE_SECONDS: Final = 0.2
"""A hundred commits in a burst are one redraw."""
_QUIET_SECONDS: Final = 15.0
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class OperatorPages:
    """Everything that the pages read. `routes` go to the admin port's application."""

    def __init__(
        self,
        credentials: AdminCredentials,
        engines: Mapping[bytes, FederationEngine],
        store: ObservedState,
        refusals: RecentRefusals,
        readiness: Callable[[], tuple[bool, dict[str, str]]],
        clock: Clock,
    ) -> None:
        self._credentials = credentials
        self._engines = engines
        self._store = store
        self._refusals = refusals
        self._readiness = readiness
        self._clock = clock
        self._live: set[asyncio.Event] = set()
        self._templates = Environment(
            loader=PackageLoader("blindsum.aggregator.operator_pages"),
            autoescape=select_autoescape(["jinja"], default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["bytes"] = _bytes_text
        store.observe(self._committed)

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """The pages."""
        pages: tuple[tuple[str, Callable[[Request], Awaitable[Response]]], ...] = (
            ("/", self._overview),
            ("/overview/live", self._overview_live),
            ("/federations/{ident}", self._federation),
            ("/federations/{ident}/live", self._federation_live),
        )
        return [
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/logout", self._logout, methods=["POST"]),
            Route("/static/{name}", self._static),
            *(Route(path, page) for path, page in pages),
        ]

    # Signing in

    async def _login(self, request: Request) -> Response:
        if request.method == "GET":
            return self._page("login.html.jinja", {"wrong": False})
        form = bytearray()
        async for piece in request.stream():
            form += piece
            if len(form) > _MAX_FORM:
                raise HTTPException(413, "the form is too large")
        token = parse_qs(form.decode("utf-8", "replace")).get("token", [""])[0]
        if not self._credentials.is_token(token.strip()):
            return self._page("login.html.jinja", {"wrong": True}, status=403)
        answer = RedirectResponse("/", 303, _HEADERS)
        answer.set_cookie(
            SESSION_COOKIE,
            self._credentials.new_session(),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    async def _logout(self, _request: Request) -> Response:
        answer = RedirectResponse("/login", 303, _HEADERS)
        answer.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
        return answer

    async def _static(self, request: Request) -> Response:
        path = f"/static/{request.path_params['name']}"
        if path not in OPEN_PATHS:
            raise HTTPException(404)
        return FileResponse(STATIC / request.path_params["name"], headers={"Cache-Control": "max-age=3600"})

    # Pages

    async def _overview(self, _request: Request) -> Response:
        return self._page("overview.html.jinja", self._overview_values())

    async def _federation(self, request: Request) -> Response:
        engine = self._engine(request)
        return self._page("federation.html.jinja", self._federation_values(engine))

    async def _overview_live(self, _request: Request) -> Response:
        return self._stream(lambda: {"overview": self._part("overview", self._overview_values())})

    async def _federation_live(self, request: Request) -> Response:
        engine = self._engine(request)

        def parts() -> dict[str, str]:
            values = self._federation_values(engine)
            return {name: self._part(name, values) for name in LIVE_PARTS}

        return self._stream(parts)

    def _overview_values(self) -> dict[str, object]:
        now = self._clock.now_ms()
        ready, checks = self._readiness()
        found = [views.federation_view(engine, self._store, now) for engine in self._engines.values()]
        return {"ready": ready, "checks": checks, "federations": sorted(found, key=lambda one: one.ident)}

    def _federation_values(self, engine: FederationEngine) -> dict[str, object]:
        now = self._clock.now_ms()
        return {
            "federation": views.federation_view(engine, self._store, now),
            "members": views.member_rows(engine, self._store, now),
            "history": views.round_rows(engine, self._store),
            "refusals": views.refusals_of(self._refusals.newest, engine.federation),
            "events": views.event_rows(self._store, engine.federation),
        }

    def _engine(self, request: Request) -> FederationEngine:
        try:
            return self._engines[bytes.fromhex(request.path_params["ident"])]
        except (ValueError, KeyError):
            raise HTTPException(404, "this server has no such federation") from None

    def _page(self, template: str, values: Mapping[str, object], status: int = 200) -> Response:
        return HTMLResponse(self._templates.get_template(template).render(values), status, _HEADERS)

    def _part(self, name: str, values: Mapping[str, object]) -> str:
        return self._templates.get_template(f"parts/{name}.html.jinja").render(values)

    # Live parts

    def _committed(self, _changes: tuple[Change, ...]) -> None:
        for event in self._live:
            event.set()

    def _stream(self, parts: Callable[[], dict[str, str]]) -> Response:
        if len(self._live) >= _MAX_LIVE:
            raise HTTPException(503, "too many pages are open; close some and load this one again")
        return StreamingResponse(
            self._news(parts), media_type="text/event-stream", headers={**_HEADERS, "X-Accel-Buffering": "no"}
        )

    async def _news(self, parts: Callable[[], dict[str, str]]) -> AsyncIterator[str]:
        changed = asyncio.Event()
        self._live.add(changed)
        sent: dict[str, str] = {}
        silent = 0.0
        try:
            while True:
                changed.clear()
                now = parts()
                news = {name: html for name, html in now.items() if sent.get(name) != html}
                sent = now
                for name, html in news.items():
                    yield _event(name, html)
                silent = 0.0 if news else silent + _TICK_SECONDS
                if silent >= _QUIET_SECONDS:
                    yield ": still here\n\n"
                    silent = 0.0
                await _first(changed, _TICK_SECONDS)
                await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            self._live.discard(changed)


async def _first(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, at most so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _event(name: str, html: str) -> str:
    lines = "".join(f"data: {line}\n" for line in html.splitlines())
    return f"event: {name}\n{lines}\n"


def _bytes_text(size: int) -> str:
    amount = float(size)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
