from PIL import Image

from segalign.evaluation.curves import draw_curves, write_curves

HISTORY = {0: {"fid": 3.0, "kid": 0.4}, 10: {"fid": 2.0}, 20: {"fid": 1.0, "kid": 0.1}}


def test_each_value_has_a_plot_of_the_steps_that_know_it():
    figure = draw_curves(HISTORY, ["fid", "kid"])
    plots = {axes.get_title(): axes.lines[0] for axes in figure.axes}
    assert plots.keys() == {"fid", "kid"}
    assert plots["fid"].get_xydata().tolist() == [[0, 3], [10, 2], [20, 1]]
    assert plots["kid"].get_xydata().tolist() == [[0, 0.4], [20, 0.1]]


def test_the_picture_is_a_png(tmp_path):
    write_curves(HISTORY, ["fid"], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
