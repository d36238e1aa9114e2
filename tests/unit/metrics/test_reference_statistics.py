import pytest
import torch
from safetensors.torch import save_file
from toy_features import toy_features

from segalign.errors import DataError
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.reference_statistics import ReferenceStatistics

ROWS = toy_features(30, 6)
PROTOCOL = {"extractor": {"name": "toy", "layer": "2048"}, "images": {"count": 30, "size": None}}


def reference(rows=ROWS, protocol=PROTOCOL):
    return ReferenceStatistics(FeatureStatistics.of(ROWS), rows, protocol)


@pytest.mark.parametrize("rows", [ROWS, None])
def test_a_file_brings_it_back(tmp_path, rows):
    reference(rows).save(tmp_path / "real.safetensors")
    again = ReferenceStatistics.load(tmp_path / "real.safetensors")
    assert again.protocol == PROTOCOL
    assert torch.equal(again.statistics.product_sum, reference().statistics.product_sum)
    assert again.rows is None if rows is None else torch.equal(again.rows, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["real.safetensors"]


def test_the_same_statistics_make_the_same_file(tmp_path):
    for name in ("a", "b"):
        reference().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_extractor_is_refused():
    reference().check({"layer": "2048", "name": "toy"})
    with pytest.raises(DataError, match='`layer` is "2048" in one and "768" in the other'):
        reference().check({"name": "toy", "layer": "768"})


def test_rows_must_fit():
    with pytest.raises(DataError, match=r"float32 of shape \(30, 6\); got .*\(29, 6\)"):
        reference(ROWS[1:])
    with pytest.raises(DataError, match="float32 of shape"):
        reference(ROWS.double())
    with pytest.raises(DataError, match="`extractor` in the protocol"):
        reference(protocol={"images": {}})


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "real.safetensors"
    with pytest.raises(DataError, match=r"got no such file; make them with `main\.py stats`"):
        ReferenceStatistics.load(path)
    reference().save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="got a damaged file"):
        ReferenceStatistics.load(path)
    save_file({"rows": ROWS}, path)
    with pytest.raises(DataError, match="got a file without a protocol"):
        ReferenceStatistics.load(path)
    save_file({"rows": ROWS}, path, metadata={"protocol": "[1"})
    with pytest.raises(DataError, match="got a damaged file"):
        ReferenceStatistics.load(path)
