"""Files and configs from elsewhere run nothing, write nowhere else, and are refused in a line."""

import ast
import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import broken_security
import malicious
import pytest
import torch
import yaml
from guarded_commands import ORDERS, RESOLVE
from safetensors.torch import save_file
from unsafe_calls import unsafe_calls, unsafe_calls_in

from segalign.data.manifest import MANIFEST_NAME
from segalign.data.streaming import stream_urls
from segalign.errors import ConfigError
from segalign.launch.study_file import load_study
from segalign.run_directory import META_FILE, STATE_FILE, describe_files, newest_checkpoint

SOURCES = ("segalign", "lightning_modules", "datamodules", "callbacks", "benchmarks")


# What reads files.

SNIPPETS = {
    "torch.load(path, weights_only=True)": False,
    "yaml.safe_load(text)": False,
    "numpy.load(path)": False,
    "subprocess.run(command, shell=False)": False,
    "raw.decode()": False,
    "torch.load(path)": True,
    "torch.load(path, weights_only=False)": True,
    "torch.load(path, weights_only=flag)": True,
    "from torch import load as read\nread(path)": True,
    "import torch as t\nt.serialization.load(path)": True,
    "import pickle as p\np.loads(content)": True,
    "from pickle import Unpickler\nUnpickler(file)": True,
    "import marshal\nmarshal.loads(content)": True,
    "import shelve\nshelve.open(path)": True,
    "import dill\ndill.loads(content)": True,
    "from joblib import load\nload(path)": True,
    "import numpy as np\nnp.load(path, allow_pickle=True)": True,
    "import yaml\nyaml.load(text, Loader=yaml.Loader)": True,
    "import yaml\nyaml.unsafe_load(text)": True,
    "eval(text)": True,
    "exec(text)": True,
    "import webdataset as wds\nwds.WebDataset(url).decode()": True,
    "from webdataset import autodecode\nautodecode.Decoder([])": True,
    "dataset.xdecode()": True,
    "import subprocess\nsubprocess.run(text, shell=True)": True,
    "import os\nos.system(text)": True,
    "archive.extractall(folder)": True,
    "model.from_pretrained(folder, trust_remote_code=True)": True,
    "Pipe.from_pretrained(folder, custom_pipeline=folder)": True,
    "import torch\ntorch.hub.load(repository, name)": True,
    "Module.load_from_checkpoint(path)": True,
}
# Rules of the linter, each with what it must find.
RULES = {
    "S102": "exec(text)",
    "S202": "import tarfile\ntarfile.open(path).extractall()",
    "S301": "import pickle\npickle.loads(content)",
    "S302": "import marshal\nmarshal.loads(content)",
    "S307": "eval(text)",
    "S506": "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "S602": "import subprocess\nsubprocess.run(text, shell=True)",
    "S605": "import os\nos.system(text)",
}


@pytest.mark.parametrize(("code", "is_unsafe"), SNIPPETS.items())
def test_unsafe_calls_are_recognised(code, is_unsafe):
    assert bool(unsafe_calls(ast.parse(code))) is is_unsafe


def test_no_code_makes_an_unsafe_call(repository):
    files = [path for package in SOURCES for path in (repository / package).rglob("*.py")]
    assert len(files) > 300
    found = {str(path): unsafe_calls_in(path) for path in [*files, repository / "main.py"]}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_the_linter_finds_them_in_commands_and_benchmarks(repository):
    """The rules are on, and no folder that reads files of users is exempt from them."""
    code = "\n".join(RULES.values()) + "\n"
    for folder in ("segalign", "lightning_modules", "benchmarks"):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise",
             "--stdin-filename", f"{folder}/hostile.py", "-"],
            cwd=repository, input=code, capture_output=True, text=True, check=False,
        )  # fmt: skip
        missed = [rule for rule in RULES if f" {rule} " not in done.stdout]
        assert missed == [], f"{folder}: {missed} in {done.stdout}{done.stderr}"


# Commands on hostile files.


