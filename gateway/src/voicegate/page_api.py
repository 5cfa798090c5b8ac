"""The built-in page at / and the reference at /docs: files of this package, nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

FILES = {
    "/": ("index.html", "text/html"),
    "/docs": ("docs.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/docs.js": ("docs.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Anybody may load them: they hold nothing of the server, and the page asks for the key itself.
PATHS = frozenset(FILES)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Permissions-Policy": "microphone=(self)",
}


def add_routes(app: FastAPI) -> None:
    folder = resources.files("voicegate") / "page"
    for path, (name, kind) in FILES.items():
        _add(app, path, (folder / name).read_bytes(), kind)


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    async def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    app.add_api_route(path, file, methods=["GET"], include_in_schema=False)
