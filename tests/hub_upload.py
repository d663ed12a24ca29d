"""The hub's protocol for writing, as ``huggingface_hub`` speaks it: repositories, branches, preupload, the LFS batch
and its PUT, commits as lines of JSON. On top of the reading side in ``benchmarks/hub_server.py``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from local_hub import Hub, bytes_file

_REPOSITORY = r"([^/]+/[^/]+?)"
_BRANCH = re.compile(rf"/api/models/{_REPOSITORY}/branch/(.+)")
_PREUPLOAD = re.compile(rf"/api/models/{_REPOSITORY}/preupload/(.+)")
_COMMIT = re.compile(rf"/api/models/{_REPOSITORY}/commit/(.+)")
_BATCH = re.compile(rf"/{_REPOSITORY}\.git/info/lfs/objects/batch")
_PUT = re.compile(r"/upload/([0-9a-f]{64})")


@dataclass
class WritableHub(Hub):
    """A hub that takes commits; a file is what its checksum says, or it is refused.

    Attributes:
        endpoint: set once it serves; large files are PUT there.
        objects: large files by their SHA-256, committed or not.
        commits: (repository, revision, message) in their order.
        branches: that were made, as (repository, branch).
        no_put: how many PUTs are refused from now on.
    """

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    branches: list[tuple[str, str]] = field(default_factory=list)
    no_put: int = 0

    def write(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if method == "PUT":
            return self._put(path, body)
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            return (200, {}) if content.startswith("---\n") else (400, {"errors": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if (found := _BRANCH.fullmatch(path)) is not None:
            self.branches.append((found[1], found[2]))
            return 201, {}
        if (found := _PREUPLOAD.fullmatch(path)) is not None:
            files = [self._mode(one["path"]) for one in json.loads(body)["files"]]
            return 200, {"files": files}
        if _BATCH.fullmatch(path) is not None:
            return 200, {"objects": [self._action(one) for one in json.loads(body)["objects"]]}
        if (found := _COMMIT.fullmatch(path)) is not None and found[1] in self.repositories:
            return self._commit(found[1], found[2], body)
        return 404, {"error": f"no such path: {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "it is there"}
        self.repositories[name] = {".gitattributes": bytes_file(b"*.safetensors filter=lfs\n")}
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        return 200, {"url": f"{self.endpoint}/{name}"}

    @staticmethod
    def _mode(path: str) -> dict[str, Any]:
        mode = "lfs" if fnmatchcase(path, "*.safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        value = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.objects:
            value["actions"] = {"upload": {"href": f"{self.endpoint}/upload/{asked['oid']}"}}
        return value

    def _put(self, path: str, body: bytes) -> tuple[int, Any]:
        found = _PUT.fullmatch(path)
        if self.no_put > 0:
            self.no_put -= 1
            return 403, {"error": "not now"}
        if found is None or hashlib.sha256(body).hexdigest() != found[1]:
            return 400, {"error": "not what its name says"}
        self.objects[found[1]] = body
        return 200, {}

    def _commit(self, name: str, revision: str, body: bytes) -> tuple[int, Any]:
        files = dict(self.repositories[name])
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = bytes_file(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return 400, {"error": "that was not uploaded"}
                files[value["path"]] = bytes_file(self.objects[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repositories[name] = files
        self.commits.append((name, revision, lines[0]["value"]["summary"]))
        self.commit = hashlib.sha1(body + self.commit.encode()).hexdigest()
        url = f"{self.endpoint}/{name}/commit/{self.commit}"
        return 200, {"commitUrl": url, "commitOid": self.commit}
