"""Labels in any script are drawn where a font has them, and told of once where none has."""

import io
import warnings

import pytest
from fontTools.ttLib import TTFont
from matplotlib.font_manager import FontProperties, findfont, fontManager
from toy_results import metric, scored_study

from segalign.launch import showing
from segalign.launch.findings import plot_fonts
from segalign.launch.findings.ablation_numbers import make_table
from segalign.launch.findings.plot_fonts import choose_fonts, missing_line
from segalign.launch.findings.study_plots import draw_study

RARE = "字"


@pytest.fixture(autouse=True)
def _few_fonts(monkeypatch):
    """Have no fonts but those that come with matplotlib."""
    own = [entry for entry in fontManager.ttflist if entry.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", own)
    plot_fonts._choose.cache_clear()
    yield
    plot_fonts._choose.cache_clear()


@pytest.fixture
def rare_font(tmp_path):
    """A font with a character that others lack; returns its name."""
    font = TTFont(findfont(FontProperties(family="DejaVu Sans")))
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[ord(RARE)] = "A"
    for record in font["name"].names:
        if record.nameID in (1, 4, 16):
            record.string = "Rare Toy"
    font.save(tmp_path / "rare.ttf")
    fontManager.addfont(tmp_path / "rare.ttf")
    return "Rare Toy"


def test_the_usual_characters_need_one_font():
    assert choose_fonts(["learning rate λ ↑\n$"]) == plot_fonts.ChosenFonts(("DejaVu Sans",))


def test_a_font_that_has_a_character_is_taken(rare_font):
    fonts = choose_fonts([f"a{RARE}"])
    assert (fonts.families, fonts.missing) == (("DejaVu Sans", rare_font), "")
    assert missing_line(fonts) == ""


def test_a_character_that_no_font_has_is_told():
    fonts = choose_fonts([RARE, "a", RARE])
    assert fonts.missing == RARE
    assert f"plots show boxes for `{RARE}`" in missing_line(fonts)


def rare_study(folder):
    return scored_study(folder, {f"k={RARE}": [0.5]}, metrics=(metric("val/score"),))


def test_plots_warn_of_nothing(tmp_path):
    a_study, plan, observed = rare_study(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots = draw_study(a_study, plan, make_table(a_study, plan, observed), observed)
        assert plots["curves"].to_bytes("png").startswith(b"\x89PNG")


def test_labels_are_drawn_with_the_font_that_has_them(tmp_path, rare_font):
    a_study, plan, observed = rare_study(tmp_path)
    plots = draw_study(a_study, plan, make_table(a_study, plan, observed), observed)
    figure = plots["curves"].figure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")


def test_what_is_missing_is_said_once(tmp_path, capsys, monkeypatch):
    a_study, plan, observed = rare_study(tmp_path)
    monkeypatch.setattr(showing, "look", lambda study: (plan, observed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        showing.write_plots(a_study, "png")
    assert capsys.readouterr().out.count("plots show boxes") == 1
