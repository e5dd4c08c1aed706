"""The report: the figures that were measured, in one page that loads nothing."""

import dataclasses
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from support import small_stage

from cache.errors import StoreError
from pipelines.evaluation import evaluate, figures, report
from pipelines.evaluation.evaluate import Cosine, Evaluation
from pipelines.evaluation.figures import TokenPicture
from pipelines.evaluation.knn import Knn
from pipelines.evaluation.pyramid import StageFigures
from pipelines.evaluation.report import Caches

FOUND = Evaluation(
    step=300,
    knn=Knn(
        label="category",
        k=10,
        bank=1420,
        queries=486,
        pixels=0.59,
        teacher={"near": 0.7, "far": 0.65},
        init=0.51,
        final=0.58,
        p_value=0.0123,
        p_value_pixels=0.7,
    ),
    summary=Cosine(0.03, 0.001, 0.371),
    patches=Cosine(0.37, -0.002, 0.432),
    per_teacher={
        "near": {"summary": Cosine(0.02, 0.0, 0.4), "patches": Cosine(0.3, 0.0, 0.44)},
        "far": {"summary": Cosine(0.04, 0.002, 0.342), "patches": Cosine(0.44, -0.004, 0.424)},
    },
)
PIXEL = "data:image/png;base64,iVBORw0KGgo="
PICTURE = TokenPicture(["1f600"], {"image": [PIXEL], "teacher near": [PIXEL]})
LINES = [
    {
        "step": step,
        "loss/total": 4.0 / step,
        **{
            f"loss/{teacher}/{term}": 1.0 / step
            for teacher in ("near", "far")
            for term in ("summary", "patch_cosine")
        },
    }
    for step in range(1, 60)
] + [{"step": 59, "held_out/cosine_summary": 0.3, "held_out/cosine_patches": 0.4}]


@pytest.fixture
def run(tmp_path):
    return small_stage.recipe(tmp_path)


@pytest.fixture
def page(run):
    summary = report.summarise(run, Caches(1906, 8532, 123_456_789), FOUND, {"caches": 80.04}, {})
    curves = figures.loss_curves(LINES, ("near", "far"))
    return report.render(run, summary, FOUND, curves, PICTURE)


def test_summary_has_what_is_asked_for_and_is_json(run):
    summary = report.summarise(run, Caches(1906, 8532, 123_456_789), FOUND, {"caches": 80.04}, {})
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["images"], summary["rows"], summary["cache_bytes"]) == (1906, 8532, 123_456_789)
    assert summary["seconds"] == {"caches": 80.0}
    assert summary["knn_top1"] == {
        "pixels": 0.59,
        "teacher": {"near": 0.7, "far": 0.65},
        "student_init": 0.51,
        "student_final": 0.58,
        "queries": 486,
        "p_value": 0.0123,
        "p_value_pixels": 0.7,
        "label": "category",
        "k": 10,
    }
    assert summary["cosine"] == {
        "summary": {"baseline": 0.03, "init": 0.001, "final": 0.371},
        "patches": {"baseline": 0.37, "init": -0.002, "final": 0.432},
    }


class Links(HTMLParser):
    """Collects everything a browser would fetch, and whether tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "use", "path", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.fetched += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and tag != "a"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page):
    links = Links()
    links.feed(page)
    assert not links.open
    assert links.fetched
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.fetched)
    assert "<script" not in page
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_page_says_the_figures(page):
    for text in ("58.0 %", "51.0 %", "0.371", "+0.341", "0.432", "+0.062", "p = 0.012", "123.5 MB"):
        assert text in page, text
    assert "The two differ" in page


def test_what_stage_3_adds_is_shown_scale_by_scale(run):
    loss = {"before": 1.0, "after": 0.5}
    stages = {
        "stage2": StageFigures(200, loss, {"96": {"summary": 0.825, "patches": 0.836}}),
        "stage3": StageFigures(500, loss, {"96": {"summary": 0.906, "patches": 0.876}}),
    }
    summary = report.summarise(run, Caches(1, 1, 1), FOUND, {}, stages)
    page = report.render(run, summary, FOUND, "<svg></svg>", PICTURE)
    for text in ("96 px", "0.825", "0.906", "+0.081", "0.836", "0.876", "+0.040"):
        assert text in page, text
    row = report.closing_rows(summary)[-1]
    assert "96 px" in row["figure"]
    assert (row["before"], row["after"]) == ("0.825, 0.836", "0.906, 0.876")


def test_a_difference_that_is_not_shown_is_not_claimed(run):
    shown = replace(FOUND, knn=replace(FOUND.knn, p_value=0.4))
    summary = report.summarise(run, Caches(1, 1, 1), shown, {}, {})
    page = report.render(run, summary, shown, "<svg></svg>", PICTURE)
    assert "No difference can be shown" in page
    assert "The two differ" not in page


def test_without_labels_there_is_a_report_without_knn(run):
    shown = replace(FOUND, knn=None)
    summary = report.summarise(run, Caches(1, 1, 1), shown, {}, {})
    page = report.render(run, summary, shown, "<svg></svg>", PICTURE)
    assert "kNN" not in page
    assert "0.371" in page
    assert all("kNN" not in row["figure"] for row in report.closing_rows(summary))


def test_names_are_escaped(run):
    shown = replace(FOUND, knn=replace(FOUND.knn, label="<b>bold</b>"))
    summary = report.summarise(run, Caches(1, 1, 1), shown, {}, {})
    page = report.render(run, summary, shown, "<svg></svg>", PICTURE)
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


def test_curves_follow_the_colour_of_the_page_and_do_not_change_from_run_to_run():
    svg = figures.loss_curves(LINES, ("near", "far"))
    assert svg == figures.loss_curves(LINES, ("near", "far"))
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert figures.INK not in svg
    for text in ("total loss", "near", "far", "held out, mean"):
        assert f">{text}" in svg, text


def test_curves_of_a_single_line_are_drawn():
    assert figures.loss_curves(LINES[:1], ("near", "far")).startswith("<svg")


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = evaluate.write(tmp_path, FOUND)
    whole = path.read_text()
    synced, does = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), does(handle)))
    evaluate.write(tmp_path, FOUND)
    assert len(synced) == 2  # the file, and after the rename its folder

    def cut(source, target):
        raise OSError("the power went")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(StoreError, match="cannot be written"):
        evaluate.write(tmp_path, replace(FOUND, step=301))
    assert path.read_text() == whole
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e15, "2500.0 TB")]
)
def test_sizes(size, text):
    assert report._size(int(size)) == text


def test_a_student_that_loses_to_raw_pixels_is_said_to(run):
    def said(final: float) -> str:
        knn = dataclasses.replace(FOUND.knn, final=final)
        found = dataclasses.replace(FOUND, knn=knn)
        return report.verdict(report.summarise(run, Caches(1, 1, 1), found, {}, {}))

    assert said(0.58) == (
        "By kNN the student is BELOW raw 16 x 16 pixels: 58.0 % and 59.0 %, p = 0.7"
    )
    assert "is above raw" in said(0.6)
    assert "is level with raw" in said(0.59)
    summary = report.summarise(run, Caches(1, 1, 1), FOUND, {}, {})
    assert "raw pixels 59.0 %" in report.closing_rows(summary)[0]["compare"]
    assert report.verdict({**summary, "knn_top1": None}) == ""
