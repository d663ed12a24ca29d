"""``bench`` on real packages of a tiny model, and its report from figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from families import save_tiny, save_tokenizer, tiny_model
from hand_packages import thirds, write_package
from rich.console import Console

from conmoe_edge.checkpoint.format.manifest import CacheSettings
from conmoe_edge.checkpoint.package.manifest_io import load_manifest
from conmoe_edge.cli.main import main
from conmoe_edge.cli.views import bench_facts as _bench_facts
from conmoe_edge.cli.views.bench_facts import Rates, record_shares, replayed_hit_rate
from conmoe_edge.cli.views.bench_report import Facts, Report, make_report
from conmoe_edge.cli.views.bench_svg import bench_svg
from conmoe_edge.cli.views.bench_table import bench_view
from conmoe_edge.memory.budget import Budget
from conmoe_edge.offload.generation.benchmark import Phase, Round

_RUN = ("--device", "cpu", "--gpu", "2GB", "--prompt-tokens", "40", "--tokens", "6")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ("bench", *arguments))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the experts of a tiny OLMoE, each router slot sharing one with its neighbours."""
    folder = tmp_path_factory.mktemp("bench") / "package"
    model = tiny_model("olmoe")
    write_package(model, folder, thirds(model))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abcdefgh" * 60, encoding="utf-8")
    return path


