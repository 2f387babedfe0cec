"""Two runs side by side, from the command line to the report."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from csps.cli import app
from csps.core.errors import ConfigError
from csps.core.plan import Lane
from csps.records.comparison import METRICS, Cell, Metric, best, compare, curve, texts
from csps.records.figures import DRAWINGS, draw_all
from csps.records.rows import REQUESTS_FILE, Status
from csps.records.run import RunKind
from csps.records.spread import floats
from tests.unit.record_rows import RUN, request, step, write_folder

TTFT = next(metric for metric in METRICS if metric.title == "TTFT mean")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A live run at one request per second, one at two, and a simulated one twice as fast."""
    folders = []
    for name, spacing_s, factor in (("csps-1", 1.0, 1.0), ("csps-2", 0.5, 2.0), ("fast", 1.0, 0.5)):
        requests = [
            request(
                f"{name}-{i}", arrival_s=i * spacing_s, sent_s=i * spacing_s,
                prompt_tokens=100 << i, ttft_s=factor * (1 + i), response_s=factor * (1.4 + i),
            )
            for i in range(4)
        ]  # fmt: skip
        steps = [
            step(i, lane=lane, started_s=i, ended_s=i + 1.0)
            for i in range(5)
            for lane in (Lane.PREFILL, Lane.DECODE)
        ]
        kind = RunKind.SIMULATED if name == "fast" else RunKind.LIVE
        run = replace(RUN, name=name, kind=kind, speed=1 / spacing_s)
        folders.append(write_folder(tmp_path / name, run, requests, steps))
    return folders


class Parser(HTMLParser):
    """Tags that were opened and not closed, and what images and links refer to."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_compare_writes_a_report_that_needs_nothing_else(folders: list[Path], tmp_path: Path):
    out, file = tmp_path / "out", tmp_path / "comparison.json"
    words = [
        "compare",
        *map(str, folders),
        "--out",
        str(out),
        "--json",
        str(file),
        "--slo-ttft",
        "2.5",
    ]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert re.search(r"TTFT mean \(s\) +│ +2.5 ×1.00 │ +5 ×2.00 │ +1.25 ×0.50", done.output)

    for drawing in DRAWINGS:
        assert (out / f"{drawing.name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (out / f"{drawing.name}.svg").read_text()
        ElementTree.fromstring(svg)
        assert "(simulated)" in svg
    parser = Parser()
    text = (out / "report.html").read_text()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.sources) == len(DRAWINGS)
    for source in parser.sources:
        kind, content = source.split(";base64,")
        assert kind in ("data:image/png", "data:image/svg+xml")
        assert base64.b64decode(content, validate=True)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    assert "fast (simulated)" in parser.text
    assert "times of a cost model, not of clocks: fast (simulated)" in parser.text

    comparison = json.loads(file.read_text())
    assert comparison == json.loads((out / "comparison.json").read_text())
    assert [one["label"] for one in comparison["runs"]] == ["csps-1", "csps-2", "fast (simulated)"]
    assert comparison["runs"][1]["ratios_to_baseline"]["TTFT mean"] == 2.0
    assert comparison["runs"][0]["summary"]["slo"]["attained_share"] == 0.5


def test_the_same_records_give_the_same_figures(folders: list[Path], tmp_path: Path):
    (tmp_path / "again").mkdir()
    drawn = [draw_all(compare(folders), path) for path in (tmp_path, tmp_path / "again")]
    for one, two in zip(*drawn, strict=True):
        assert one.svg.read_bytes() == two.svg.read_bytes()


def test_one_run_alone_without_steps_and_without_a_token(tmp_path: Path):
    left = request(status=Status.UNFINISHED, ttft_s=None, queue_s=None, gaps_ms=(), output_tokens=0)
    folder = write_folder(tmp_path / "run", RUN, [left])
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "≥ 1.4" in done.output
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "report.html"]


def test_names_from_traces_are_escaped(tmp_path: Path):
    run = replace(RUN, name="<b>[red]", trace="<i>x</i>")
    bad = request(status=Status.FAILED, error="<script>")
    folder = write_folder(tmp_path / "run", run, [request(), bad])
    done = CliRunner().invoke(app, ["compare", str(folder), "--out", str(tmp_path / "out")])
    assert "<b>[red]" in done.output
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<i>x" not in text
    assert "<script" not in text


def test_the_baseline_comes_first(folders: list[Path]):
    comparison = compare(folders, baseline="csps-2")
    assert [one.run.name for one in comparison.runs] == ["csps-2", "csps-1", "fast"]
    cells = dict(comparison.table())[TTFT]
    assert [cell.ratio for cell in cells] == [1.0, 0.5, 0.25]
    with pytest.raises(ConfigError, match="--baseline: no run is called 'x': csps-1, csps-2, fast"):
        compare(folders, baseline="x")


def test_runs_of_one_name_are_called_by_their_folders(tmp_path: Path):
    folders = [write_folder(tmp_path / name, RUN, [request()]) for name in ("a", "b")]
    labels = [one.label for one in compare(folders).runs]
    assert labels == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_differences_between_runs_are_told(folders: list[Path], tmp_path: Path):
    cut = write_folder(
        tmp_path / "cut", replace(RUN, name="cut", interrupted=True, skipped_rows=3), [request()]
    )
    notes = "\n".join(compare([folders[0], cut]).notes)
    assert "differ in num_requests: csps-1: 4, cut: 1" in notes
    assert "cut was interrupted" in notes
    assert "cut: 3 rows of the trace were left out" in notes
    assert compare([folders[0]]).notes == []


def test_a_bad_row_ends_the_comparison_with_its_line(folders: list[Path]):
    with (folders[1] / REQUESTS_FILE).open("a") as file:
        file.write('{"request_id":')
    with pytest.raises(ConfigError, match=r"csps-2/requests\.jsonl: line 5"):
        compare(folders)


def test_the_window_of_the_timeline_is_the_longest_prefill(folders: list[Path]):
    # The last prompt is the longest: sent at 3 s, first step at 3.5 s, first token at 7 s.
    start, stop = compare(folders).runs[0].steps.window or (0, 0)
    assert (start, stop) == (pytest.approx(3.15), pytest.approx(7.35))


def test_a_curve_keeps_its_ends_and_its_order():
    values, shares = curve(floats(range(10_000, 0, -1)), total=20_000)
    assert (values[0], values[-1]) == (1, 10_000)
    assert shares[-1] == 0.5
    assert len(values) < 500
    assert [*values] == sorted(values)
    assert shares[100] == values[100] / 20_000


def test_the_best_is_only_named_where_it_is_known():
    lower, either = Metric("x", "s", True, ("x",)), Metric("x", "s", None, ("x",))
    cells = [Cell(2.0, 1.0, False), Cell(1.0, 0.5, False), Cell(None, None, False)]
    assert best(lower, cells) == {1}
    assert best(lower._replace(lower=False), cells) == {0}
    assert best(either, cells) == set()
    assert best(lower, cells[:1] * 2) == set()
    assert best(lower, [cells[0], Cell(1.0, 0.5, True)]) == set()
    assert texts(Cell(1234.5, 0.05, True)) == ("≥ 1,234", "×0.050")
    assert texts(cells[2]) == ("-", "")
