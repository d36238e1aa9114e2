"""Files and names that try to run code, to write elsewhere, or to take all memory or time."""

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

PETABYTES = 2**52


class Call:
    """A pickle that would call a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def pickles(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Yield files for ``torch.load`` by name; each would make the folder ``mark``, or worse."""
    import os
    import subprocess

    code = f"__import__('os').mkdir({str(mark)!r})"
    inner = pickle.dumps(Call(os.mkdir, str(mark)))
    calls = {
        "os": Call(os.mkdir, str(mark)),
        "shell": Call(os.system, f"mkdir {mark}"),
        "popen": Call(subprocess.Popen, ["mkdir", str(mark)]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "nested_pickle": Call(pickle.loads, inner),
        "nested_storage": Call(torch.storage._load_from_bytes, _torch_bytes(Call(eval, code))),
        "nested_file": Call(torch.load, str(mark)),
        "hub": Call(torch.hub.load, str(mark), "x"),
        "open": Call(open, str(mark), "w"),
        "among_tensors": [torch.ones(2, 1), Call(eval, code)],
        "in_a_dict": {"weight": torch.ones(2), "callbacks": {"x": Call(eval, code)}},
    }
    for name, content in calls.items():
        yield name, _torch_bytes(content)
        yield f"{name}_legacy", _torch_bytes(content, is_zipped=False)
    yield "bare", inner
    yield "protocol_0", f"cos\nmkdir\n(S'{mark}'\ntR.".encode()
    yield (
        "protocol_4",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c%c%s\x85R."
        % (
            len(str(mark)),
            str(mark).encode(),
        ),
    )
    yield "attribute", b"\x80\x02cbuiltins\ngetattr\nctorch\nos\nX\x05\x00\x00\x00mkdir\x86R."
    yield "numpy", b"\x80\x02cnumpy.testing._private.utils\nrunstring\nX\x01\x00\x00\x00x}\x86R."
    yield "subclass", _subclass(mark)
    yield "script", _script()
    yield "petabytes", _archive(_tensor_pickle("0", PETABYTES, (PETABYTES,), (1,)))
    yield "repeated", _archive(_tensor_pickle("0", 4, (2**25, 2**25), (0, 0)))
    yield "beyond", _archive(_tensor_pickle("0", 4, (2**40,), (1,)))
    yield "elsewhere", _archive(_tensor_pickle("../../0", 4, (2,), (1,)))
    yield "compressed", _archive(_tensor_pickle("0", 2**23, (2**23,), (1,)), 2**25)


def _torch_bytes(content: Any, *, is_zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zipped)
    return buffer.getvalue()


def _subclass(mark: Path) -> bytes:
    """A tensor that is rebuilt by a function of the file's choice."""
    text = str(mark).encode()
    return _archive(
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nctorch\nTensor\n"
        b"(X%s%st}tR." % (struct.pack("<I", len(text)), text)
    )


def _script() -> bytes:
    """A program of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bytes(torch.jit.script(torch.nn.Identity()).save_to_buffer())


def _tensor_pickle(key: str, count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Write by hand the pickle of ``[tensor]`` with a storage of so many numbers."""

    class _Pickler(pickle._Pickler):
        def persistent_id(self, item: Any) -> Any:
            if item is storage:
                return ("storage", torch.FloatStorage, key, "cpu", count)
            return None

    class _Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, {})

    storage = object()
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump([_Rebuilt(), _Rebuilt()])
    return buffer.getvalue()


def _archive(content: bytes, num_zeros: int = 16) -> bytes:
    """Put a pickle and one storage of zeros where ``torch.load`` looks for them."""
    kind = zipfile.ZIP_DEFLATED if num_zeros > 16 else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr("x/data.pkl", content)
        file.writestr("x/byteorder", "little")
        file.writestr("x/data/0", b"\0" * num_zeros)
        file.writestr("x/version", "3\n")
    return buffer.getvalue()


