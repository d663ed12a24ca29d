"""Each flag of config.json that says what a forward gives back, alone, through every command that runs a model.

``api/test_output_flags.py`` has all of them together and looks at the package; ``serve/test_engine.py`` asks a server.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from every_command import WORKS, words_of
from forked import FORK, Sandbox, command

pytestmark = pytest.mark.skipif(
    FORK is None, reason="the tests fork, so that torch is imported once"
)

FLAGS = {
    "output_router_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_return_dict": False,
    "use_cache": False,
    "torchscript": True,
}
OF_A_PACKAGE = ("chat", "bench", "eval", "inspect", "export")


OFTEN = ("output_router_logits", "return_dict")


@pytest.mark.parametrize(
    "flag", [one if one in OFTEN else pytest.param(one, marks=pytest.mark.slow) for one in FLAGS]
)
def test_a_flag_alone(flag: str, model: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, flag: FLAGS[flag]}))
    package = tmp_path / "package"
    sandbox = Sandbox(tmp_path / "box").made()
    places = {"model": folder, "text": text, "package": package, "new": package}
    pruned = ("--method", "conmoe")
    for name in ("plan", "fit"):
        done = command(*words_of(name, WORKS, places), *pruned, sandbox=sandbox)
        assert done.status == 0, (name, done.stderr)
    assert json.loads((package / "config.json").read_text())[flag] == FLAGS[flag]
    for name in OF_A_PACKAGE:
        places["new"] = tmp_path / name
        done = command(*words_of(name, WORKS, places), sandbox=sandbox)
        assert done.status == 0, (name, done.stderr)
        assert "Traceback" not in done.stderr
