import pytest

from lightning_modules.config_checks import check_config_files, locate_key
from segalign.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "c.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("content", ["{}", "model: {a: 1}", "trainer: {config: 3}"])
def test_ordinary_files_pass(config, content):
    check_config_files([config(content)], ["model.init_args.seed"])


def test_a_config_key_is_refused(config):
    with pytest.raises(ConfigError, match=r"no `config` key in `.*c\.yaml`"):
        check_config_files([config("config: other.yaml\nmodel: {a: 1}")], [])


def test_a_value_on_a_link_target_is_refused(config):
    path = config("model: {init_args: {seed: 3}}")
    with pytest.raises(ConfigError, match=r"`model\.init_args\.seed` not to be set"):
        check_config_files([path], ["model.init_args.seed"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 3", r"c\.yaml`, line 2; got: expected ',' or '\]'"),
        ("", r"expected settings in `.*c\.yaml`.*got nothing"),
        ("- a", r"got list"),
        (b"\xff\xfe\x00", r"expected UTF-8 YAML in `.*c\.yaml`"),
    ],
)
def test_unreadable_files_are_one_line(config, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_config_files([config(content)], [])
    assert "\n" not in str(caught.value)


def test_the_last_file_that_sets_a_key_is_found(tmp_path):
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml")]
    for path, text in zip(paths, ["x: {y: 1}", "x: {y: 2}", "x: {z: 1}"], strict=True):
        path.write_text(text)
    assert locate_key(paths, "x.y") == paths[1]
    assert locate_key(paths, "x.nope") is None
