"""The files of the chat page: what is served without a key, and as what."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "page"
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

FILES = {
    path.relative_to(FOLDER).as_posix(): _KINDS[path.suffix]
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in _KINDS
}
"""Names below ``/page/``, and the media type of each. What is not here is no part of the page."""