def safetensors_files() -> Iterator[tuple[str, bytes]]:
    """Yield files for safetensors by name."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

    def file(header: Any, body: bytes = b"\0" * 16) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    yield "empty", b""
    yield "huge_header", struct.pack("<Q", 2**63) + b"{}"
    yield "long_header", struct.pack("<Q", 99_999_999) + b"{}"
    yield "no_json", file(b"{" * 40)
    yield "deep_json", file(b"[" * 50_000)
    yield "overlap", file({"000.up": one, "001.down": {**one, "data_offsets": [4, 12]}})
    yield "negative", file({"000.up": {**one, "data_offsets": [-8, 0]}})
    yield "backwards", file({"000.up": {**one, "data_offsets": [8, 0]}})
    yield "beyond", file({"000.up": {**one, "data_offsets": [0, 2**40]}})
    yield "overflow", file({"000.up": {**one, "shape": [2**40, 2**40]}})
    yield "petabytes", file({"000.up": {**one, "shape": [2**50], "data_offsets": [0, 2**52]}})
    yield "odd_type", file({"000.up": {**one, "dtype": "PICKLE"}})
    twice = f'{{"000.up": {json.dumps(one)}, "000.up": {json.dumps(one)}}}'
    yield "twice", file(twice.encode(), b"\0" * 8)
    yield "odd_metadata", file({"__metadata__": {"x": [1]}, "000.up": one}, b"\0" * 8)
    yield "a_path", save({"../../x": torch.ones(1), "/etc/x": torch.ones(1)})


def deep_json(depth: int = 100_000) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def json_files() -> Iterator[tuple[str, bytes]]:
    """Yield JSON that is no settings of anything."""
    yield "deep", deep_json()
    yield "deep_list", b"[" * 100_000
    yield "huge_integer", b'{"model_type": ' + b"9" * 5000 + b"}"
    yield "infinite", b'{"format_version": Infinity, "files": {}, "in_dim": 1e999}'
    yield "prototype", b'{"__proto__": {"x": 1}, "__class__": "os.system", "model_type": {}}'
    yield "twice", b'{"model_type": "clip", "model_type": ["x"]}'
    yield "list", b"[1]"
    yield "text", b'"x"'
    yield "not_utf8", b'{"a": "\xff\xfe"}'


def tar_file(members: list[tuple[str, bytes, dict[str, Any]]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, more in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            content = more.pop("content", b"a cat" if kind == tarfile.REGTYPE else b"")
            info.size = len(content)
            for key, value in more.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_files(mark: Path) -> Iterator[tuple[str, bytes]]:
    """Yield shards by name; to unpack one would write elsewhere, to decode one would run code."""
    file, call = tarfile.REGTYPE, pickle.dumps(Call(eval, f"__import__('os').mkdir({str(mark)!r})"))
    good = [("a.txt", file, {})]
    yield "parent", tar_file([*good, ("../../HOSTILE.txt", file, {})])
    yield "absolute", tar_file([*good, (f"{mark}/x.txt", file, {})])
    yield (
        "pickle_members",
        tar_file(
            [(f"a.{suffix}", file, {"content": call}) for suffix in ("pyd", "pkl", "pickle", "pth")]
            + [("a.txt", file, {})]
        ),
    )
    yield (
        "reserved",
        tar_file(
            [(f"a.__{name}__", file, {"content": call}) for name in ("fault", "url", "index")]
            + [("a.txt", file, {})]
        ),
    )
    yield "pax_path", tar_file([("a.txt", file, {"pax_headers": {"path": f"{mark}/y.txt"}})])
    yield "pax_size", tar_file([("a.txt", file, {"pax_headers": {"size": str(2**62)}})])
    yield "link", tar_file([*good, ("b.txt", tarfile.SYMTYPE, {"linkname": "/etc/passwd"})])
    yield "hard_link", tar_file([*good, ("b.txt", tarfile.LNKTYPE, {"linkname": "/etc/passwd"})])
    yield "device", tar_file([*good, ("b.txt", tarfile.CHRTYPE, {"devmajor": 1, "devminor": 5})])


def yaml_files(mark: Path) -> Iterator[tuple[str, str]]:
    """Yield YAML by name that no reader may follow."""
    yield "apply", f"a: !!python/object/apply:os.mkdir ['{mark}']"
    yield "new", f"!!python/object/new:os.system ['mkdir {mark}']"
    yield "name", "a: !!python/name:os.system"
    yield "module", "a: !!python/module:antigravity"
    laughs = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 25))
    yield "laughs", f"l0: &l0 [ha]\n{laughs}\nname: *l24"
    yield "loop", "name: &x [*x]"
    yield "loop_mapping", "settings: &x {a: *x}"
    yield "deep", "name: " + "[" * 20_000
    yield "odd_integer", "a: !!int x"
    yield "odd_time", "a: !!timestamp x"
    yield "merge", "a: &a {<<: *a}"


# What a config may not name: outside the packages, reached through them, or made to run things.
CLASS_PATHS = (
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.run",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "pickle.loads",
    "importlib.import_module",
    "functools.partial",
    "shutil.rmtree",
    "socket.socket",
    "code.InteractiveInterpreter",
    "jsonargparse.set_parsing_settings",
    "torch.os.system",
    "torch.sys.exit",
    "torch.hub.load",
    "torch.load",
    "torch.serialization.load",
    "torch.serialization.pickle.loads",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.cpp_extension.subprocess.Popen",
    "torch.utils.data.os.system",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "torch.multiprocessing.Process",
    "lightning.pytorch.loggers.logger.os.system",
    "lightning.pytorch.cli.os.system",
    "lightning.fabric.utilities.cloud_io.pickle.load",
    "transformers.utils.os.system",
    "diffusers.utils.importlib.import_module",
    "callbacks.run_config.subprocess.run",
    "segalign.launch.running.local_supervisor.subprocess.Popen",
    "main.main",
    "toy_house.os.system",
)
