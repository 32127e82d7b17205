"""The page as a Starlette app: what runs, what ran, comparisons, reports, and Prometheus' view of it."""

import hmac
import threading
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.datastructures import URL
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedtalora_flwr.report.comparison import compare as compare_runs
from fedtalora_flwr.report.comparison import comparison_page
from fedtalora_flwr.report.html import render, template_text
from fedtalora_flwr.report.live.prometheus import prometheus
from fedtalora_flwr.report.live.runs import Board
from fedtalora_flwr.report.page import report_page
from fedtalora_flwr.run_folder.reader import read_run

_COOKIE = "fedtalora-token"
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def live_app(root: Path, *, token: str = "") -> Starlette:
    """Build the app; it answers GET alone, and writes nothing.

    Parameters
    ----------
    root
        The folder with the runs.
    token
        What whoever asks must know, as ``?token=`` once in a browser, or as a bearer's. Empty: whoever reaches it may
        read it, which is for loopback alone, and so it answers to the names of this machine only: a page of
        somebody else's in the same browser cannot give it a name of its own.
    """
    pages = _Pages(Board(root))
    routes = {
        "/": pages.index,
        "/live.js": pages.script,
        "/api/runs": pages.runs,
        "/report": pages.report,
        "/compare": pages.compare,
        "/metrics": pages.metrics,
    }
    guard = (
        Middleware(_Token, token=token)
        if token
        else Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"], www_redirect=False)
    )
    return Starlette(
        routes=[Route(path, page, methods=["GET"]) for path, page in routes.items()],
        middleware=[Middleware(_Headers), guard],
    )


class _Pages:
    """What the app answers; Starlette calls each in a thread of its own."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._looks = threading.Lock()  # at the board, one at a time
        self._draws = threading.Lock()  # likewise: matplotlib's style is the process's

    def index(self, request: Request) -> Response:
        return HTMLResponse(render("live.html.j2", title="fedtalora", root=str(self._board.root)))

    def script(self, request: Request) -> Response:
        return Response(template_text("live.js"), media_type="text/javascript")

    def runs(self, request: Request) -> Response:
        with self._looks:
            return JSONResponse({"root": str(self._board.root), "runs": self._board.summaries()})

    def metrics(self, request: Request) -> Response:
        with self._looks:
            return PlainTextResponse(prometheus(self._board.summaries()), media_type="text/plain; version=0.0.4")

    def report(self, request: Request) -> Response:
        """Show a run's report as it is now."""
        found = self._chosen(request)
        if len(found) != 1:
            return _missing("report?run=NAME takes the name of one run")
        try:
            with self._draws:
                return HTMLResponse(report_page(read_run(found[0])))
        except (OSError, ValueError) as error:
            return PlainTextResponse(f"{error}\n", 500)

    def compare(self, request: Request) -> Response:
        """Show runs side by side, with a word on it where their clients held different data."""
        found = self._chosen(request)
        if len(found) < 2:
            return _missing("compare?run=NAME&run=NAME takes the names of two runs or more")
        try:
            with self._draws:
                return HTMLResponse(comparison_page(compare_runs(found, allow_different_partitions=True)))
        except (OSError, ValueError) as error:
            return PlainTextResponse(f"{error}\n", 500)

    def _chosen(self, request: Request) -> list[Path]:
        """Give the folders of the runs that are asked for: names of the list, and no path of the asker's."""
        paths = self._board.paths()
        return [paths[name] for name in dict.fromkeys(request.query_params.getlist("run")) if name in paths]


def _missing(what: str) -> Response:
    return PlainTextResponse(f"no such run; {what}, as /api/runs lists them\n", 404)


class _Headers:
    """Adds what a browser is to be told with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *told]
            await send(message)

        await self._app(scope, receive, with_headers)


class _Token:
    """Lets in who knows the token: a browser shows it once in the address, and has it as a cookie from then on."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        shown = request.query_params.get("token", "")
        if self._is_right(shown):
            response: Response = RedirectResponse(_without_token(request.url), 303)
            response.set_cookie(_COOKIE, shown, httponly=True, samesite="strict")
            await response(scope, receive, send)
            return
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_right(bearer) or self._is_right(request.cookies.get(_COOKIE, "")):
            await self._app(scope, receive, send)
            return
        response = PlainTextResponse("this page wants its token: add ?token=... as `fedtalora serve` printed it\n", 401)
        await response(scope, receive, send)

    def _is_right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token)


def _without_token(url: URL) -> str:
    """Give the path and query of an address without its token."""
    kept = [(key, value) for key, value in parse_qsl(url.query) if key != "token"]
    return f"{url.path}?{urlencode(kept)}" if kept else url.path
