"""The report: the figures that were measured, in one page that loads nothing."""

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from support import small_stage

from cache.errors import StoreError
from eupe.paired import Interval, share_interval
from pipelines.evaluation import evaluate, figures, pages, report, tables
from pipelines.evaluation.encoders import PROBES, Judged
from pipelines.evaluation.evaluate import Agreement, Cosine, Evaluation
from pipelines.evaluation.figures import TokenPicture
from pipelines.evaluation.pyramid import StageFigures
from pipelines.evaluation.report import Caches

RIGHT = {  # encoder -> resolution, share of 100 images by every probe
    "pixels": (16, 59),
    "near": (128, 70),
    "far": (160, 65),
    "student_init": (96, 51),
    "student_init@64": (64, 50),
    "student_final": (96, 58),
    "student_final@64": (64, 55),
}


def judged(resolution: int, right: int) -> Judged:
    correct = np.arange(100) < right
    return Judged(
        resolution=resolution,
        probes={probe: share_interval(correct) for probe in PROBES},
        correct={probe: correct for probe in PROBES},
        regularisation=0.01,
        converged=True,
        neighbours={"near": Interval(0.31, 0.29, 0.33)},
        cka={"near": 0.62},
    )


def evaluation(**right: int) -> Evaluation:
    """Return an evaluation of a student of two teachers; `right` changes how often one is."""
    encoders = {name: judged(side, right.get(name, share)) for name, (side, share) in RIGHT.items()}
    return Evaluation(
        step=300,
        student="student_final",
        initial="student_init",
        label="category",
        k=10,
        bank=1420,
        query_ids=[str(number) for number in range(100)],
        encoders=encoders,
        versus={
            probe: {
                short: evaluate.versus(
                    encoders["student_final"].correct[probe][None],
                    encoders[other].correct[probe][None],
                )
                for short, other in (("pixels", "pixels"), ("init", "student_init"))
            }
            for probe in PROBES
        },
        agreement={
            "stage2": Agreement(
                cosine(0.03, 0.001, 0.371), cosine(0.37, -0.002, 0.432), PER_TEACHER
            )
        },
    )


def cosine(baseline: float, init: float, final: float) -> Cosine:
    return Cosine(baseline, init, final, final - 0.013, final + 0.013)


PER_TEACHER = {
    "near": {"summary": cosine(0.02, 0.0, 0.4), "patches": cosine(0.3, 0.0, 0.44)},
    "far": {"summary": cosine(0.04, 0.002, 0.342), "patches": cosine(0.44, -0.004, 0.424)},
}
FOUND = evaluation()
UNLABELLED = replace(
    FOUND,
    label=None,
    versus={},
    encoders={name: replace(each, probes={}, correct={}) for name, each in FOUND.encoders.items()},
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
    return report.render(run, summary, FOUND, curves, figures.dot_plot(summary), PICTURE)


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
        "queries": 100,
        "p_value": pytest.approx(2 / 2**7),
        "p_value_pixels": 1.0,
        "label": "category",
        "k": 10,
    }
    assert [*summary["encoders"]] == [*RIGHT]
    pixels = summary["encoders"]["pixels"]
    assert pixels["knn_cosine"] == {"value": 0.59, "low": 0.49, "high": 0.69}
    assert pixels["linear"] == pixels["knn_paper"] | {"regularisation": 0.01, "converged": True}
    assert summary["versus"]["linear"]["init"]["difference"]["value"] == pytest.approx(0.07)
    assert summary["cosine"]["summary"] == {
        "baseline": 0.03,
        "init": 0.001,
        "final": 0.371,
        "low": pytest.approx(0.358),
        "high": pytest.approx(0.384),
    }
    assert summary["agreement"]["stage2"]["near"]["patches"]["final"] == 0.44


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
    for text in ("58.0 %", "51.0 %", "0.371", "+0.341", "0.432", "+0.062", "p = 0.016", "123.5 MB"):
        assert text in page, text
    assert "The two differ" in page


def test_every_encoder_stands_in_the_table_and_in_the_plot(run, page):
    summary = report.summarise(run, Caches(1, 1, 1), FOUND, {}, {})
    rows = tables.encoder_rows(summary)
    assert [(row["encoder"], row["px"]) for row in rows] == [
        ("raw pixels", "16"),
        ("expert near", "128"),
        ("expert far", "160"),
        ("student before", "96"),
        ("student before", "64"),
        ("student after stage2", "96"),
        ("student after stage2", "64"),
    ]
    assert rows[5]["linear probe"] == "58.0 (48.0 to 68.0)"
    assert rows[5]["near near"] == "31.0 %, 0.62"
    for row in rows:
        assert page.count(f"{row['encoder']}, {row['px']} px") == 1  # of the plot
        for value in row.values():
            assert f">{value}</td>" in page
    assert figures.dot_plot(summary) == figures.dot_plot(summary)


