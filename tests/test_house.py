"""Rules of the house that no general tool checks, held over the source text itself.

Nothing in a model is executed, so nothing that could execute it may appear; only the command line
talks. The rules are functions from source text to findings, so that the tests can also show each of
them finding what it is there for.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "conmoe_edge"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TALKERS = ("click", "prompt_toolkit", "rich")

FORBIDDEN_IMPORTS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "torch.load": "unpickles",
    "torch.jit.load": "runs code from a file",
    "torch.hub.load": "runs code from the net",
    "yaml.load": "builds any object",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "logging.basicConfig": "configures the caller's logging",
}
FORBIDDEN_FLAGS = {
    "shell": True,
    "trust_remote_code": True,
    "allow_pickle": True,
    "weights_only": False,
}


def dotted(node: ast.expr) -> str:
    """``torch.load`` for the expression that reads so, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported(node: ast.AST) -> Iterator[str]:
    """Full names that an import statement brings in."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def executes(source: str) -> list[str]:
    """Places where the source could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in imported(node):
            if name.split(".")[0] in FORBIDDEN_IMPORTS or name in FORBIDDEN_CALLS:
                found.append(f"line {getattr(node, 'lineno', 0)}: imports {name}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: bare except")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_BUILTINS:
            found.append(f"line {node.lineno}: calls {name}")
        if name in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {name} {FORBIDDEN_CALLS[name]}")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in FORBIDDEN_FLAGS and value is FORBIDDEN_FLAGS[keyword.arg]:
                found.append(f"line {node.lineno}: {keyword.arg}={value}")
    return found


def talks(source: str) -> list[str]:
    """Places where the source writes to the terminal or imports what does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in imported(node):
            if name.split(".")[0] in TALKERS or name in ("sys.stdout", "sys.stderr"):
                found.append(f"line {getattr(node, 'lineno', 0)}: imports {name}")
        if isinstance(node, ast.Call) and dotted(node.func) in ("print", "input"):
            found.append(f"line {node.lineno}: calls {dotted(node.func)}")
        if isinstance(node, ast.Attribute) and dotted(node) in ("sys.stdout", "sys.stderr"):
            found.append(f"line {node.lineno}: uses {dotted(node)}")
    return found


READERS = {
    "open",
    "safe_open",
    "load_file",
    "read_bytes",
    "read_text",
    "parse_local_safetensors_file_metadata",
    "from_pretrained",
    "get_config_dict",
    "copyfile",
    "copytree",
    "link",
    "symlink",
    "symlink_to",
}
"""Last names of the calls by which a file is read, by us or by a library."""

WAYS_IN = {"path_inside", "open_inside", "read_inside"}
"""What decides whether a file lies inside its folder (``checkpoint/fs/contained.py``)."""

OUR_OWN = "a file that this program wrote, and nobody gives away"
THE_USERS = "a file that the user named, or keeps for this program"
THE_SYSTEMS = "a file of the system"
READ_ELSEWHERE = {
    "api/benching.py": THE_USERS,
    "api/diagnosing.py": THE_SYSTEMS,
    "checkpoint/fs/atomic_files.py": OUR_OWN,
    "checkpoint/fs/contained.py": "the function itself",
    "checkpoint/fs/durable.py": OUR_OWN,
    "checkpoint/package/staged.py": "the lock of an output folder",
    "checkpoint/sources/model_names.py": THE_USERS,
    "checkpoint/sources/user_aliases.py": THE_USERS,
    "checkpoint/tensors/tensor_index.py": "headers, under the name that path_inside gave",
    "checkpoint/tensors/tensor_writer.py": OUR_OWN,
    "cli/chat_loop/conversation.py": THE_USERS,
    "cli/chat_loop/prompt_input.py": THE_USERS,
    "cli/commands/chat.py": THE_USERS,
    "cli/commands/serve.py": THE_USERS,
    "cli/ui/shells.py": THE_USERS,
    "compress/run/journal.py": OUR_OWN,
    "compress/stream/calibration_text.py": THE_USERS,
    "compress/work/work_folder.py": OUR_OWN,
    "integrations/load.py": "behind open_package, which goes over the whole folder",
    "memory/bandwidth.py": "the speed of a disk, by a file that is no link; its content is dropped",
    "memory/cgroup.py": THE_SYSTEMS,
    "memory/outcomes.py": OUR_OWN,
    "memory/profiles.py": THE_USERS,
    "model/tokenizers.py": "a private copy of what read_inside gave",
    "offload/generation/prompt_files.py": OUR_OWN,
    "offload/generation/prompt_identity.py": OUR_OWN,
    "offload/generation/template_process.py": THE_SYSTEMS,
    "offload/kernels/cpu/compiling.py": OUR_OWN,
    "offload/kernels/cpu/levels.py": THE_SYSTEMS,
    "offload/kernels/cpu/library_files.py": OUR_OWN,
    "offload/kernels/cpu/processor.py": THE_SYSTEMS,
    "offload/kernels/cpu/tried_apart.py": OUR_OWN,
    "report/measured.py": THE_USERS,
    "system_calls.py": "a file that is open already, by another descriptor",
}
"""Files that read without the one function, and why they may. Every other one uses it."""


def reads_elsewhere(source: str) -> list[str]:
    """Places where a file is read whose place was not decided by the one function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func) or getattr(node.func, "attr", "")
        owner, _, last = name.rpartition(".")
        if last not in READERS or (isinstance(node.func, ast.Name) and last == "read_text"):
            continue  # the latter is the function of ours that reads a text
        parts = [inner for argument in node.args for inner in ast.walk(argument)]
        if any(isinstance(one, ast.Call) and dotted(one.func) in WAYS_IN for one in parts):
            continue
        ours = last == "open" and owner[:1].isupper()  # a class of our own: CheckpointIndex.open
        modes = [one.value for one in node.args if isinstance(one, ast.Constant)]
        writes = last == "open" and any(str(mode)[:1] in ("w", "x", "a") for mode in modes)
        if not ours and not writes:
            found.append(f"line {node.lineno}: {name}")
    return found


