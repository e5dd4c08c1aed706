"""The example: a sweep's table is read, and drawn over the bits that its codecs take."""

import importlib.util
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("bits_curve", ROOT / "examples/bits_curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(stores):
    """Return figures as `results.parquet` has them: two seeds, a point better a store."""
    rows = [
        {"store": store, "seed": seed, "encoder": encoder, "metric": metric, "value": value}
        for number, store in enumerate(stores)
        for seed in (0, 1)
        for metric in ("knn_paper", "knn_cosine", "linear")
        for encoder, value in (
            ("pixels", 0.5),
            ("efficientnet_lite0", 0.7),
            ("efficientnet_lite2", 0.75),
            ("student_final", 0.6 + 0.01 * number + 0.002 * seed),
        )
    ]
    return pl.DataFrame(rows)


def test_a_setting_is_the_mean_of_its_seeds_and_their_spread(example):
    found = example.of(table(["float16", "rot4"]), "student_final", "linear")
    assert found["store"].to_list() == ["float16", "rot4"]
    assert found["mean"].to_list() == pytest.approx([60.1, 61.1])
    assert found["low"].to_list() == pytest.approx([60.0, 61.0])
    assert found["high"].to_list() == pytest.approx([60.2, 61.2])


def test_bits_are_all_told(example):
    assert example.bits("float16") == 16
    assert 4 < example.bits("rot4") < 4.25
    assert example.bits("grid1") <= 1


@pytest.mark.parametrize(
    "stores",
    [["float16", "int8", "rot4", "grid1", "float16_1_view", "rot4_4_views"], ["float16", "rot4"]],
)
def test_the_figure_is_written(example, tmp_path, monkeypatch, stores):
    table(stores).write_parquet(tmp_path / "results.parquet")
    words = ["bits_curve.py", str(tmp_path / "results.parquet"), str(tmp_path / "bits.png")]
    monkeypatch.setattr("sys.argv", words)
    assert example.main() == 0
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
