"""The server of the page: pairs and answers as JSON, the files for the browser, and who may ask for them."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from r2m.preferences.page.pairs import Pairs, Refused

FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TEXT_LIMIT = 100  # characters of a field of a request
FIELDS: dict[str, tuple[str, ...]] = {  # of a request: which values; of others any text that is not empty
    "choice": ("left", "right", "tie", "skip"),
    "left": ("first", "second"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TOKEN_FORM = """<!doctype html><html lang="en"><title>Label pairs</title>
<form><label>The token that r2m label printed: <input name="token" type="password" autofocus></label>
<button>Open</button></form></html>"""


def application(pairs: Pairs, *, token: str | None = None, host: str = LOOPBACK[0]) -> Starlette:
    """The page over `pairs`. Requests are answered one after another.

    token: what every request has to have, in a cookie, which `/?token=` sets, or as `Authorization: Bearer`. None: of a
    server that this machine alone reaches; requests have to be for one of its names, `host` or those of the loopback.
    """

    async def pair(request: Request) -> Response:
        fields = await _fields(request, "holder")
        return _json({"pair": pairs.next(fields["holder"]), "counts": pairs.counts()})

    async def answer(request: Request) -> Response:
        fields = await _fields(request, "holder", "by", "id", "choice", "left")
        pairs.answer(fields["id"], fields["choice"], left=fields["left"], by=fields["by"])
        return _json({"pair": pairs.next(fields["holder"]), "counts": pairs.counts()})

    async def undo(request: Request) -> Response:
        fields = await _fields(request, "holder", "by")
        return _json({"pair": pairs.undo(fields["holder"], by=fields["by"]), "counts": pairs.counts()})

    async def counts(request: Request) -> Response:
        return _json({"counts": pairs.counts()})

    async def file(request: Request) -> Response:
        return FileResponse(Path(__file__).parent / FILES[request.url.path])

    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = _of_another_site(request, None if token else {host, *LOOPBACK}) or _without_token(request, token)
        response = response or await call_next(request)
        response.headers.update(HEADERS)
        return response

    return Starlette(
        routes=[
            *(Route(path, file) for path in FILES),
            Route("/api/pair", pair, methods=["POST"]),
            Route("/api/answer", answer, methods=["POST"]),
            Route("/api/undo", undo, methods=["POST"]),
            Route("/api/counts", counts),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={
            HTTPException: lambda request, error: _error(error.detail, error.status_code),
            Refused: lambda request, error: _error(str(error), 409),
            ValueError: lambda request, error: _error(str(error), 500),  # a file of the run is damaged
            OSError: lambda request, error: _error(str(error), 507),  # the disk
        },
    )


async def _fields(request: Request, *names: str) -> dict[str, str]:
    """Fields of a request's JSON object. Raises HTTPException for a request of another type or with other values."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "expected application/json")
    try:
        given = json.loads(await request.body())
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise HTTPException(400, "expected a JSON object")
    for name in names:
        value, known = given.get(name), FIELDS.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= TEXT_LIMIT or (known and value not in known):
            expected = " or ".join(known) if known else f"a text of 1 to {TEXT_LIMIT} characters"
            raise HTTPException(400, f"{name} is {value!r:.80}; expected {expected}")
    return given


def _of_another_site(request: Request, names: set[str] | None) -> Response | None:
    """The refusal of a request that another site had this browser send, or that asks for a host not among `names`,
    where they are known: the name of another site may have been pointed at this machine."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if names is not None and urlsplit(f"//{host}").hostname not in names:
        return _error(f"this server is not {host}; expected {' or '.join(sorted(names))}", 403)
    fetched = request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
    if fetched and request.headers.get("sec-fetch-mode") == "navigate" and request.method == "GET":
        fetched = False  # somebody followed a link
    if fetched or (origin is not None and urlsplit(origin).netloc != host):
        return _error("requests of other sites are refused", 403)
    return None


def _without_token(request: Request, token: str | None) -> Response | None:
    """The refusal of a request without the token, or what puts the token of the address into a cookie."""
    if token is None:
        return None
    cookie = f"r2m_label_{request.scope['server'][1]}"  # ports share cookies
    given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(cookie, "")
    if request.url.path == "/" and "token" in request.query_params:
        given = request.query_params["token"]
    if not secrets.compare_digest(given.encode(), token.encode()):
        if request.url.path == "/":
            return HTMLResponse(TOKEN_FORM, 401)
        return _error("the token is missing or wrong: open the address that r2m label printed", 401)
    if "token" not in request.query_params:
        return None
    response = RedirectResponse("/", 303)  # the token does not stay in the address
    response.set_cookie(cookie, token, httponly=True, samesite="lax")
    return response


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")  # ASCII, whatever a model wrote


def _error(message: str, status: int) -> Response:
    return _json({"error": message}, status)