def test_the_json_has_the_figures_and_they_agree(package: Path, text: Path) -> None:
    result = run(str(package), *_RUN, "--text", str(text), "--repeats", "2", "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["schema_version"] == 1
    assert list(value) == [
        "schema_version",
        "package",
        "settings",
        "runtime",
        "machine",
        "decode",
        "prefill",
        "memory",
        "expected",
        "rounds",
    ]
    assert value["settings"]["prompt_tokens"] == 40 and value["settings"]["text"] == "text.txt"
    assert len(value["rounds"]) == 2
    decode = value["decode"]
    for one in value["rounds"]:
        assert (one["prefill"]["tokens"], one["decode"]["tokens"]) == (40, 6)
        # Of 8 slots, 3 of which are asked for, 3 + 3 + 2 share a prototype: 1 to 3 a layer.
        assert 6 * 3 * 1 <= one["decode"]["hits"] <= 6 * 3 * 3
    assert decode["hit_rate"] == 1.0 and decode["bytes_per_token"]["disk"] == 0
    low, median, high = (decode["tokens_per_second"][key] for key in ("low", "median", "high"))
    assert 0 < low <= median <= high
    bound = decode["bound"]
    assert bound["share_of_serial"] == pytest.approx(median / bound["serial_tokens_per_second"])
    read = value["machine"]["memory_bandwidth"] * bound["device_seconds_per_token"]
    assert read == pytest.approx(decode["bytes_per_token"]["memory"])
    expected = value["expected"]
    assert expected["measured_ratio"] == pytest.approx(median / expected["tokens_per_second"])
    assert value["prefill"]["first_token_seconds"]["median"] > 0


def test_the_table_and_the_picture(package: Path, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "speed.svg"
    options = ("--text", str(text), "--repeats", "1", "--svg", str(picture))
    result = run(str(package), *_RUN, *options)
    assert result.exit_code == 0, result.stderr
    for words in ("tokens/s", "share of that bound", "first token", "hit rate", "Expected"):
        assert words in result.stdout
    assert "Round 1 of 1" in result.stderr and "Round" not in result.stdout
    assert ElementTree.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")


def test_the_same_seed_takes_the_same_prompts(package: Path) -> None:
    from transformers import AutoTokenizer

    from conmoe_edge.cli.commands.bench import _prompts

    tokenizer = AutoTokenizer.from_pretrained(package)
    text = "".join(chr(97 + number % 26) for number in range(400))
    asked = {"prompt_tokens": 30, "tokens": 4, "repeats": 3, "seed": 1}
    first, again = (_prompts(tokenizer, text, asked, 128) for _ in range(2))
    other = _prompts(tokenizer, text, {**asked, "seed": 2}, 128)
    assert first == again != other
    assert {len(one) for one in first} == {30} and len({tuple(one) for one in first}) == 3
    assert len(_prompts(tokenizer, text, {**asked, "repeats": 50}, 128)) == 50


@pytest.mark.parametrize(
    ("options", "status", "what", "fix"),
    [
        (("--gpu", "100MB", "--device", "cpu"), 3, "holds no prototype", "--gpu "),
        ((*_RUN, "--prompt-tokens", "4000"), 2, "4000 tokens of prompt", "--context 4006"),
        ((*_RUN, "--prompt-tokens", "125"), 2, "125 tokens of prompt", "--prompt-tokens 122"),
        ((*_RUN, "--text", "{short}"), 2, "The text has only 4 tokens", "--prompt-tokens 4"),
        ((*_RUN, "--text", "{folder}/nothing"), 2, "cannot be read", "--text FILE"),
        (
            (*_RUN, "--repeats", "1", "--svg", "{folder}/no/such.svg"),
            1,
            "Cannot write",
            "--svg",
        ),
    ],
)
def test_what_goes_wrong_is_said_in_one_line_with_its_fix(
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    status: int,
    what: str,
    fix: str,
) -> None:
    monkeypatch.setattr(_bench_facts, "measured_rates", lambda folder: Rates(1e10, 1e9))
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    names = {"{short}": str(tmp_path / "short.txt"), "{folder}": str(tmp_path)}
    words = []
    for option in options:
        for name, value in names.items():
            option = option.replace(name, value)
        words.append(option)
    result = run(str(package), *words)
    assert result.exit_code == status, result.stderr
    assert what in result.stderr and fix in result.stderr.split("fix:")[1]
    assert "Traceback" not in result.stderr


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    for folder, what in ((tmp_path / "nothing", "There is no folder"), (tmp_path, "is no package")):
        result = run(str(folder), *_RUN)
        assert result.exit_code == 1 and what in result.stderr


def test_a_model_that_was_left_unchanged_is_measured_too(tmp_path: Path, text: Path) -> None:
    source = save_tiny("olmoe", tmp_path / "source")
    save_tokenizer(source)
    budget = ("--gpu", "2GB", "--device", "cpu")
    fitted = CliRunner().invoke(
        main, ("fit", str(source), "--out", str(tmp_path / "out"), *budget, "--offline", "--quiet")
    )
    assert fitted.exit_code == 0, fitted.stderr
    assert load_manifest(tmp_path / "out").method == "unchanged"
    options = ("--text", str(text), "--repeats", "1", "--json")
    value = json.loads(run(str(tmp_path / "out"), *_RUN, *options).stdout)
    assert value["decode"]["hit_rate"] is None
    # Three of eight experts of three layers, 3 matrices of 32 x 16 numbers of 4 bytes each.
    experts = 3 * 3 * 3 * 32 * 16 * 4
    read = value["decode"]["bytes_per_token"]["memory"]
    whole = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert experts < read < whole - 3 * 5 * 3 * 32 * 16 * 4
    assert value["expected"]["planned_tokens_per_second"] > 0


# The report, from figures that are easy to follow.

_BUDGET = Budget(
    "cpu", 4 << 30, "4GB", "test", device_bandwidth=20e9, link_bandwidth=1e9, disk_bandwidth=1e9
)


def _facts(**more: Any) -> Facts:
    values: dict[str, Any] = {
        "package": {
            "path": "out",
            "method": "conmoe",
            "rate": 0.5,
            "precision": "bf16",
            "prototypes": 512,
            "resident": 256,
            "slots": 256,
        },
        "settings": {"prompt_tokens": 500, "tokens": 10},
        "runtime": {"kernel": "compiled", "policy": "lru", "reads": ""},
        "budget": _BUDGET,
        "threads": 2,
        "dense_bytes": 350_000_000,
        "cache_bytes": 50_000_000,
        "kept_bytes": 0.0,
        "record_bytes": {"bf16": 16e6},
        "prompt_flops": 1e12,
        "flops_per_second": 100e9,
        "layers": 16,
        "expected": 4.0,
        "planned": 3.5,
    }
    return Facts(**{**values, **more})


def _round(decode_seconds: float, **more: Any) -> Round:
    prefill = Phase(500, 20.0, 300, 200, 200 * 16_000_000, 0, 1.0)
    decode = Phase(10, decode_seconds, 900, 100, 100 * 16_000_000, 0, 0.8)
    return Round(prefill, replace(decode, **more), 3 << 30)


def _report(**more: Any) -> Report:
    return make_report(_facts(**more), [_round(4.0), _round(5.0), _round(2.5)])


def test_bounds_and_shares() -> None:
    report = _report()
    decode = report.decode
    assert decode.tokens_per_second.median == 2.5
    assert (decode.tokens_per_second.low, decode.tokens_per_second.high) == (2.0, 4.0)
    assert decode.hit_rate == 0.9
    assert decode.memory_bytes == 2e9  # 0.4 GB dense, 100 prototypes of 16 MB
    assert decode.disk_bytes == 160e6
    assert decode.bound is not None
    assert (decode.bound.device, decode.bound.below) == pytest.approx((0.1, 0.16))
    assert decode.share == pytest.approx(2.5 * 0.26)
    assert decode.share_overlapped == pytest.approx(2.5 * 0.16)
    assert decode.waited_share == pytest.approx(0.2)
    assert report.expected_ratio == pytest.approx(2.5 / 4)
    prefill = report.prefill
    assert prefill.tokens_per_second.median == 25
    assert report.first_token_seconds.median == 20
    assert prefill.bound is not None
    assert 500 * prefill.bound.serial == pytest.approx(10.0 + 3.2)
    assert prefill.share == pytest.approx(13.2 / 20)


def test_a_machine_that_could_not_be_measured_has_no_bound() -> None:
    report = _report(budget=replace(_BUDGET, device_bandwidth=None), expected=None)
    assert report.decode.bound is None and report.decode.share is None
    assert report.expected_ratio is None
    assert json.loads(json.dumps(report.to_json()))["decode"]["bound"] is None
    assert "?" in _shown(report)


def _shown(report: Report) -> str:
    console = Console(file=StringIO(), width=80, markup=False, emoji=False, highlight=False)
    console.print(bench_view(report))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_table_fits_80_columns() -> None:
    shown = _shown(_report())
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "2.5  (2.0–4.0)" in shown and "65.0 %" in shown
    assert "brought from host" not in shown
    on_gpu = _report(budget=replace(_BUDGET, device="cuda"))
    assert "brought from host" in _shown(on_gpu)


def test_the_picture_is_whole_and_holds_no_foreign_thing() -> None:
    for report in (_report(), _report(budget=replace(_BUDGET, disk_bandwidth=None))):
        svg = bench_svg(report)
        root = ElementTree.fromstring(svg)
        assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "<script" not in svg and "url(" not in svg
        width = float(root.attrib["width"])
        for one in root.iter("{http://www.w3.org/2000/svg}rect"):
            left, wide = float(one.attrib.get("x", 0)), float(one.attrib["width"])
            assert left >= 0 and wide >= 0 and left + wide <= width


def test_names_cannot_break_the_picture() -> None:
    report = _report(runtime={"kernel": "<script>&", "policy": "", "reads": ""})
    assert "<script>" not in bench_svg(report)


def test_shares_of_layouts_follow_the_routing_weight(package: Path) -> None:
    manifest = load_manifest(package)
    assert record_shares(manifest) == pytest.approx({"source": manifest.layouts[0].nbytes})
    wide = replace(manifest.layouts[0], precision="int8", nbytes=8192)
    narrow = replace(manifest.layouts[0], precision="int4", nbytes=4096)
    first = manifest.prototypes[0].id
    mixed = replace(
        manifest,
        layouts=(wide, narrow),
        prototypes=tuple(
            replace(
                one,
                layout=0 if one.id == first else 1,
                weight=3.0 if one.id == first else 1.0 / (len(manifest.prototypes) - 1),
            )
            for one in manifest.prototypes
        ),
        cache=(
            CacheSettings(slots=1, policy="lru", predicted_hit=1.0),
            CacheSettings(slots=4, policy="lru", predicted_hit=0.6),
        ),
    )
    assert record_shares(mixed) == pytest.approx({"int8": 0.75 * 8192, "int4": 0.25 * 4096})
    assert replayed_hit_rate(mixed, 5) == pytest.approx(0.9)
    assert replayed_hit_rate(mixed, 4) is None
    assert replayed_hit_rate(manifest, 5) is None
