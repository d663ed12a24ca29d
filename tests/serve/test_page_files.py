"""The files of the chat page: whole, closed, and the libraries among them as their makers published them."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import httpx

from conmoe_edge.serve.page_files import FILES, FOLDER
from tests.patience import PATIENCE
from tests.serve.conftest import KEY, Running
from tests.serve.scripted_server import STATS

VENDOR = FOLDER / "vendor"
LISTED = json.loads((VENDOR / "vendor.json").read_text(encoding="utf-8"))["files"]
OWN = [name for name in FILES if not name.startswith("vendor/")]
BORROWED = {"fast_path"}
"""Of ``/stats``, values that are longer than the page needs."""


def test_libraries_are_those_that_are_listed() -> None:
    there = sorted(path.name for path in VENDOR.glob("*.js"))
    assert there == sorted(one["file"] for one in LISTED)
    for one in LISTED:
        data = (VENDOR / one["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == one["sha256"], one["file"]
        assert f"{one['name']}-{one['version']}.tgz" in one["from"]
        for name in (one["name"], *one["contains"]):
            assert (VENDOR / "licenses" / f"{name}.txt").stat().st_size > 800, name


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.names: list[str] = []
        self.inline: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._script = tag in ("script", "style") and "src" not in given
        if self._script:
            self.inline.append(tag)
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        self.addresses += [given[name] or "" for name in ("src", "href") if name in given]
        self.names += [given["id"] or ""] if "id" in given else []


def test_everything_the_page_loads_is_served_and_nothing_else() -> None:
    page = _Page()
    page.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert page.inline == []
    assert all(address.removeprefix("page/") in FILES for address in page.addresses)
    loaded = {address.removeprefix("page/") for address in page.addresses}
    waiting = set(loaded)
    while waiting:
        text = (FOLDER / waiting.pop()).read_text(encoding="utf-8")
        found = set(re.findall(r'^import .* from "\./([\w.]+)";$', text, re.MULTILINE)) - loaded
        loaded |= found
        waiting |= found
    assert loaded == set(FILES)
    for name in OWN:
        text = (FOLDER / name).read_text(encoding="utf-8")
        text = text.replace("http://www.w3.org/2000/svg", "")
        for word in (
            "http://",
            "https://",
            "innerHTML",
            "eval(",
            "new Function",
            "url(",
            "@import",
        ):
            assert word not in text, f"{name}: {word}"
    assert len(page.names) == len(set(page.names))


def test_names_that_scripts_look_for_are_there() -> None:
    page = _Page()
    page.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    for name in OWN:
        text = (FOLDER / name).read_text(encoding="utf-8")
        for wanted in re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', text):
            assert wanted in page.names, f"{name}: {wanted}"


def test_files_of_the_page_need_no_key(strict: Running) -> None:
    for name, kind in FILES.items():
        response = httpx.get(f"{strict.url}/page/{name}", timeout=PATIENCE)
        assert response.status_code == 200, name
        assert response.headers["content-type"].startswith(kind)
        assert response.content == (FOLDER / name).read_bytes()
    for name in ("vendor/vendor.json", "index.html", "vendor/%2e%2e/index.html", "%2e%2e/app.py"):
        key = {"Authorization": f"Bearer {KEY}"}
        assert (
            httpx.get(f"{strict.url}/page/{name}", headers=key, timeout=PATIENCE).status_code == 404
        )


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: None if name in BORROWED else _shape(one) for name, one in value.items()}
    return "number" if isinstance(value, int | float) else type(value).__name__


def test_the_scripted_server_speaks_as_the_real_one(server: Running) -> None:
    assert _shape(STATS) == _shape(server.get("/stats").json())
    one = server.get("/v1/models").json()["data"][0]
    assert set(one) == {"id", "object", "created", "owned_by", "loaded"}
    summary = server.get("/stats").json()["compute"]["fast_path"]["summary"]
    assert isinstance(summary, type(STATS["compute"]["fast_path"]["summary"]))
    messages = {"messages": [{"role": "user", "content": "Name three rivers."}]}
    counted = httpx.post(f"{server.url}/tokenize", json=messages, timeout=PATIENCE).json()
    assert counted["count"] == len(counted["tokens"]) and counted["max_model_len"] == 2048
