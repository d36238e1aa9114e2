"""Files of a report hold what was found, and nothing that a spreadsheet would run."""

import csv
import io

from matplotlib.figure import Figure

from segalign.metrics.report_files import Report


def test_names_are_no_formulas_and_numbers_stay_numbers():
    record = {"name": "=cmd|' /C calc'!A0", "value": -0.5, "text": "-1.5", "caption": "-x"}
    report = Report("toy", "facts", [], [record], Figure())
    (row,) = csv.DictReader(io.StringIO(report.to_csv()))
    assert row == {
        "name": "'=cmd|' /C calc'!A0", "value": "-0.5", "text": "-1.5", "caption": "'-x",
    }  # fmt: skip