RENAMED_ELSEWHERE = {
    "checkpoint/fs/durable.py": "the function itself",
    "memory/bandwidth.py": "figures that are measured again where they are lost",
    "memory/outcomes.py": "what earlier fits cost: a note, and no fit waits for the disk to have it",
    "offload/kernels/cpu/library_files.py": "compiled again where it is lost; its digest is compared",
}
"""Files that rename without ``durable.replace``, and why they may."""


def renames(source: str) -> list[str]:
    """Places where a file or a folder gets another name, and nothing waits until that is on the disk."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, last = dotted(node.func), node.func.attr
        # Of a path it has one argument; of a text, of a date and of ``durable`` itself another number.
        of_a_path = last == "replace" and len(node.args) == 1 and not node.keywords
        if last in ("rename", "renames") or name in ("os.replace", "shutil.move") or of_a_path:
            found.append(f"line {node.lineno}: {name or last}")
    return found


MAY_RUN_CODE = {"from_pretrained", "from_config"}
"""Last names of transformers' calls that ask whether to run code from a model folder unless they are told not to."""


def leaves_code_open(source: str) -> list[str]:
    """Calls that do not say ``trust_remote_code=False`` themselves: left out, it is a question on stdin."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in MAY_RUN_CODE and not any(
            one.arg == "trust_remote_code"
            and isinstance(one.value, ast.Constant)
            and one.value.value is False
            for one in node.keywords
        ):
            found.append(f"line {node.lineno}: {dotted(node.func) or node.func.attr}")
    return found


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_nothing_that_is_read_can_be_executed(path: Path) -> None:
    assert executes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_no_call_into_transformers_leaves_code_open(path: Path) -> None:
    assert leaves_code_open(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "AutoConfig.from_pretrained(folder)",
        "AutoModelForCausalLM.from_config(config, trust_remote_code=None)",
        "kind().from_config(config, trust_remote_code=asked)",
        "AutoTokenizer.from_pretrained(folder, **options)",
    ],
)
def test_the_rule_about_open_code_finds(source: str) -> None:
    assert len(leaves_code_open(source)) == 1


def test_the_rule_about_open_code_leaves_alone() -> None:
    said = "AutoModel.from_config(config, trust_remote_code=False)\nfrom_config(ours)"
    assert leaves_code_open(said) == []


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if PACKAGE / "cli" not in p.parents], ids=shown
)
def test_only_the_command_line_talks(path: Path) -> None:
    assert talks(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_files_of_a_model_are_read_by_one_function(path: Path) -> None:
    elsewhere = reads_elsewhere(path.read_text(encoding="utf-8"))
    may = path.relative_to(PACKAGE).as_posix() in READ_ELSEWHERE
    # A reason that no longer applies is taken off the list.
    assert bool(elsewhere) == may, elsewhere


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_names_change_by_one_function(path: Path) -> None:
    found = renames(path.read_text(encoding="utf-8"))
    assert bool(found) == (path.relative_to(PACKAGE).as_posix() in RENAMED_ELSEWHERE), found


@pytest.mark.parametrize(
    "source",
    [
        "a.rename(b)",
        "os.replace(a, b)",
        "Path(a).replace(b)",
        "os.renames(a, b)",
        "shutil.move(a, b)",
    ],
)
def test_the_rule_about_names_finds(source: str) -> None:
    assert len(renames(source)) == 1


@pytest.mark.parametrize(
    "source",
    ["durable.replace(a, b)", "text.replace('a', 'b')", "replace(a, b=c)", "day.replace(hour=1)"],
)
def test_the_rule_about_names_leaves_alone(source: str) -> None:
    assert renames(source) == []


# The first looks at the folder and hands it on; the second copies what it looked at, and hands the copy on.
@pytest.mark.parametrize(
    ("path", "looks"), [("integrations/load.py", "open_package"), ("model/tokenizers.py", "_copy")]
)
def test_a_library_gets_what_was_looked_at(path: str, looks: str) -> None:
    """In the order of the calls of the one function that leads to ``from_pretrained``."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    def lines(function: ast.FunctionDef, name: str) -> list[int]:
        calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
        return [call.lineno for call in calls if dotted(call.func).endswith(name)]

    (hands,) = (one for one in functions if lines(one, "from_pretrained"))
    (leads,) = (one for one in functions if lines(one, looks))
    given = lines(leads, "from_pretrained") or lines(leads, hands.name)
    assert min(lines(leads, looks)) < min(given)


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec('x = 1')",
        "__import__('os')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "f(trust_remote_code=True)",
        "np.load('x', allow_pickle=True)",
        "try:\n    f()\nexcept:\n    pass",
        "def late():\n    import marshal",
    ],
)
def test_the_rule_against_execution_finds(source: str) -> None:
    assert len(executes(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "path.open('rb')",
        "os.open(path, os.O_RDONLY)",
        "(folder / name).read_bytes()",
        "load_file(folder / name)",
        "safe_open(path, framework='np')",
        "AutoConfig.from_pretrained(folder)",
        "shutil.copyfile(one, other)",
        "os.symlink(one, other)",
    ],
)
def test_the_rule_about_reading_finds(source: str) -> None:
    assert len(reads_elsewhere(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "CheckpointIndex.open(folder)",
        "path.open('wb')",
        "load_file(path_inside(folder, name))",
        "os.fdopen(open_inside(folder, name), 'rb')",
        "read_inside(folder, name)",
    ],
)
def test_the_rule_about_reading_leaves_alone(source: str) -> None:
    assert reads_elsewhere(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile('x')",
        "f(trust_remote_code=False)",
        "safetensors.torch.load_file('x')",
    ],
)
def test_the_rule_against_execution_leaves_alone(source: str) -> None:
    assert executes(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "import rich.table",
        "from click import echo",
        "import sys\nsys.stderr.write('x')",
    ],
)
def test_the_rule_about_talking_finds(source: str) -> None:
    assert len(talks(source)) == 1


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    found = [Requirement(text) for text in (*project["dependencies"], *extras)]
    return [one for one in found if one.name != project["name"]]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    version = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


