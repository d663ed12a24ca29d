"""Packages as an attacker would write them: a clear error, or an answer of numbers; never a crash, a hang, an exception
that nobody foresaw, or an answer of nothing.

Each case changes one thing in a copy of a small real package (``package_mutations.py``), opens it in a process of its
own, and takes six tokens from it. Where the change is to something that is only there for readers, or for speed, they
are the tokens that the package gave before.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from fuzz.cases import random_of, seeds
from fuzz.package_mutations import Change, change
from hand_packages import predict

from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.errors import ConmoeError
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.generation.answer import Generation
from conmoe_edge.offload.generation.sampling_settings import GREEDY
from conmoe_edge.offload.generation.sequence import CachedTokens
from conmoe_edge.offload.kernels.cpu.bindings import operator
from conmoe_edge.report.package_summary import summarise

WRITTEN = Path(__file__).parents[1] / "data" / "packages" / "0.1.0"
TOLD = json.loads((WRITTEN / "tokens.json").read_text(encoding="utf-8"))
TOKENS = 6
SECONDS = 120
"""Until a case counts as one that hangs. They take some tenths of a second each."""
MOST_BYTES = 6 << 30
"""Of address space that a case may take beyond what the process has."""


@dataclass(frozen=True, slots=True)
class Case:
    """A package that was changed, and how it is opened."""

    folder: Path
    name: str
    change: Change
    share: float | None  # of the prototypes that are resident; none for what a budget gives


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind``: refused, same, other; else what must not be: crashed, hung, raised, nothing, not numbers."""

    kind: str
    text: str


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, each with a predictor as well."""
    folder = tmp_path_factory.mktemp("packages")
    for name in TOLD:
        shutil.copytree(WRITTEN / name, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        predict(folder / name, 2, 0.5, config["hidden_size"])
    operator()
    for (
        name
    ) in TOLD:  # what is imported, compiled and kept once for all is not done by every case anew
        assert opened(Case(folder / name, name, Change("nothing"), 0.5)).kind == "same"
    return folder


def made(packages: Path, folder: Path, random: Random) -> Case:
    name = random.choice(sorted(TOLD))
    folder.mkdir()
    for path in sorted((packages / name).iterdir()):
        os.link(path, folder / path.name)
    done = change(folder, random)
    return Case(folder, name, done, random.choice([1.0, 0.5, 0.0, None]))


def slots_for(folder: Path, share: float) -> tuple[int, ...]:
    manifest = load_manifest(folder)
    counts = Counter(entry.layout for entry in manifest.prototypes)
    return tuple(
        max(1, int(counts[i] * share)) if counts[i] else 0 for i in range(len(manifest.layouts))
    )


def opened(case: Case) -> Verdict:
    """The package opened, and six tokens of it."""
    prompt, wanted = TOLD[case.name]["prompt"], TOLD[case.name]["tokens"][:TOKENS]
    finite: list[bool] = []
    model: Any = None
    try:
        slots = None if case.share is None else slots_for(case.folder, case.share)
        model = load_package(case.folder, device="cpu", slots=slots)
        model.register_forward_hook(
            lambda _, given, out: finite.append(bool(out.logits.isfinite().all()))
        )
        cached = CachedTokens(model, max(1, min(model.conmoe.prefill_chunk, model.conmoe.context)))
        settings = replace(GREEDY, max_tokens=TOKENS)
        generation = Generation(
            model, cached, prompt, settings, context=model.conmoe.context, ends=frozenset()
        )
        while generation.finish is None:
            generation.advance()
    except ConmoeError as error:
        if not error.what or "\n" in f"{error.what}{error.why}{error.fix}":
            return Verdict("raised", f"an error of several lines: {error.what} {error.why}")
        return Verdict("refused", f"{error.what} {error.why}")
    finally:
        if model is not None:
            model.conmoe.close()
    found = generation.tokens[len(prompt) :]
    if not found or generation.finish not in ("length", "context"):
        return Verdict("nothing", f"{generation.finish}: {found}")
    if not all(finite):
        return Verdict("not numbers", str(found))
    return Verdict("same" if found == wanted[: len(found)] else "other", str(found))


def looked_at(case: Case) -> Verdict:
    """The package as ``inspect --verify`` sees it."""
    try:
        facts = summarise(case.folder, verify=True, curves=True)
    except ConmoeError as error:
        return Verdict("refused", f"{error.what} {error.why}")
    return Verdict("same", str(facts.verified))


def apart(run: Callable[[Case], Verdict], case: Case, log: Path) -> Verdict:
    """``run`` in a process of its own, which may crash, hang and take memory as it likes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(run, case, log, writer)
    os.close(writer)
    told, hung = b"", False
    end = time.monotonic() + SECONDS
    with os.fdopen(reader, "rb") as pipe:
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([pipe], [], [], left)
            piece = os.read(pipe.fileno(), 1 << 16) if ready else b""
            if ready and not piece:
                break
            told += piece
        else:
            hung = True
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if hung:
        return Verdict("hung", f"after {SECONDS} s")
    if os.WIFSIGNALED(status) or not told:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else str(status)
        return Verdict("crashed", f"{name}: {log.read_text(errors='replace')[-1500:]}")
    return Verdict(*json.loads(told))