@dataclass
class Orders:
    """Hostile files and the commands to be run on them, in one process under guard.

    Attributes:
        folder: Where the commands may write.
        commands: Name and arguments of each.
        harmless: Names of those that may succeed, since what is hostile is left alone.
    """

    folder: Path
    commands: list[tuple[str, list[str]]] = field(default_factory=list)
    harmless: set[str] = field(default_factory=set)

    @property
    def mark(self) -> Path:
        """What hostile files try to make, outside of the folder."""
        return self.folder.parent / "marks" / "HOSTILE"

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def add(self, name: str, *arguments: object, is_harmless: bool = False) -> None:
        self.commands.append((name, [str(argument) for argument in arguments]))
        if is_harmless:
            self.harmless.add(name)

    def start(self, server, broken: tuple[str, ...] = ()) -> int:
        self.mark.parent.mkdir(exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        orders = {
            "folder": str(self.folder),
            "commands": self.commands,
            "found": str(self.folder / "found.json"),
        }
        path = self.write("orders.json", json.dumps(orders))
        variables = {ORDERS: str(path), "TMPDIR": str(self.folder / "tmp")}
        log = self.folder / "log.txt"
        return server.start(["--help"], log, variables, (*broken, "guarded_commands.run"))

    def check(self) -> None:
        """See that nothing ran, nothing was written elsewhere, and each is refused in a line."""
        assert (self.folder / "found.json").is_file(), (self.folder / "log.txt").read_text()
        found = json.loads((self.folder / "found.json").read_text())
        assert len(found) == len(self.commands)
        reached = {name: events for name, _, _, events, _ in found if events}
        assert reached == {}
        assert list(self.mark.parent.iterdir()) == []
        wrong = {
            name: (code, text[-1500:])
            for name, code, text, *_ in found
            if not _is_refused(code, text) and not (name in self.harmless and code == 0)
        }
        assert wrong == {}


def _is_refused(code: object, text: str) -> bool:
    """Tell whether a command ended as a bad file is answered: one line, and a code of its own."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return code in (65, 78) and len(lines) == 1 and "Traceback" not in text


@pytest.fixture
def orders(tmp_path):
    (tmp_path / "inside").mkdir()
    return Orders(tmp_path / "inside")


def run(server, orders: Orders, broken: tuple = ()) -> None:
    names = tuple(f"{each.__module__}.{each.__name__}" for each in broken)
    orders.start(server, names)
    assert server.wait(seconds=240) == 0, (orders.folder / "log.txt").read_text()[-3000:]
    orders.check()


# Weights.


def order_weights(orders: Orders, seed: int) -> None:
    """Give every reader of weights every hostile file, the later ones a few of them."""
    pickles = list(malicious.pickles(orders.mark))
    for name, content in pickles:
        path = orders.write(f"lora/{name}.pt", content)
        orders.add(f"lora {name}", "import", "lora", path, "--base=tiny", "--out=out")
    for name, content in malicious.safetensors_files():
        path = orders.write(f"lora/{name}.safetensors", content)
        orders.add(f"lora {name}", "import", "lora", path, "--base=tiny", "--out=out")
    adapter = json.dumps({"in_dim": 8, "int_dim": 8, "out_dim": 8})
    scorer = json.dumps(
        {"model_type": "clip", "auto_map": {"AutoModel": "hostile.Model"}, "architectures": ["X"]}
    )
    code = f"import os\nos.mkdir({str(orders.mark)!r})\n"
    for name, content in random.Random(seed).sample(pickles, 8):
        folder = orders.write(f"adapter_{name}/config.json", adapter).parent
        orders.write(f"{folder.name}/diffusion_pytorch_model.bin", content)
        orders.add(f"adapter {name}", "import", "adapter", folder, "--out=out")
        folder = orders.write(f"scorer_{name}/config.json", scorer).parent
        orders.write(f"{folder.name}/pytorch_model.bin", content)
        orders.write(f"{folder.name}/hostile.py", code)
        orders.add(f"scorer {name}", "import", "denscore", folder, "--out=out")
    for name, content in malicious.json_files():
        folder = orders.write(f"adapter_{name}/config.json", content).parent
        orders.add(f"adapter {name}", "import", "adapter", folder, "--out=out")
        folder = orders.write(f"scorer_{name}/config.json", content).parent
        save_file({"x": torch.ones(1)}, folder / "model.safetensors")
        orders.add(f"scorer {name}", "import", "denscore", folder, "--out=out")
    peft = {"auto_mapping": {"base_model_class": "system", "parent_library": "os"},
            "base_model_name_or_path": "../../..", "peft_type": "LORA"}  # fmt: skip
    folder = orders.write("peft/adapter_config.json", json.dumps(peft)).parent
    orders.add("peft folder", "import", "lora", folder, "--base=tiny", "--out=out")
    orders.add("base that is code", "import", "lora", orders.write("x.pt", pickles[0][1]),
               "--base", orders.write("base/unet/config.json", malicious.deep_json()).parents[1],
               "--out=out")  # fmt: skip


def check_weights(server, orders, seed, broken=()):
    order_weights(orders, seed)
    run(server, orders, broken)


def test_weights_run_nothing(server, orders, seed):
    check_weights(server, orders, seed)


def test_a_reader_of_any_pickle_is_caught(server, orders, seed):
    with pytest.raises(AssertionError, match=r"os\.mkdir"):
        check_weights(server, orders, seed, (broken_security.loads_any_pickle,))


# Configs.

# Where a config may name a class; `CLASS` stands for the name.
PLACES = {
    "optimizer": "model: {init_args: {optimizer: {class_path: CLASS, init_args: {lr: 0.1}}}}",
    "schedule": "model: {init_args: {lr_scheduler: {class_path: CLASS}}}",
    "schedule by name": "model: {init_args: {lr_scheduler: CLASS}}",
    "data": "data: {class_path: CLASS}",
    "logger": "trainer: {logger: [{class_path: CLASS, init_args: {args: x}}]}",
    "callback": "trainer: {callbacks: [{class_path: CLASS}]}",
    "callable": "trainer: {callbacks: [{class_path: toy_gadgets.Holder, init_args: {call: CLASS}}"
    "]}",
    "profiler": "trainer: {profiler: {class_path: CLASS}}",
    "plugin": "trainer: {plugins: [{class_path: CLASS}]}",
}
SUBPROCESS = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"


def order_configs(orders: Orders, toy_config: Path, is_whole: bool, seed: int) -> None:
    """Name what no config may name: every class as the model, and a few at every other place.

    All are read by the parser of runs; a few, or all if that is wanted, also by ``fit`` itself.
    """
    packages = ("toy_house", "toy_gadgets")

    def add(name: str, text: str, **more: bool) -> None:
        path = orders.write(f"configs/{name.replace(' ', '_')}.yaml", text)
        given = (f"--config={toy_config}", f"--config={path}", "--run_dir=run",
                 "--trainer.max_steps=1")  # fmt: skip
        orders.add(f"resolve {name}", RESOLVE, ",".join(packages), *given, **more)
        permitted = [f"--allow_import={package}" for package in packages]
        fits.append((name, "fit", *permitted, *given, more))

    fits: list[tuple] = []
    for path in malicious.CLASS_PATHS:
        add(f"model {path}", f"model: {{class_path: {path}, init_args: {{command: x}}}}")
    for place, text in PLACES.items():
        for path in ("os.system", "torch.os.system", "torch.hub.load", SUBPROCESS):
            add(f"{place} {path}", text.replace("CLASS", path))
    started = {
        "class_path": SUBPROCESS,
        "init_args": {"entrypoint": "mkdir", "args": [str(orders.mark)], "env": {},
                      "stdout": None, "stderr": None, "local_rank_id": 0, "numa_options": None},
    }  # fmt: skip
    holder = {"class_path": "toy_gadgets.Holder", "init_args": {"anything": started}}
    add("anything", yaml.safe_dump({"trainer": {"callbacks": [holder]}}), is_harmless=True)
    for name, text in malicious.yaml_files(orders.mark):
        add(f"yaml {name}", text, is_harmless=name == "merge")
    always = {"model torch.os.system", "anything", "yaml apply"}
    chosen = fits if is_whole else [*random.Random(seed).sample(fits, 4)]
    for name, *arguments, more in {one[0]: one for one in [*fits, *chosen]}.values():
        if is_whole or name in always or any(name == one[0] for one in chosen):
            orders.add(name, *arguments, **more)


def check_configs(server, orders, toy_config, is_whole, seed, broken=()):
    order_configs(orders, toy_config, is_whole, seed)
    run(server, orders, broken)


def test_configs_run_nothing(server, orders, toy_config, is_nightly, seed):
    check_configs(server, orders, toy_config, is_nightly, seed)


@pytest.mark.parametrize(
    "broken",
    [
        broken_security.permits_all_classes,
        broken_security.builds_anything,
        broken_security.reads_any_yaml,
    ],
)
def test_configs_are_caught_broken(server, orders, toy_config, broken, seed):
    order_configs(orders, toy_config, False, seed)
    orders.commands = [one for one in orders.commands if one[0] in NEEDED[broken]]
    with pytest.raises(AssertionError):
        run(server, orders, (broken,))


# By which configs each is caught.
NEEDED = {
    broken_security.permits_all_classes: ("resolve schedule by name torch.os.system",),
    broken_security.builds_anything: ("anything",),
    broken_security.reads_any_yaml: ("yaml apply", "resolve yaml apply"),
}


PIPES = (
    "pipe:x",
    " pipe:x",
    "PIPE:x",
    "Pipe:x",
    "{p,P}ipe:x",
    "a.tar::pipe:x",
    "p\nipe:x",
    "\x0bpipe:x",
)


def check_pipes() -> None:
    for url in PIPES:
        try:
            stream_urls(url, allow_pipe=False)
        except ConfigError:
            continue
        raise AssertionError(f"{url!r} would run a shell")


def test_shell_commands_are_no_shards():
    check_pipes()


def test_pipes_by_their_beginning_are_caught(monkeypatch):
    import segalign.data.streaming

    monkeypatch.setattr(segalign.data.streaming, "urlparse", segalign.data.streaming.urlparse)
    broken_security.sees_pipes_by_their_beginning()
    with pytest.raises(AssertionError, match="would run a shell"):
        check_pipes()


# Checkpoints and what else commands read.


@pytest.fixture(scope="module")
def toy_run(server, toy_config, tmp_path_factory):
    """A finished run of the toy."""
    folder = tmp_path_factory.mktemp("toy_run")
    server.start(
        ["fit", "--allow_import=toy_house", f"--config={toy_config}", "--trainer.max_steps=2",
         "--trainer.callbacks=[]", f"--run_dir={folder / 'run'}"],
        folder / "log.txt",
    )  # fmt: skip
    assert server.wait() == 0, (folder / "log.txt").read_text()
    return folder / "run"


def copy_checkpoint(orders: Orders, toy_run: Path, name: str) -> Path:
    target = orders.folder / f"checkpoint_{name}"
    shutil.copytree(newest_checkpoint(toy_run), target)
    return target


def seal(checkpoint: Path, files: object = None, **more: object) -> None:
    """Write the record of a checkpoint's files, as right as it was."""
    files = describe_files(checkpoint) if files is None else files
    (checkpoint / META_FILE).write_text(json.dumps({"format_version": 1, "files": files, **more}))


def hostile_checkpoints(orders: Orders, toy_run: Path):
    """Yield checkpoints of which something is wrong, everything else being right."""
    outside = orders.mark.parent.parent / "outside.safetensors"
    save_file({"secret": torch.ones(3)}, outside)
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()
    record = {"size": outside.stat().st_size, "sha256": digest}
    names = {"parent": "../../outside.safetensors", "absolute": str(outside), "dots": "..",
             "nul": "a\0b", "empty": "", "inner": "x/../../../outside.safetensors"}  # fmt: skip
    for name, value in names.items():
        checkpoint = copy_checkpoint(orders, toy_run, name)
        seal(checkpoint, {**describe_files(checkpoint), value: record})
        yield checkpoint
    for name, files in {
        "a list": [1],
        "bare": {"model.safetensors": 3},
        "no size": {"a": {}},
    }.items():
        checkpoint = copy_checkpoint(orders, toy_run, name.replace(" ", "_"))
        seal(checkpoint, files)
        yield checkpoint
    state = json.loads((newest_checkpoint(toy_run) / STATE_FILE).read_bytes())
    evil = {"class_path": "os.system", "init_args": {"command": f"mkdir {orders.mark}"}}
    states = {
        "tag": {**state, "x": {"$object": ["os.system", "x"]}},
        "tensor": {**state, "x": {"$tensor": ["../../outside", "secret"]}},
        "tensor_shape": {**state, "x": {"$tensor": 7}},
        "config_tag": {**state, "run_config": {"model": {"$evil": 1}}},
        "config_class": {**state, "run_config": {**state["run_config"], "model": evil}},
        "config_text": {**state, "run_config": {"model": "os.system"}},
        "config_deep": json.loads('{"run_config": {"model": ' + '{"a":' * 400 + "1" + "}" * 402),
        "list": [state],
        "step": {**state, "global_step": "x"},
    }
    for name, content in states.items():
        checkpoint = copy_checkpoint(orders, toy_run, name)
        (checkpoint / STATE_FILE).write_text(json.dumps(content))
        seal(checkpoint)
        yield checkpoint
    for name, content in malicious.json_files():
        checkpoint = copy_checkpoint(orders, toy_run, f"meta_{name}")
        (checkpoint / META_FILE).write_bytes(content)
        yield checkpoint
        checkpoint = copy_checkpoint(orders, toy_run, f"state_{name}")
        (checkpoint / STATE_FILE).write_bytes(content)
        seal(checkpoint)
        yield checkpoint


def order_checkpoints(
    orders: Orders, toy_run: Path, toy_config: Path, is_whole: bool, seed: int
) -> None:
    """Load each; go on from a few, or all if that is wanted; make images with each."""
    fits: list[tuple] = []
    start = ("--allow_import=toy_house", f"--config={toy_config}", "--run_dir=resumed",
             "--trainer.callbacks=[]", "--trainer.max_steps=3")  # fmt: skip
    for checkpoint in hostile_checkpoints(orders, toy_run):
        name = checkpoint.name.removeprefix("checkpoint_")
        # What is not needed of a checkpoint cannot stop a command.
        orders.add(f"load {name}", "@segalign.run_format.load_checkpoint", checkpoint,
                   is_harmless=True)  # fmt: skip
        fits.append((f"fit {name}", "fit", *start, "--checkpoint.overwrite=true",
                     f"--ckpt_path={checkpoint}"))  # fmt: skip
        orders.add(f"generate {name}", "generate", f"--checkpoint={checkpoint}", "--prompt=x",
                   "--out=images", "--allow_import=toy_house")  # fmt: skip
    for one in fits if is_whole else random.Random(seed).sample(fits, 4):
        orders.add(*one, is_harmless=True)
    path = orders.write("x.ckpt", dict(malicious.pickles(orders.mark))["in_a_dict"])
    for stage in ("fit", "validate", "test", "predict") if is_whole else ("validate",):
        orders.add(f"{stage} ckpt", stage, *start, f"--ckpt_path={path}")
    for command in ("export", "generate"):
        more = ("--format=lora",) if command == "export" else ("--prompt=x",)
        orders.add(f"{command} ckpt", command, f"--checkpoint={path}", "--out=o", *more)


def check_checkpoints(server, orders, toy_run, toy_config, is_whole, seed, broken=()):
    order_checkpoints(orders, toy_run, toy_config, is_whole, seed)
    run(server, orders, broken)
    check_paths(orders)


def check_paths(orders: Orders) -> None:
    """See that a record of files elsewhere was refused for that alone."""
    found = json.loads((orders.folder / "found.json").read_text())
    texts = {name: text for name, _, text, *_ in found}
    for name in ("parent", "absolute", "dots", "nul", "empty", "inner"):
        assert "no plain file name" in texts[f"load {name}"]


def test_checkpoints_run_nothing_and_stay_in_their_folder(
    server, orders, toy_run, toy_config, is_nightly, seed
):
    check_checkpoints(server, orders, toy_run, toy_config, is_nightly, seed)


def test_names_that_lead_elsewhere_are_caught(server, orders, toy_run, toy_config, seed):
    order_checkpoints(orders, toy_run, toy_config, False, seed)
    orders.commands = [one for one in orders.commands if one[0].startswith("load ")]
    orders.start(server, ("broken_security.joins_any_name",))
    assert server.wait(seconds=240) == 0
    with pytest.raises(AssertionError, match="no plain file name"):
        check_paths(orders)


def order_others(orders: Orders, repository: Path) -> None:
    """Shards, studies, pipelines, results and statistics."""
    for name, content in malicious.tar_files(orders.mark):
        folder = orders.write(f"shards_{name}/a.tar", content).parent
        orders.add(f"index {name}", "shards", "index", folder, is_harmless=True)
        orders.add(f"verify {name}", "shards", "verify", "--decode", folder, is_harmless=True)
    entry = {"name": "../outside.tar", "size": 1, "sha256": "", "num_samples": 1,
             "line_offset": 0, "line_size": 1, "line_crc32": 0}  # fmt: skip
    digest = hashlib.sha256(b"../outside.tar\n\n1\n").hexdigest()
    header = {"format": "segalign-shards", "version": 1, "shards": [entry], "digest": digest}
    folder = orders.write(f"elsewhere/{MANIFEST_NAME}", json.dumps(header) + "\n").parent
    orders.add("verify elsewhere", "shards", "verify", folder)
    for name, content in malicious.json_files():
        folder = orders.write(f"manifest_{name}/{MANIFEST_NAME}", content).parent
        orders.add(f"verify {name}", "shards", "verify", folder)
        orders.add(f"result {name}", "results", orders.write(f"result/{name}.json", content))
        folder = orders.write(f"pipeline_{name}/model_index.json", content).parent
        orders.add(
            f"generate {name}", "generate", f"--checkpoint={folder}", "--prompt=x", "--out=o"
        )
    base = repository / "configs" / "base" / "trainer.yaml"
    for name, text in malicious.yaml_files(orders.mark):
        path = orders.write(f"study_{name}.yaml", text)
        orders.add(f"study {name}", "sweep", "plan", path)
    paths = ("../../HOSTILE", "/etc/HOSTILE", "..", "a/b", "a\0b", "x" * 5000, ".")
    for number, name in enumerate(paths):
        study = orders.write(
            f"named_{number}.yaml", yaml.safe_dump({"name": name, "base": [str(base)]})
        )
        orders.add(f"study named {number}", "sweep", "plan", study)
        orders.add(f"report named {number}", "sweep", "report", study)
    code = f"import os\nos.mkdir({str(orders.mark)!r})\n"
    hostile_parts = (
        {"unet": ["os", "system"]},
        {"unet": ["hostile", "Unet"]},
        {"_class_name": ["hostile", "P"]},
        {"text_encoder": ["builtins", "exec"], "_class_name": "StableDiffusionPipeline"},
    )
    for number, parts in enumerate(hostile_parts):
        index = json.dumps({"_class_name": "StableDiffusionPipeline", **parts})
        folder = orders.write(f"pipeline_{number}/model_index.json", index).parent
        for file in ("hostile.py", "pipeline.py", "unet/hostile.py"):
            orders.write(f"{folder.name}/{file}", code)
        orders.add(
            f"pipeline {number}", "generate", f"--checkpoint={folder}", "--prompt=x", "--out=o"
        )
    for name in ("os.system", "torch.os.system", "segalign.atomic.os.system", "pathlib.Path"):
        orders.add(f"extractor {name}", "stats", "compute", f"--extractor={name}", folder)
    for name, content in malicious.safetensors_files():
        path = orders.write(f"statistics/{name}.safetensors", content)
        orders.add(f"stats {name}", "stats", "show", path)


def check_others(server, orders, repository, broken=()):
    order_others(orders, repository)
    run(server, orders, broken)


def test_other_files_run_nothing(server, orders, repository):
    check_others(server, orders, repository)


@pytest.mark.parametrize("name", ["..", ".", "...", "a/b", "../x", "/x", "a\0b", "x" * 300])
def test_a_study_is_not_named_like_a_path(tmp_path, name):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"name": name, "base": [str(file)]}))
    with pytest.raises(ConfigError, match="expected a name"):
        load_study(file)


BROKEN = (
    broken_security.loads_any_pickle,
    broken_security.permits_all_classes,
    broken_security.builds_anything,
    broken_security.reads_any_yaml,
    broken_security.joins_any_name,
    broken_security.sees_pipes_by_their_beginning,
)
