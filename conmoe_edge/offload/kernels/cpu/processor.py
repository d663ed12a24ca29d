"""Which processor this is, as text: a home folder may be shared between machines."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

_LINUX = ("model name", "flags", "Features", "CPU part")


def processor() -> str:
    """Its model and instruction sets, as far as the system says them; nothing is measured."""
    if platform.system() == "Darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        said = subprocess.run(asked, capture_output=True, encoding="utf-8", check=False)
        return said.stdout.strip() or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(_LINUX)}))
