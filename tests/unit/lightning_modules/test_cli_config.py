"""How configs are read: layering, interpolation, refusals. Nothing is instantiated."""

import os
import re

import pytest
import yaml


@pytest.fixture
def resolved(toy_command, tmp_path, capsys):
    """Parse the toy config with more layers and options; returns the resolved config."""

    def parse(*options: str, layers: tuple[str, ...] = (), stage: str = "fit"):
        paths = tuple(tmp_path / f"layer{index}.yaml" for index in range(len(layers)))
        for path, text in zip(paths, layers, strict=True):
            path.write_text(text)
        with pytest.raises(SystemExit) as ended:
            toy_command(stage, *options, "--print_config", configs=paths)
        assert ended.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return parse


@pytest.fixture
def refused(toy_command, tmp_path, capsys):
    """Run the toy config with more layers and options; returns the one line of the refusal."""

    def run(*options: str, layer: str = "{}", stage: str = "fit", code: int = 78) -> str:
        (tmp_path / "layer.yaml").write_text(layer)
        assert toy_command(stage, *options, configs=(tmp_path / "layer.yaml",)) == code
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: ")
        assert [line for line in lines if not line.startswith("Seed set")] == lines[-1:]
        return lines[-1]

    return run


# The four cases of parser mode "omegaconf+", whose default sibling gets each of them wrong.


def test_interpolation_reaches_across_files(resolved):
    config = resolved(
        layers=("vars: {length: 300}", "model: {init_args: {token_length: '${vars.length}'}}")
    )
    assert config["model"]["init_args"]["token_length"] == 300


def test_dependants_follow_a_command_line_override(resolved):
    layer = "vars: {length: 240}\nmodel: {init_args: {token_length: '${vars.length}'}}"
    config = resolved("--vars.length=300", layers=(layer,))
    assert config["model"]["init_args"]["token_length"] == 300
    assert config["vars"] == {"lr": 0.01, "length": 300}


def test_interpolation_works_inside_callback_lists(resolved):
    layer = """
vars: {number: 3, note: early}
trainer:
  callbacks+:
    - class_path: toy_house.Notes
      init_args: {number: "${vars.number}", note: "${vars.note} stop"}
"""
    config = resolved("--vars.number=9", layers=(layer,))
    assert len(config["trainer"]["callbacks"]) == 3
    assert config["trainer"]["callbacks"][-1]["init_args"] == {"note": "early stop", "number": 9}


def test_absolute_paths_and_the_environment_work_under_a_subcommand(resolved):
    os.environ["TOY_ROOT"] = "/somewhere"
    layer = """
data: {init_args: {root: "${oc.env:TOY_ROOT}/shards", seed: "${model.init_args.width}"}}
model: {init_args: {width: 17, token_length: "${data.init_args.seed}"}}
"""
    config = resolved(layers=(layer,), stage="validate")
    assert config["data"]["init_args"] == {
        "root": "/somewhere/shards",
        "seed": 17,
        "val_batches": 2,
    }
    assert config["model"]["init_args"]["token_length"] == 17


def test_layers_go_left_to_right_and_options_last(resolved):
    config = resolved(
        "--trainer.max_steps=5",
        layers=("trainer: {max_steps: 3, log_every_n_steps: 4}", "trainer: {max_steps: 4}"),
    )
    assert config["trainer"]["max_steps"] == 5
    assert config["trainer"]["log_every_n_steps"] == 4
    assert config["trainer"]["use_distributed_sampler"] is False


def test_vars_of_a_later_layer_add_to_the_earlier_ones(resolved):
    config = resolved(
        "--vars.b=5",
        layers=("vars: {a: 1, b: 1, c: {x: 1, y: 1}}", "vars: {b: 2, c: {x: 2}}"),
    )
    assert config["vars"] == {"lr": 0.01, "a": 1, "b": 5, "c": {"x": 2, "y": 1}}


def test_values_keep_their_types(resolved):
    config = resolved(layers=("vars: {lr: 1e-5, list: [1, 2], flag: true, none: null}",))
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-5
    assert config["vars"]["list"] == [1, 2]
    assert config["vars"]["flag"] is True


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "trainer: {max_stepz: 3}",
            r"'trainer.max_stepz' in `.*layer.yaml`; did you mean `trainer.max_steps`\?",
        ),
        ("frobnicate: 3", r"does not accept option 'frobnicate'"),
        ("model: {init_args: {widthh: 3}}", r"`model`.*Option 'widthh' is not accepted"),
        ("model: {init_args: {width: -3}}", r"`width`: Not of type PositiveInt: -3"),
        ("trainer: {max_steps: many}", r"`trainer.max_steps`: Expected a <class 'int'>.*many"),
        (
            "model: {class_path: toy_house.Nope}",
            r"class_path 'toy_house.Nope'.*no attribute 'Nope'",
        ),
        ("model: {class_path: segalign.nowhere.X}", r"class_path 'segalign.nowhere.X'"),
        ("model: {class_path: toy_house.ToyData}", r"`model`.*ToyData"),
        ("model: {class_path: mine.Model}", r"--allow_import mine"),
        ("model: {class_path: os.system, init_args: {command: ls}}", r"could run any code"),
        ("vars: {a: '${vars.nope}'}", r"expected `.*nope` to exist, because `vars.a` refers to it"),
        ("config: other.yaml", r"no `config` key"),
        ("a: [1\nb: 2", r"layer.yaml`, line 2"),
        ("checkpoint: {keep: 0}", r"`checkpoint.keep`: .*PositiveInt"),
        (
            "trainer: {callbacks+: [{class_path: callbacks.ema.EMA, init_args: {decay: 2}}]}",
            r"decay",
        ),
    ],
)
def test_a_bad_config_is_one_line(refused, layer, message):
    line = refused(layer=layer)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_stepz=3"], "did you mean `trainer.max_steps`?"),
        (["--config=nowhere.yaml"], "nowhere.yaml'"),
        (["--ckpt_path=nowhere"], "found nothing at `nowhere`"),
        (["--seed_everything"], "expected one argument"),
        (["--allow_import"], "expected one argument"),
        (["--checkpoint.keep=1"], "`checkpoint.keep` >= 2; got 1"),
    ],
)
def test_bad_options_are_one_line(refused, options, message):
    assert message in refused(*options)


def test_evaluation_on_auto_needs_a_checkpoint(refused):
    line = refused("--ckpt_path=auto", stage="validate")
    assert "expected a checkpoint for `--ckpt_path auto`; found none" in line


def test_an_unwritable_run_directory_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(f"--run_dir={tmp_path}/file/run", code=75)
    assert "file/run`; got: Not a directory" in line


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_unwritable_run_directory_is_one_line_of_evaluation(refused, tmp_path, stage):
    (tmp_path / "file").write_text("")
    (tmp_path / "step-00000001").mkdir()
    options = [f"--run_dir={tmp_path}/file/run", f"--ckpt_path={tmp_path}/step-00000001"]
    assert "file/run`; got: Not a directory" in refused(*options, stage=stage, code=75)


def test_training_without_an_end_is_refused(refused):
    line = refused(layer="trainer: {max_steps: -1, max_epochs: 3}")
    assert "because the training data never end; got neither. Set `trainer.max_steps`." in line


def test_a_package_is_importable_only_with_permission(toy_config, run_dir, capsys):
    import main

    assert main.main(["fit", f"--config={toy_config}", f"--run_dir={run_dir}"]) == 78
    assert "--allow_import toy_house" in capsys.readouterr().err


def test_a_config_cannot_permit_itself_an_import(refused):
    assert "'allow_import'" in refused(layer="allow_import: mine")
