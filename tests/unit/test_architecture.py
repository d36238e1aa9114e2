"""Rules of the code base that a machine can check."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("segalign", "lightning_modules", "datamodules", "callbacks")
# One direction: a package may import itself and these of ours, besides other people's packages.
MAY_IMPORT = {
    "segalign": {"segalign"},
    "lightning_modules": {"segalign", "lightning_modules"},
    "datamodules": {"segalign", "datamodules"},
    "callbacks": {"segalign", "callbacks"},
}
# Pure standard library at import time, so that light commands and tools start at once.
TORCH_FREE = (
    "segalign.atomic",
    "segalign.error_boundary",
    "segalign.json_text",
    "segalign.run_directory",
    "segalign.run_start",
)
MACHINE_PATH = re.compile(r"""["'(= ]/(home|root|work|tmp|Users|mnt|scratch)/\w""")


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def texts() -> list[Path]:
    """List all text files of the project: code, configs, documents, scripts."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    suffixes = {".py", ".yaml", ".yml", ".toml", ".md", ".sh", ".txt", ".json", ""}
    found = [ROOT / name for name in tracked if Path(name).suffix in suffixes]
    return [path for path in found if path.is_file()] or modules()


def imported_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_there_is_something_to_check():
    assert len(modules()) > 20
    assert {path.relative_to(ROOT).parts[0] for path in modules()} == set(PACKAGES)
    assert ROOT / "main.py" in texts() or ROOT / "segalign" / "errors.py" in texts()


def test_imports_point_one_way():
    wrong = []
    for path in modules():
        package = path.relative_to(ROOT).parts[0]
        ours = {name.partition(".")[0] for name in imported_names(parse(path))}
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in ours & {*PACKAGES, "main", "tests", "benchmarks"} - MAY_IMPORT[package]
        ]
    assert wrong == []


def test_the_core_knows_no_trainer():
    banned = {"lightning", "pytorch_lightning", "lightning_fabric"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in modules()
        if path.relative_to(ROOT).parts[0] == "segalign"
        and banned & {name.partition(".")[0] for name in imported_names(parse(path))}
    ]
    assert wrong == []


def test_names_say_what_a_module_is():
    vague = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py", "tools.py"}
    assert [str(path) for path in modules() if path.name in vague] == []


def test_package_markers_are_empty():
    markers = [path for path in modules() if path.name == "__init__.py"]
    assert [str(path) for path in markers if path.read_text().strip()] == []
    assert sorted((ROOT / "tests").rglob("__init__.py")) == []


def test_modules_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 300} == {}


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name
    ]


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Find calls that could run code hidden in a file."""
    found = [
        ast.unparse(call)
        for call in calls(tree, "torch.load")
        if not any(
            keyword.arg == "weights_only"
            and isinstance(keyword.value, ast.Constant)
            and keyword.value.value is True
            for keyword in call.keywords
        )
    ]
    for name in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "yaml.load"):
        found += [ast.unparse(call) for call in calls(tree, name)]
    return found


@pytest.mark.parametrize(
    ("code", "is_unsafe"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=flag)", True),
        ("torch.load(p, weights_only=True)", False),
        ("pickle.loads(b)", True),
        ("yaml.safe_load(t)", False),
    ],
)
def test_unsafe_loads_are_recognised(code, is_unsafe):
    assert bool(unsafe_loads(ast.parse(code))) is is_unsafe


def test_nothing_is_unpickled():
    sources = [*modules(), ROOT / "main.py", *sorted((ROOT / "benchmarks").rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): unsafe_loads(parse(path)) for path in sources}
    assert {path: loads for path, loads in found.items() if loads} == {}


@pytest.mark.parametrize(
    ("line", "is_absolute"),
    [
        ('path = "{}home{}me"', True),
        ("root: {}work{}data", True),
        ("`runs{}tmp{}x`", False),
        ("https://x.org{}home{}a", False),
    ],
)
def test_machine_paths_are_recognised(line, is_absolute):
    assert bool(MACHINE_PATH.search(line.replace("{}", "/"))) is is_absolute


def test_no_machine_paths():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_name(path) for path in modules()])
def test_every_module_can_be_imported(name):
    assert importlib.import_module(name).__name__ == name


@pytest.mark.parametrize("name", TORCH_FREE)
def test_light_modules_import_no_torch(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    heavy = {"torch", "lightning", "numpy", "safetensors", "omegaconf", "jsonargparse"}
    names = imported_names(parse(path))
    assert not heavy & {imported.partition(".")[0] for imported in names}
    light = {*TORCH_FREE, "segalign.errors"}
    assert {imported for imported in names if imported.startswith("segalign")} <= light
