"""The experiments on language models: their parts on planted data, and whole runs at tiny size where their data are."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def experiments_importable(monkeypatch):
    """Experiments are scripts: they import each other from their own folder."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])


def test_interval_resamples_whole_groups():
    import activation_bases

    groups = np.repeat(np.arange(50), 20)
    values = np.random.default_rng(0).standard_normal(50)[groups]  # equal within a group: 50 observations, not 1000
    interval = activation_bases.mean_interval(values, groups, key=jax.random.key(0))
    assert interval.value == pytest.approx(values.mean())
    expected = 2 * 1.96 * values.std() / np.sqrt(50)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.3)
    ratio = activation_bases.mean_interval(3 * values, groups, values, key=jax.random.key(0))
    assert ratio == pytest.approx((3, 3, 3))


def test_missing_data_is_skipped_visibly(tmp_path, capsys):
    import stories260k

    with pytest.raises(SystemExit) as stopped:
        stories260k.main(stories260k.Config(data=tmp_path, out=tmp_path / "out"))
    assert stopped.value.code == 0
    assert "SKIPPED" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "stories260k").exists(), reason=f"there is no {DATA}/stories260k")
def test_stories260k_at_tiny_size(tmp_path, monkeypatch):
    import stories260k

    monkeypatch.setattr(stories260k, "SPARSITIES", (25, 50))
    effort = dataclasses.replace(stories260k.quick(stories260k.Config()).effort, steps=300)
    config = stories260k.Config(
        data=DATA,
        out=tmp_path / "out",
        samples=(24, 6, 6),
        length=128,
        effort=effort,
        jacobian_examples=100,
        jacobian_steps=40,
        controls=1,
    )
    stories260k.main(config)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    half = {method: of["value"] for method, of in metrics["delta_ce"]["model_samples"]["50"].items()}
    assert half["ours"] < half["pca"] < half["none"]
    assert metrics["ours_over_pca"]["model_samples"]["50"]["top_k"]["value"] == pytest.approx(
        half["ours"] / half["pca"]
    )
    assert half["ours_threshold"] < half["none_threshold"]
    assert metrics["cross_entropy"]["real_text"] == pytest.approx(1.266, abs=0.01)  # the trained model, read rightly
    assert len(metrics["jacobians"]) == 5
    assert {"delta_ce.png", "jacobians.png", "report.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
