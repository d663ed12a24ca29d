"""What the arms need on disk: GGUF files, traces, packages. Made when first asked for, kept, discarded by group.

Everything lies below one folder, ``--work``. A finished file or package is reused by the next run;
each is whole or absent. The parent process only starts children here, so it stays small.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison.arms import ArmSettings, System

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION_TOKENS = 2048
_SEQUENCE = 512


class Workshop:
    """Makes and finds artefacts.

    Args:
        model: the checkpoint that all systems run.
        work: folder for big files.
        llama_python: interpreter of the environment with ``llama_cpp`` and ``gguf``.
        context: tokens that packages keep room for.
    """

    def __init__(self, model: Path, work: Path, llama_python: str, context: int) -> None:
        self.model = model
        self.work = work
        self._llama_python = llama_python
        self._context = context
        for name in ("gguf", "packages", "traces", "jobs"):
            (work / name).mkdir(parents=True, exist_ok=True)

    def python_of(self, system: System) -> str:
        """The interpreter that runs this system."""
        return self._llama_python if system.engine == "llama" else sys.executable

    def job(self, system: System, settings: ArmSettings, prompt: Sequence[int]) -> dict[str, Any]:
        """What the system's arm is told on any device, under any cap; ``prompt``: as ``prompt`` gives it."""
        job: dict[str, Any] = {
            "path": str(self.path_of(system)),
            "threads": settings.threads,
            "context": settings.context,
            "prompt": list(prompt[: settings.prompt_tokens]),
            "text": list(prompt[settings.prompt_tokens :]),
            "steps": settings.steps,
            "seconds": settings.seconds,
        }
        if system.engine == "ours":
            job["trace"] = str(self.trace("heldout"))
        return job

    def path_of(self, system: System) -> Path:
        """Where the system's weights are, made if need be."""
        if system.engine == "ours":
            return self.package(system)
        return self.gguf(system.form) if system.engine == "llama" else self.model

    def trace(self, text: str) -> Path:
        """Routes over ``calibration`` or ``heldout`` text: two sequences of 512 are enough to measure on."""
        out = self.work / "traces" / f"{text}.pt"
        if not out.exists():
            count = CALIBRATION_TOKENS // _SEQUENCE * 5 // 4 if text == "calibration" else 2
            words = ["--model", str(self.model), "--text", text, "--sequences", str(count)]
            self._python("benchmarks.comparison.traces", *words, "--out", str(out))
        return out

    def prompt(self, count: int) -> list[int]:
        """The first ``count`` tokens of the held-out trace; the same for every system."""
        code = (
            "import json, sys, torch; "
            "print(json.dumps(torch.load(sys.argv[1], weights_only=True)['tokens'].flatten()"
            "[:int(sys.argv[2])].tolist()))"
        )
        command = [sys.executable, "-c", code, str(self.trace("heldout")), str(count)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(found.stdout)

    def gguf(self, form: str) -> Path:
        """The model as GGUF."""
        out = self.work / "gguf" / f"{form.lower()}.gguf"
        if out.exists():
            return out
        module = "benchmarks.comparison.gguf_writer"
        words = ["--model", str(self.model)]
        if form != "bf16":
            words = ["--model", str(self.gguf("bf16")), "--quantise", form]
        self._python(module, *words, "--out", str(out), python=self._llama_python)
        return out

    def package(self, system: System) -> Path:
        """A package of ours."""
        out = self.work / "packages" / system.key
        if (out / "conmoe.json").exists():
            return out
        self._python(
            "benchmarks.comparison.packages",
            *("--model", str(self.model), "--out", str(out)),
            *("--trace", str(self.trace("calibration")), "--rate", str(system.rate)),
            *("--precision", system.form, "--dense-precision", system.dense),
            *("--budget", "24GiB", "--context", str(self._context)),
            *("--calibration-tokens", str(CALIBRATION_TOKENS)),
        )
        return out

    def weights(self, system: System) -> list[Path]:
        """The files whose pages must not be in the cache when an arm starts."""
        path = self.path_of(system)
        return [path] if path.is_file() else sorted(path.glob("*.safetensors"))

    def offload_folder(self) -> Path:
        """An empty folder for what transformers moves to the disk."""
        folder = self.work / "offload"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def clear_offload(self) -> None:
        """Give its room back."""
        shutil.rmtree(self.work / "offload", ignore_errors=True)

    def discard(self, systems: Iterable[System]) -> None:
        """Delete the packages and GGUF files of these systems."""
        for system in systems:
            if system.engine == "ours":
                shutil.rmtree(self.work / "packages" / system.key, ignore_errors=True)
            elif system.engine == "llama":
                (self.work / "gguf" / f"{system.form.lower()}.gguf").unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """For children: this repository first, and no network for transformers."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def _python(self, module: str, *words: str, python: str = sys.executable) -> None:
        command: Sequence[str] = [python, "-m", module, *words]
        subprocess.run(command, check=True, env=self.environment(), stdout=sys.stderr)
