"""``conmoe-edge export``, and ``--for`` of plan and fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from families import save_tokenizer, tiny_model
from hand_packages import thirds, write_package

from conmoe_edge.cli.main import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("olmoe")
    return write_package(model, tmp_path_factory.mktemp("package") / "out", thirds(model))


def test_a_plain_checkpoint_and_what_is_said_of_it(package: Path, tmp_path: Path) -> None:
    done = run("export", package, tmp_path / "plain", "--json")
    assert done.exit_code == 0
    value = json.loads(done.stdout)
    assert (value["kind"], value["experts"], value["format"]) == ("materialised", 8, "hf")
    assert value["notes"][0].startswith("Saves no memory: 9 prototypes are written as 24 experts")
    files = list((tmp_path / "plain").iterdir())
    assert value["bytes_written"] == sum(file.stat().st_size for file in files)
    again = run("export", package, tmp_path / "plain")
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    assert run("export", package, tmp_path / "plain", "--overwrite").exit_code == 0


def test_a_gguf_file_and_what_is_refused(package: Path, tmp_path: Path) -> None:
    words = ("export", package, tmp_path / "o.gguf", "--format", "gguf")
    without = run(*words)
    assert without.exit_code == 1 and "has no tokenizer that can be used" in without.stderr
    save_tokenizer(package)
    refused = run(*words)
    assert refused.exit_code == 1 and "its model is WordLevel" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    done = run("export", tmp_path, tmp_path / "plain")
    assert done.exit_code == 1 and "is no package" in done.stderr


def test_for_vllm_forces_the_levers() -> None:
    words = "plan demo --gpu 8GB --device cpu --for vllm --rate 25% --json"
    done = run(*words.split())
    assert done.exit_code == 0, done.stderr
    chosen = json.loads(done.stdout)["plan"]["chosen"]
    assert (chosen["precision"], chosen["scope"]) == ("source", 1)
    assert chosen["slots"] == chosen["prototypes"]
    words = "plan demo --gpu 8GB --device cpu --rate 25% --json"
    equal = run(*words.split(), "--precision", "source", "--widths", "equal")
    assert json.loads(equal.stdout)["plan"]["chosen"]["pool_bytes"] == chosen["pool_bytes"]
    free = run(*words.split(), "--precision", "source")
    assert json.loads(free.stdout)["plan"]["chosen"]["prototypes"] != chosen["prototypes"]


def test_a_plan_for_a_quantised_file(tmp_path: Path) -> None:
    words = "plan demo --gpu 562MB --device cpu --for gguf --quantise q8_0 --json"
    done = run(*words.split())
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    chosen = value["plan"]["chosen"]
    assert chosen["width"] == 32 and "as Q8_0" in chosen["reason"]
    refused = run(*["plan", "demo", "--quantise", "Q8_0", "--gpu", "8GB"])
    assert refused.exit_code == 2 and "--for gguf --quantise Q8_0" in refused.stderr


def test_what_was_measured_for_this_runtime_is_not_shown_for_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conmoe_edge import api
    from conmoe_edge.checkpoint.sources.locate import describe
    from conmoe_edge.checkpoint.tensors.fingerprint import fingerprint
    from conmoe_edge.memory.outcomes import Outcome, remember

    monkeypatch.setenv("CONMOE_CACHE_DIR", str(tmp_path))
    found = describe("demo")
    assert found.index is not None
    remember(
        Outcome(
            model=fingerprint(found.index, found.path)["id"],
            precision="int4",
            dense_precision="source",
            rate=0.0,
            scope=1,
            method="auto",
            calibration="c",
            pool_bytes=1,
            loss_rise=0.001,
            wide_prototypes=0,
            kl=0.001,
            tokens=100,
            version="0",
        )
    )
    assert len(api.plan("demo", budget="8GB", device="cpu").outcomes) == 1
    for engine in ("gguf", "hf", "vllm"):
        planned = api.plan("demo", budget="8GB", device="cpu", engine=engine)
        assert planned.outcomes == () and planned.advice == ""


def test_widths_are_free_or_equal() -> None:
    done = run("plan", "demo", "--gpu", "8GB", "--widths", "some")
    assert done.exit_code == 2 and "free" in done.stderr and "equal" in done.stderr


def test_for_vllm_refuses_what_it_cannot_have() -> None:
    done = run("plan", "demo", "--for", "vllm", "--precision", "int4")
    assert done.exit_code == 2
    assert "--precision int4 does not go with --for vllm" in done.stderr
