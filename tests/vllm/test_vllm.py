"""vLLM runs packages as they are, with the tokens of this runtime and the memory of the prototypes.

Run by ``make test-vllm``: vLLM has requirements of its own, so it lives in an environment of its own
(``CONMOE_VLLM_PYTHON``), and this process makes the packages and says what the tokens have to be.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_packages import thirds
from transformers import AutoModelForCausalLM
from vllm_cases import BY_NAME, CASES, OPTIONS, REMOVED, TOKENS, Case, everything, small, written

import conmoe_edge
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.export.hf import export_hf
from conmoe_edge.integrations.vllm.layer_stacks import layer_stacks

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PYTHON = os.environ.get("CONMOE_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))


def in_vllm(jobs: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """What vLLM made of the jobs."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function of this test's is sent to the workers
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (work / "log.txt").open("w") as log:
        done = subprocess.run(
            [PYTHON, str(HERE / "run_in_vllm.py"), str(work / "jobs.json"), str(work / "out.json")],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    assert done.returncode == 0, (work / "log.txt").read_text()[-4000:]
    return json.loads((work / "out.json").read_text())


def job(case: Case, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "prompts": [list(prompt) for prompt in case.prompts],
        "tokens": TOKENS,
        "options": {**OPTIONS, **case.options},
    }


Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Name of a case -> its package, and what vLLM made of it. All run in one process of vLLM's environment."""
    work = tmp_path_factory.mktemp("vllm")
    wanted = os.environ.get("CONMOE_VLLM_CASES", "").split() or list(BY_NAME)
    packages: dict[str, Path] = {}
    jobs = []
    beside = []
    for name in wanted:
        case = BY_NAME[name]
        packages[name] = case.make(work / name)
        served = packages[name]
        if case.export is not None:
            served = work / f"{name}-plain"
            case.export(packages[name], served)
        jobs.append(job(case, served))
        if case.beside_plain:
            export_hf(packages[name], work / f"{name}-plain")
            beside.append((name, job(case, work / f"{name}-plain")))
    found = in_vllm([*jobs, *(one for _, one in beside)], work)
    results = dict(zip(wanted, found[: len(jobs)], strict=True))
    for (name, _), result in zip(beside, found[len(jobs) :], strict=True):
        results[name]["plain"] = result

    def one(name: str) -> Made:
        if name not in results:
            pytest.skip("not among CONMOE_VLLM_CASES")
        assert "error" not in results[name], results[name]["error"]
        return packages[name], results[name]

    return one


def greedy(model: Any, prompts: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    found = []
    model.generation_config.eos_token_id = None  # as vLLM is told to ignore it
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_tokens_are_those_of_this_runtime(case: Case, made: Callable[[str], Made]) -> None:
    package, result = made(case.name)
    if case.export is not None and "pruned" in case.name:
        plain = AutoModelForCausalLM.from_pretrained(f"{package}-plain", dtype=torch.float32)
        wanted = greedy(plain.eval(), case.prompts)
    else:
        options = {"dtype": torch.float32} if "demo" in case.name else {}
        from conmoe_edge.integrations.load import load_package

        wanted = greedy(load_package(package, device="cpu", **options), case.prompts)
    if case.beside_plain:
        # The plugin's part: what vLLM gives for the materialised checkpoint. The prompt's part: this runtime's.
        assert result["tokens"] == result["plain"]["tokens"]
        assert [one[0] for one in result["tokens"]] == [one[0] for one in wanted]
        return
    assert result["tokens"] == wanted


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.export is None],
    ids=lambda case: case.name,
)
def test_memory_is_that_of_the_prototypes(case: Case, made: Callable[[str], Made]) -> None:
    package, result = made(case.name)
    tables = layer_stacks(load_manifest(package))
    ranks = case.options.get("tensor_parallel_size", 1)
    expert_parallel = "enable_expert_parallel" in case.options
    config = json.loads((package / "config.json").read_text())
    wanted = 0
    for table in tables.values():
        if table.leader != table.layer:
            continue  # it uses the weights of another layer
        count = len(table.stack)
        width = table.width
        if expert_parallel:
            count = -(-count // ranks)
        else:
            width = -(-width // ranks)
        width = -(-width // 32) * 32  # what the kernel for processors fills up to
        wanted += count * 3 * width * config["hidden_size"] * 4
    slots = sum(len(table.slots) for table in tables.values())
    kept = sum(len(t.stack) for t in tables.values() if t.leader == t.layer)
    print(
        f"\n{case.name}: {result['architecture']}, {kept} prototypes for {slots} router slots, "
        f"{result['expert_bytes']:,} bytes of experts a rank, {result['parameter_bytes']:,} in all"
    )
    assert result["expert_bytes"] == wanted


def test_a_plain_export_has_an_expert_for_every_slot(made: Callable[[str], Made]) -> None:
    _, package = made("scaled-uneven")
    _, plain = made("plain-scaled")
    _, pruned = made("plain-pruned")
    print(
        f"\nexperts: {package['expert_bytes']:,} bytes from the package, {plain['expert_bytes']:,} "
        f"materialised, {pruned['expert_bytes']:,} with {8 - len(REMOVED)} of 8 slots"
    )
    assert {shape[0] for shape in plain["experts"]} == {8}
    assert {shape[0] for shape in pruned["experts"]} == {8 - len(REMOVED)}
    assert package["expert_bytes"] < plain["expert_bytes"]


def test_what_cannot_be_served_is_refused_with_the_command(tmp_path: Path) -> None:
    model = small("olmoe")
    dense = written(
        model,
        tmp_path / "dense",
        thirds(model),
        in_int8=["model.layers.0.self_attn.q_proj.weight"],
    )
    package = everything(tmp_path / "everything")
    plain = Case("", everything)
    adapters = Case("", everything, {"enable_lora": True})
    again = Case("", everything, {"quantization": "fp8"})
    tied = written(small("olmoe", tie_word_embeddings=True), tmp_path / "tied", thirds(model))
    jobs = [job(plain, dense), job(adapters, package), job(again, package), job(plain, tied)]
    results = in_vllm(jobs, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert all("error" in result for result in results), results
    assert "fit MODEL --for vllm" in results[0]["error"]
    assert "Adapters are not served on prototypes" in log
    assert "quantization" in results[2]["error"]
    assert "vLLM found no weight for lm_head" in log and "--model-impl transformers" in log
    assert conmoe_edge.__version__
