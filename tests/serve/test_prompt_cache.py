"""Real server processes with ``--prompt-cache``: started again, two at one folder, with damaged files."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import tiny_model
from tests.hand_packages import thirds, write_package
from tests.serve.conftest import ROOT, Running, serving

DEMO = ROOT / "conmoe_edge" / "data" / "demo"
CHUNK, CONTEXT = 32, 512
SYSTEM = "You answer in one short sentence, and you never speak of the weather or of the sea. " * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model(
        *("olmoe", 0, torch.bfloat16),
        **{"vocab_size": 4096, "max_position_embeddings": CONTEXT, "eos_token_id": 5},
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    folder.mkdir()
    write_package(plain, folder, thirds(plain), prefill_chunk=CHUNK)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    return folder


def started(folder: Path, kept: Path | None, *flags: str) -> Any:
    more = () if kept is None else ("--prompt-cache", str(kept))
    return serving(folder, "--context", str(CONTEXT), *more, *flags)


def ask(server: Running, question: str = "Who are you?") -> tuple[str, int]:
    """The greedy answer, and the tokens of the prompt that were known."""
    reply = server.client().chat.completions.create(
        model=server.client().models.list().data[0].id,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
    )
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    return reply.choices[
        0
    ].message.content or "", reply.usage.prompt_tokens_details.cached_tokens or 0


def test_a_server_that_is_started_again_knows_its_prompts(tiny: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with started(tiny, kept) as server:
        said, known = ask(server)
        assert known == 0
        found: list[tuple[str, int]] = []
        both = [
            threading.Thread(target=lambda: found.append(ask(server, "And who am I?")))
            for _ in range(2)
        ]
        for one in both:
            one.start()
        for one in both:
            one.join()
        other = found[0][0]
        assert found[0][0] == found[1][0] and min(one[1] for one in found) >= 2 * CHUNK
        counts = server.metrics()
        assert counts['conmoe_kept_lookups_total{found="yes"}'] == 2
        assert counts["conmoe_kept"] >= 1 and counts["conmoe_kept_bytes"] > 0
        assert counts['conmoe_prompt_file_bytes_total{done="written"}'] > 0
        stats = server.get("/stats").json()["prompts"]
        assert stats["hits"] == 2 and stats["bytes"] == counts["conmoe_kept_bytes"]
    assert kept.stat().st_mode & 0o777 == 0o700
    files = sorted(kept.glob("*.safetensors"))
    assert files and all(one.stat().st_mode & 0o777 == 0o600 for one in files)
    with started(tiny, kept) as server, started(tiny, kept) as second:
        for one in (server, second):
            assert ask(one)[0] == said
            again, known = ask(one, "And who am I?")
            assert again == other and known >= 2 * CHUNK
        assert server.metrics()["conmoe_prompt_files_read_total"] >= 2
    for one in files:  # whichever is first on the way
        data = one.read_bytes()
        one.write_bytes(data[: len(data) // 2])
    with started(tiny, kept) as server:
        assert ask(server) == (said, 0)
    assert server.errors.count("was ignored") == 1
