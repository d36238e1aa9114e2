"""What docs/reliability.md names is there: tests, markers, scripts and broken variants."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
TOYS = ROOT / "tests" / "toys"
# A table may name variants of a module as `broken_TOPIC.name`, or all of them as `broken_TOPIC.*`.
NAMED = set(re.findall(r"`(broken_\w+\.(?:\w+|\*))`", TEXT))


def commands() -> list[list[str]]:
    code = re.findall(r"`((?:pytest|python) [^`\n]+)`", TEXT)
    code += re.findall(r"^((?:pytest|python) [^#\n]+)", TEXT, re.MULTILINE)
    return [command.split() for command in code]


def variants() -> set[str]:
    """List the public functions with one-line docstrings of tests/toys/broken_*.py."""
    found = set()
    for path in TOYS.glob("broken_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_variant = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if is_variant and "\n" not in (ast.get_docstring(node) or "\n"):
                found.add(f"{path.stem}.{node.name}")
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_name_what_is_there(command, pytestconfig):
    words = iter(command[1:])
    for word in words:
        if word == "-m":
            markers = {line.split(":")[0] for line in pytestconfig.getini("markers")}
            assert next(words) in markers
        elif word.startswith("-"):
            assert word in {"--minutes", "--nightly", "--quick", "--workers", "--rounds", "-q"}
        elif word.endswith(".py") or "::" in word:
            file, _, test = word.partition("::")
            assert (ROOT / file).is_file()
            assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_variants_that_are_named_are_there():
    there = variants()
    modules = {f"{name.split('.')[0]}.*" for name in there}
    assert not NAMED - there - modules
    assert "broken_resources.*" in NAMED


def test_variants_that_are_there_are_named():
    if "TODO(" in TEXT:
        pytest.skip("the table is not finished")
    assert [
        name for name in sorted(variants()) if not {name, f"{name.split('.')[0]}.*"} & NAMED
    ] == []


def test_every_variant_is_used_by_a_test():
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    unused = []
    for name in sorted(variants() & NAMED):
        module, _, function = name.partition(".")
        if name not in tests and not (module in tests and re.search(rf"\b{function}\b", tests)):
            unused.append(name)
    assert unused == []
