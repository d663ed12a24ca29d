"""The chat page and its files: what may be fetched without a key, and the routes for it. No torch.

Whatever lies in ``page/`` belongs to it, in folders too, where its kind is known here.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse

from conmoe_edge.serve.http_errors import ApiError

_FOLDER = Path(__file__).parent / "page"
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_FILES = {
    path.relative_to(_FOLDER).as_posix(): _KINDS[path.suffix]
    for path in sorted(_FOLDER.rglob("*"))
    if path.suffix in _KINDS
}
PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in _FILES)})


def add_page(app: FastAPI) -> None:
    """Routes for the page."""

    @app.get("/")
    async def page() -> Response:
        return FileResponse(_FOLDER / "index.html", media_type="text/html")

    @app.get("/page/{name:path}")
    async def page_file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, "There is nothing at this address.")
        return FileResponse(_FOLDER / name, media_type=_FILES[name])