def test_stage_1_and_every_teacher_have_their_figures(run):
    first = Agreement(cosine(0.1, 0.0, 0.285), cosine(0.4, 0.0, 0.5), PER_TEACHER)
    found = replace(FOUND, agreement={"stage1": first, **FOUND.agreement})
    summary = report.summarise(run, Caches(1, 1, 1), found, {}, {})
    rows = tables.closing_rows(summary)
    assert [row["figure"] for row in rows[:2]] == [
        "stage1: cosine to near's summary, held out",
        "stage1: cosine to near's patches, held out",
    ]
    assert rows[0] | {"figure": ""} == {
        "figure": "",
        "before": "0.000",
        "after": "0.400",
        "compare": "ignoring the image 0.020",
    }
    page = report.render(run, summary, found, "<svg></svg>", "", PICTURE)
    assert "<td>stage1</td><td>far</td><td>patches</td>" in page


def test_what_stage_3_adds_is_shown_scale_by_scale(run):
    loss = {"before": 1.0, "after": 0.5}
    stages = {
        "stage2": StageFigures(200, loss, {"96": {"summary": 0.825, "patches": 0.836}}),
        "stage3": StageFigures(
            500,
            loss,
            {"96": {"summary": 0.906, "patches": 0.876}},
            {"64": {"96": {"summary": 0.711, "patches": 0.722}}},
        ),
    }
    summary = report.summarise(run, Caches(1, 1, 1), FOUND, {}, stages)
    page = report.render(run, summary, FOUND, "<svg></svg>", "", PICTURE)
    for text in (
        "96 px",
        "0.825",
        "0.906",
        "+0.081",
        "0.836",
        "0.876",
        "+0.040",
        "proxy at 96 px",
        "0.711, 0.722",
    ):
        assert text in page, text
    row = tables.closing_rows(summary)[-1]
    assert "96 px" in row["figure"]
    assert (row["before"], row["after"]) == ("0.825, 0.836", "0.906, 0.876")


def test_a_difference_that_is_not_shown_is_not_claimed(run):
    shown = evaluation(student_init=57)
    summary = report.summarise(run, Caches(1, 1, 1), shown, {}, {})
    page = report.render(run, summary, shown, "<svg></svg>", "", PICTURE)
    assert "No difference can be shown" in page
    assert "The two differ" not in page


def test_without_labels_there_is_a_report_without_probes(run):
    summary = report.summarise(run, Caches(1, 1, 1), UNLABELLED, {}, {})
    dots = figures.dot_plot(summary)
    assert dots == ""
    page = report.render(run, summary, UNLABELLED, "<svg></svg>", dots, PICTURE)
    assert "kNN" not in page
    assert "0.371" in page
    assert tables.encoder_rows(summary)[0] == {
        "encoder": "raw pixels",
        "px": "16",
        "near near": "31.0 %, 0.62",
    }
    assert tables.verdicts(summary) == []


def test_names_are_escaped(run):
    shown = replace(FOUND, label="<b>bold</b>")
    summary = report.summarise(run, Caches(1, 1, 1), shown, {}, {})
    page = report.render(run, summary, shown, "<svg></svg>", "", PICTURE)
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


def test_a_file_that_cannot_be_replaced_stays_as_it_was(run, monkeypatch):
    path = evaluate.write(run, FOUND)
    whole = path.read_text()
    synced, does = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), does(handle)))
    evaluate.write(run, FOUND)
    assert len(synced) == 4  # each of two files, and after its rename its folder

    def cut(source, target):
        raise OSError("the power went")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(StoreError, match="cannot be written"):
        evaluate.write(run, replace(FOUND, step=301))
    assert path.read_text() == whole
    left = {file.name for file in run.directory.rglob("*") if file.is_file()}
    assert left == {path.name, evaluate.CORRECT_FILE}


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e15, "2500.0 TB")]
)
def test_sizes(size, text):
    assert pages.size(int(size)) == text


@pytest.mark.slow
def test_a_student_that_loses_to_what_is_trivial_is_said_to(run):
    def said(**right: int) -> list[str]:
        return tables.verdicts(report.summarise(run, Caches(1, 1, 1), evaluation(**right), {}, {}))

    assert said()[0] == (
        "By kNN (paper) the student is BELOW raw 16 x 16 pixels: 58.0 % and 59.0 %, p = 1"
    )
    assert len(said()) == 2 * len(PROBES)
    assert "By linear probe the student is above its own initialisation: 58.0 %" in said()[-1]
    assert "linear probe the student is BELOW its own" in said(student_init=64)[-1]
    assert "is above raw" in said(student_final=60)[0]
    assert "is level with raw" in said(student_final=59)[0]
    summary = report.summarise(run, Caches(1, 1, 1), evaluation(), {}, {})
    page = report.render(run, summary, FOUND, "<svg></svg>", "", PICTURE)
    assert "<strong>Below raw 16 x 16 pixels: 59.0 %</strong>" in page
