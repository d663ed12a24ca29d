"""What ``fit`` of a model on the hub takes, from a hub on this machine that makes its shards from a seed.

    python -m benchmarks.fit_from_hub --shape qwen3-30b --gpu 15GB --work /data/from-hub
    python -m benchmarks.fit_from_hub --shape qwen3-30b --gpu 15GB --work /data/from-hub --kill 600

Runs ``fit`` in a process of its own with ``HF_ENDPOINT`` and a cache of its own, and prints, as JSON: bytes over the
network beside the checkpoint's, the most that the working folder and the cache held at any moment beside what the plan
says, peak memory, seconds by part. With ``--kill`` the first run is killed after so many seconds, and the same command
goes on. Words behind ``--`` go to ``fit``. The server runs in this process, which needs some 200 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.generated_checkpoint import SHAPES, repository, total_bytes
from benchmarks.hub_server import Hub, ServedFile, Serving
from benchmarks.measure import Child, run_child

_LOOK_SECONDS = 0.2


class DiskPeak(threading.Thread):
    """The most bytes on the disk that some folders held at any moment, holes not counted."""

    def __init__(self, *folders: Path) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._folders = folders
        self._done = threading.Event()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._done.wait(_LOOK_SECONDS):
            self.most = max(self.most, sum(map(_disk_bytes, self._folders)))

    def stop(self) -> int:
        """The peak."""
        self._done.set()
        self.join()
        return self.most


def _disk_bytes(folder: Path) -> int:
    total, seen = 0, set()
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                info = Path(place, name).lstat()
            except OSError:
                continue  # deleted meanwhile
            if (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                total += info.st_blocks * 512
    return total


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fit that came to its end.

    Attributes:
        report: what ``fit --json`` printed.
        fetched: bytes of weights that came from the hub.
        most_disk: most bytes that the working folder and the hub's cache held at any moment.
    """

    child: Child
    report: dict[str, Any]
    fetched: int
    most_disk: int

    def facts(self, checkpoint: int) -> dict[str, Any]:
        """As JSON; ``checkpoint``: bytes of the model's weights."""
        return {
            "checkpoint_bytes": checkpoint,
            "fetched_bytes": self.fetched,
            "most_disk_bytes": self.most_disk,
            "planned": self.report["fetching"],
            "package_bytes": self.report["bytes_written"],
            "peak_rss_bytes": self.child.peak_rss,
            "peak_anonymous_bytes": self.child.peak_anonymous,
            "cgroup_peak_bytes": self.child.cgroup_peak,
            "limit_bytes": self.child.limit,
            "seconds": self.child.seconds,
            "cpu_seconds": self.child.cpu_seconds,
            "seconds_by_part": self.report["seconds"],
            "kl": self.report["receipt"].get("kl"),
            "notes": self.report["notes"],
        }


@contextmanager
def serving(name: str, files: Mapping[str, ServedFile], work: Path) -> Iterator[Hub]:
    """A hub with one model, which children of this process use while the block runs, with a cache of their own."""
    hub = Hub({name: files})
    with Serving(hub) as server:
        os.environ |= {"HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(work / "cache")}
        os.environ |= {"CONMOE_STATE_DIR": str(work / "state"), "HF_HUB_OFFLINE": "0"}
        yield hub


def command_of(name: str, gpu: str, out: Path, words: Sequence[str]) -> list[str]:
    """The command line of a fit."""
    command = [sys.executable, "-m", "conmoe_edge", "fit", name, "--gpu", gpu]
    return [*command, "--device", "cpu", "--out", str(out), "--yes", "--json", *words]


def fit(hub: Hub, command: list[str], work: Path, out: Path, limit: int | None = None) -> Fitted:
    """Run a fit to its end, under a hard memory ``limit``; one that was stopped goes on.

    Raises:
        SystemExit: it ended otherwise.
    """
    before, disk = hub.weight_bytes(), DiskPeak(out.parent, work / "cache")
    disk.start()
    try:
        child = run_child(command, limit)
    finally:
        most = disk.stop()
    if child.returncode != 0:
        raise SystemExit(f"fit ended with {child.returncode}\n{child.stdout}")
    return Fitted(child, json.loads(child.stdout), hub.weight_bytes() - before, most)


def measure(
    shape: str, gpu: str, work: Path, kill: float | None, words: list[str]
) -> dict[str, Any]:
    """One fit, with its figures."""
    files, name = repository(SHAPES[shape]), f"generated/{shape}"
    out = work / "fit" / "out"
    shutil.rmtree(work / "fit", ignore_errors=True)
    (work / "fit").mkdir(parents=True)
    with serving(name, files, work) as hub:
        command = command_of(name, gpu, out, words)
        result: dict[str, Any] = {"shape": shape, "gpu": gpu, "words": words}
        if kill is not None:
            started = time.perf_counter()
            first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            try:
                first.wait(kill)
            except subprocess.TimeoutExpired:
                first.kill()
                first.wait()
            if first.returncode == 0:
                raise SystemExit(f"fit was done within {kill} s: kill it earlier")
            result["killed_after_seconds"] = time.perf_counter() - started
            result["fetched_until_killed"] = hub.weight_bytes()
        done = fit(hub, command, work, out)
        return result | done.facts(total_bytes(files)) | {"fetched_bytes": hub.weight_bytes()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b")
    parser.add_argument("--gpu", default="15GB")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kill", type=float, metavar="SECONDS")
    parser.add_argument("words", nargs="*", metavar="-- FLAGS OF FIT")
    given = parser.parse_args()
    found = measure(given.shape, given.gpu, given.work, given.kill, given.words)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
