"""Find calls that could run what a file holds: what linting rules do not see of it."""

import ast
from pathlib import Path

# By full name, whatever it was imported as. `segalign.tensor_pickle` has the one exception.
_NEVER = {
    "builtins.eval", "builtins.exec", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "dill.loads", "importlib.util.spec_from_file_location", "joblib.load", "marshal.load",
    "marshal.loads", "numpy.lib.format.read_array", "os.popen", "os.system", "pandas.read_pickle",
    "pickle.Unpickler", "pickle.load", "pickle.loads", "runpy.run_module", "runpy.run_path",
    "shelve.open", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load",
    "torch.package.PackageImporter", "webdataset.autodecode.Decoder", "webdataset.autodecode",
    "yaml.full_load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
# Methods that are unsafe of whatever object.
_NEVER_METHODS = {"extractall", "load_from_checkpoint", "xdecode"}
# Keywords that ask for trust.
_TRUSTING = {"allow_pickle", "custom_pipeline", "shell", "trust_remote_code", "trust_repo"}


def unsafe_calls(tree: ast.Module) -> list[str]:
    """List the calls that are unsafe; names count under what they were imported from."""
    imported = _imported(tree)
    return [
        f"line {node.lineno}: {ast.unparse(node)[:80]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _is_unsafe(node, imported)
    ]


def unsafe_calls_in(path: Path) -> list[str]:
    return unsafe_calls(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def _imported(tree: ast.Module) -> dict[str, str]:
    found = {"eval": "builtins.eval", "exec": "builtins.exec"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                found[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _is_unsafe(call: ast.Call, imported: dict[str, str]) -> bool:
    written = ast.unparse(call.func)
    first, dot, rest = written.partition(".")
    name = imported.get(first, first) + dot + rest
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if any(_may_be_true(given[keyword]) for keyword in _TRUSTING & given.keys()):
        return True
    if name in ("torch.load", "torch.serialization.load"):
        return "weights_only" not in given or not _is_true(given["weights_only"])
    if method == "decode" and name.startswith("webdataset."):
        return True  # decodes members by their suffixes, pickles among them
    return name in _NEVER or method in _NEVER_METHODS


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _may_be_true(value: ast.expr) -> bool:
    return not (isinstance(value, ast.Constant) and value.value in (False, None))
