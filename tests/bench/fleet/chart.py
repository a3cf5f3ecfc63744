"""The chart of a run as SVG: for each scenario, how long the slowest twentieth waited for a first token."""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from tests.bench.fleet.figures import ALL
from tests.bench.fleet.goals import FAIRNESS, PROCESSOR, Results
from tests.bench.fleet.report import shown

ROW, LEFT, LONGEST, WIDTH = 22, 130, 330, 760
COLUMNS = {"tokens/s": 590, "loads": 660, "cached": 730}
OURS, THEIRS = "#1f6feb", "#8b949e"
STYLE = """<style>text{font:13px sans-serif;fill:#1f2328}.title{font-weight:bold}.light{fill:#59636e}.page{fill:#ffffff}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.light{fill:#9198a1}.page{fill:#0d1117}}</style>"""


def svg(results: Results) -> str:
    scenarios = [name for name in results.scenarios() if name not in (FAIRNESS, PROCESSOR)]
    parts, y = [], 34
    for scenario in scenarios:
        parts += [*_panel(results, scenario, y)]
        y += 62 + ROW * len(results.subjects(scenario))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">'
    title = _text(10, 20, "Wait for the first token, 95th percentile, in the scenario's seconds (less is better)", "title")
    return "\n".join([head, STYLE, '<rect class="page" width="100%" height="100%"/>', title, *parts, "</svg>"]) + "\n"


def _panel(results: Results, scenario: str, top: int) -> Iterator[str]:
    subjects = results.subjects(scenario)
    waits = {subject: results.median(scenario, subject, "groups", ALL, "ttft_p95") or 0.0 for subject in subjects}
    longest = max(waits.values(), default=0.0) or 1.0
    yield _text(10, top + 18, scenario, "title")
    for name, x in COLUMNS.items():
        yield _text(x, top + 18, name, "light", "end")
    for number, subject in enumerate(subjects):
        y = top + 28 + ROW * number
        length = LONGEST * waits[subject] / longest
        colour = OURS if subject.startswith("gateway-fast") else THEIRS
        yield _text(LEFT - 8, y + 13, subject, "", "end")
        yield f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 6}" rx="2" fill="{colour}"/>'
        yield _text(LEFT + length + 6, y + 13, f"{shown(waits[subject], 1)} s")
        cells = (
            shown(results.median(scenario, subject, "groups", ALL, "tokens_s"), 0),
            shown(results.median(scenario, subject, "fleet", "loads"), 0),
            shown((results.median(scenario, subject, "fleet", "cached") or 0) * 100, 0) + " %",
        )
        for x, cell in zip(COLUMNS.values(), cells, strict=True):
            yield _text(x, y + 13, cell, "", "end")


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'
