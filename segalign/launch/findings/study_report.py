"""One page of a study: its table, its plots, and images of all variants side by side.

The page needs no network and refers to nothing outside it. Its script sorts and filters; without
it, the page is whole all the same.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from segalign.atomic import make_directory, write_text_atomic
from segalign.evaluation import page_pictures
from segalign.generation.image_folder import printable
from segalign.launch.findings.ablation import AblationTable
from segalign.launch.findings.report_cells import report_rows
from segalign.launch.findings.report_choice import Comparison, choose_images
from segalign.launch.findings.report_entries import ReportEntries
from segalign.launch.findings.report_pictures import ReportPicture, encode_pictures
from segalign.launch.plan import Plan
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import RunStatus
from segalign.launch.study import Study

TEMPLATE: Final = "study_report.html.jinja"
SCRIPT: Final = "study_report.js"
_BREAKS: Final = re.compile(r"(?<=[_=/])(?=\S)|(?<=\.)(?=[A-Za-z])")
_HERE: Final = Path(__file__).parent
# Characters of all pictures as data; table, scores and script come on top.
_MAX_PICTURES: Final = 4_200_000
_MIN_IMAGES: Final = 800_000


def write_report(
    study: Study,
    plan: Plan,
    observed: Sequence[ObservedRun],
    table: AblationTable,
    plots: Mapping[str, bytes],
    path: Path,
) -> None:
    """Write the page, whole or not at all.

    Args:
        study: The study.
        plan: Its runs.
        observed: How far they are.
        table: Its numbers.
        plots: PNGs by what they show.
        path: The file; its folder is made if it is missing.

    Raises:
        StorageError: If it cannot be written.
    """
    page = render_report(study, plan, observed, table, plots)
    make_directory(path.parent)
    write_text_atomic(path, page)


def render_report(
    study: Study,
    plan: Plan,
    observed: Sequence[ObservedRun],
    table: AblationTable,
    plots: Mapping[str, bytes],
) -> str:
    """Return the page; see `write_report`.

    Returns:
        HTML that holds no text of a caption, a label or an error unescaped.
    """
    environment = Environment(
        loader=FileSystemLoader([_HERE, Path(page_pictures.__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    comparison = choose_images(plan, observed, study.report)
    pictures = _encode(comparison, plots)
    entries = ReportEntries(comparison, table.metrics, pictures, table.base_label)
    text, rows = report_rows(table)
    script = (_HERE / SCRIPT).read_text(encoding="utf-8")
    page = environment.get_template(TEMPLATE).render(
        title=f"Study {study.name}",
        facts=_facts(plan, observed, table),
        text=text,
        rows=rows,
        plots=[{"src": page_pictures.data_uri(png), "alt": alt} for alt, png in plots.items()],
        comparison=comparison,
        with_images=study.report.prompts > 0,
        num_labels=len(plan.labels),
        base=table.base_label,
        reward=entries.reward,
        legend=entries.scales[entries.reward].labels() if entries.reward else (),
        scores=list(entries.score_names.values()),
        entries=entries.all(),
        orders=_orders(table, comparison),
        chosen=_compared(table, comparison),
        # The script is a constant; its digest keeps any other from running.
        script=Markup(script),  # noqa: S704
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return printable(page)


def breakable(label: str) -> Markup:
    """Escape a label, and let lines break after its signs rather than within its words."""
    return Markup("<wbr>").join(_BREAKS.split(label))


def _encode(comparison: Comparison, plots: Mapping[str, bytes]) -> dict[Path, ReportPicture]:
    left = _MAX_PICTURES * 3 // 4 - sum(map(len, plots.values()))
    files = [
        run.images[run.place(shown.caption, number)]
        for shown in comparison.captions
        for number in shown.numbers
        for run in comparison.variants.values()
    ]
    return encode_pictures(files, max(left, _MIN_IMAGES))


def _facts(plan: Plan, observed: Sequence[ObservedRun], table: AblationTable) -> dict[str, str]:
    statuses = {one.run.run_id: one.status for one in observed}
    found = Counter(
        statuses.get(run_id, RunStatus.PENDING)
        for run_id in dict.fromkeys(run.run_id for run in plan.runs)
    )
    others = ", ".join(
        f"{found[status]} {status}"
        for status in RunStatus
        if status != RunStatus.DONE and found[status]
    )
    done = f"{found[RunStatus.DONE]} of {found.total()}"
    return {
        "runs done": f"{done} ({others})" if others else done,
        "variants": str(len(plan.labels)),
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in plan.runs)),
        "base variant": table.base_label,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _orders(table: AblationTable, comparison: Comparison) -> list[dict[str, str]]:
    """List the metrics that variants can be sorted by, with their means by the variant's number."""
    numbers = {label: number for number, label in enumerate(comparison.variants)}
    return [
        {
            "label": metric.label,
            "first": "descending" if metric.mode == "max" else "ascending",
            "values": json.dumps(
                {
                    numbers[row.label]: interval.mean
                    for row in table.rows
                    if row.label in numbers
                    and (interval := row.cells[metric.name].interval) is not None
                    and math.isfinite(interval.mean)
                }
            ),
        }
        for metric in table.metrics
    ]


def _compared(table: AblationTable, comparison: Comparison) -> dict[str, int]:
    """Choose the two variants whose difference captions are sorted by: another, and the base."""
    labels = list(comparison.variants)
    second = labels.index(table.base_label) if table.base_label in labels else 0
    first = next((place for place in range(len(labels)) if place != second), second)
    return {"first": first, "second": second}
