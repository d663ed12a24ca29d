"""``chat --json-schema``: an answer of a schema, from a model that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from conmoe_edge.cli.main import main
from tests.families import tiny_model
from tests.hand_packages import identity, write_package

DEMO = Path(__file__).parents[3] / "conmoe_edge" / "data" / "demo"
SCHEMA = {
    "type": "object",
    "properties": {"river": {"enum": ["Rhine", "Aare"]}, "long": {"type": "boolean"}},
    "required": ["river", "long"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model(
        "olmoe", 0, torch.bfloat16, vocab_size=4096, max_position_embeddings=512, eos_token_id=5
    )
    folder = write_package(plain, tmp_path_factory.mktemp("chat") / "out", identity(plain))
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def ask(package: Path, schema: Path) -> tuple[int, str, str]:
    words = [
        "--prompt",
        "x",
        "--max-tokens",
        "80",
        "--temperature",
        "0",
        "--device",
        "cpu",
        "--json",
    ]
    done = CliRunner().invoke(main, ["chat", str(package), *words, "--json-schema", str(schema)])
    return done.exit_code, done.stdout, done.stderr


def test_an_answer_of_a_schema(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    status, out, err = ask(package, path)
    assert status == 0, err
    reply = json.loads(json.loads(out)["reply"])
    assert reply["river"] in ("Rhine", "Aare") and reply["long"] in (True, False)


@pytest.mark.parametrize("text", ["{", '{"type": "objekt"}', '{"not": {}}', "5"])
def test_a_schema_that_is_none(package: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(text)
    status, out, _ = ask(package, path)
    assert status == 2 and "schema" in json.loads(out)["error"]["what"].lower()