HOSTS = {
    "conmoe_edge/integrations/vllm/plugin.py": {"vllm"},
    "conmoe_edge/export/llama/quantise_program.py": {"llama_cpp"},
}
"""Files that run only where a module is, which is no dependency of ours: inside its program, or after it was found."""


def test_every_import_is_a_declared_dependency() -> None:
    modules = {"huggingface-hub": "huggingface_hub", "nvidia-ml-py": "pynvml"}
    names = {canonicalize_name(r.name) for r in requirements()}
    declared = {modules.get(name, name.replace("-", "_")) for name in names}
    used = {
        name.split(".")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node)
        if name.split(".")[0] not in HOSTS.get(shown(path), ())
    }
    assert used - declared - set(sys.stdlib_module_names) - {"conmoe_edge"} == set()


def error_names() -> set[str]:
    """Every class of the package that is a ``ConmoeError``."""
    classes = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    names = {"ConmoeError"}
    while (
        more := {
            one.name
            for one in classes
            if {dotted(base).split(".")[-1] for base in one.bases} & names
        }
        - names
    ):
        names |= more
    return names


def errors_without_fix(source: str, names: set[str]) -> Iterator[str]:
    """What errors are made with no fix, or with an empty one."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or dotted(node.func).split(".")[-1] not in names:
            continue
        if any(isinstance(one, ast.Starred) for one in node.args):
            continue  # the sentences of another error
        named = {one.arg: one.value for one in node.keywords}
        fix = node.args[2] if len(node.args) > 2 else named.get("fix")
        what = node.args[0] if node.args else named.get("what")
        if (
            None not in named
            and (fix is None or (isinstance(fix, ast.Constant) and not fix.value))
            and what is not None
        ):
            yield ast.unparse(what)


NO_FIX = {
    "'Stopped before the prompt was there.'",  # the user asked for it
}


def test_every_error_says_what_helps() -> None:
    names = error_names()
    assert {"UsageError", "ContextFull", "NotServable"} <= names
    found = {
        f"{shown(path)}: {one}"
        for path in SOURCES
        for one in errors_without_fix(path.read_text(encoding="utf-8"), names)
        if one not in NO_FIX
    }
    assert found == set()


@pytest.mark.parametrize(
    "call",
    [
        "UsageError('a')",
        "UsageError('a', 'b')",
        "UsageError('a', 'b', '')",
        "errors.UsageError(what='a', fix='')",
    ],
)
def test_an_error_without_a_fix_is_found(call: str) -> None:
    assert list(errors_without_fix(call, {"UsageError"})) == ["'a'"]
    assert not list(
        errors_without_fix("UsageError('a', '', FIX); UsageError('a', fix='c')", {"UsageError"})
    )


def test_links_in_the_documents_lead_somewhere() -> None:
    broken = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{shown(document)}: {target}")
    assert broken == []


@pytest.mark.parametrize(
    "module",
    ["conmoe_edge", "conmoe_edge.cli.main", "conmoe_edge.plan.planner", "conmoe_edge.serve.front"],
)
def test_start_does_not_load_torch(module: str) -> None:
    heavy = ("torch", "transformers", "accelerate", "bitsandbytes")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
