"""The chat page and its files: what may be fetched without a key, and the routes for it. No torch.

Whatever lies in ``page/`` belongs to it, in folders too, where its kind is known here.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse

from conmoe_edge.serve.http_errors import ApiError

FOLDER = Path(__file__).parent / "page"
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = {
    path.relative_to(FOLDER).as_posix(): _KINDS[path.suffix]
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in _KINDS
}
"""Names below ``/page/``, and the media type of each. What is not here is no part of the page."""
PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES)})


def add_page(app: FastAPI) -> None:
    """Routes for the page."""

    @app.get("/")
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", media_type="text/html")

    @app.get("/page/{name:path}")
    async def page_file(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, "There is nothing at this address.")
        return FileResponse(FOLDER / name, media_type=FILES[name])