def _child(run: Callable[[Case], Verdict], case: Case, log: Path, writer: int) -> None:
    verdict = Verdict("crashed", "")
    try:
        with log.open("w") as file:
            faulthandler.enable(file)
            os.dup2(file.fileno(), 2)
            if os.environ.get("CONMOE_OPERATOR_SANITIZE") != "1":  # its shadow is all of the space
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_BYTES,) * 2)
            torch.set_num_threads(1)
            try:
                verdict = run(case)
            except BaseException:
                verdict = Verdict("raised", traceback.format_exc()[-3000:])
            os.write(writer, json.dumps([verdict.kind, verdict.text]).encode())
    finally:
        os._exit(0)


@pytest.fixture
def case_of(packages: Path, tmp_path: Path) -> Iterator[Callable[[int], Case]]:
    folder = tmp_path / "case"
    yield lambda seed: made(packages, folder, random_of(seed))
    shutil.rmtree(folder, ignore_errors=True)


def record(seed: int, door: str, case: Case, verdict: Verdict) -> None:
    """One line in the file that ``CONMOE_FUZZ_LOG`` names."""
    path = os.environ.get("CONMOE_FUZZ_LOG")
    if path:
        line = [
            seed,
            door,
            case.name,
            case.share,
            case.change.words,
            verdict.kind,
            verdict.text[:300],
        ]
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("name", sorted(TOLD))
def test_packages_that_nobody_changed_give_their_tokens(
    name: str, packages: Path, tmp_path: Path
) -> None:
    for share in (1.0, 0.5, None):
        case = Case(packages / name, name, Change("nothing"), share)
        assert apart(opened, case, tmp_path / "log").kind == "same"
    assert apart(looked_at, case, tmp_path / "log").kind == "same"


@pytest.mark.parametrize("seed", seeds(24))
def test_a_changed_package_is_refused_or_answers(
    seed: int, case_of: Callable[[int], Case], tmp_path: Path
) -> None:
    case = case_of(seed)
    verdict = apart(opened, case, tmp_path / "log")
    record(seed, "open", case, verdict)
    allowed = ("refused", "same") if case.change.harmless else ("refused", "same", "other")
    assert verdict.kind in allowed, f"seed {seed}, {case.change.words}\n{verdict.text}"


@pytest.mark.parametrize("seed", [one for one in seeds(40) if one % 5 == 0])
def test_a_changed_package_is_refused_or_shown(
    seed: int, case_of: Callable[[int], Case], tmp_path: Path
) -> None:
    case = case_of(seed)
    verdict = apart(looked_at, case, tmp_path / "log")
    record(seed, "inspect", case, verdict)
    assert verdict.kind in ("refused", "same"), f"seed {seed}, {case.change.words}\n{verdict.text}"
