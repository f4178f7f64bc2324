"""The experiments: their parts on planted data, and whole runs at tiny size where their data are."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import rotsparse as rs
from helpers import ROOT, SHARED, random_orthogonal
from rotsparse._core.intervals import Interval
from rotsparse.engine.solution import Result
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.verdict import SHARE, structure

INTERRUPTED = Result.INTERRUPTED


@pytest.fixture(autouse=True)
def experiments_importable(monkeypatch):
    """Experiments are scripts: they import each other from their own folder."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), str(ROOT / "benchmarks"), *sys.path])


def test_interval_resamples_whole_groups():
    import _activation_bases

    groups = np.repeat(np.arange(50), 20)
    values = np.random.default_rng(0).standard_normal(50)[groups]  # equal within a group: 50 observations, not 1000
    interval = _activation_bases.mean_interval(values, groups, key=jax.random.key(0))
    assert interval.value == pytest.approx(values.mean())
    expected = 2 * 1.96 * values.std() / np.sqrt(50)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.3)
    ratio = _activation_bases.mean_interval(3 * values, groups, values, key=jax.random.key(0))
    assert ratio == pytest.approx((3, 3, 3))


def test_missing_data_is_skipped_visibly(tmp_path, capsys):
    import stories260k

    with pytest.raises(SystemExit) as stopped:
        stories260k.main(stories260k.Config(data=tmp_path, out=tmp_path / "out"))
    assert stopped.value.code == 0
    assert "SKIPPED" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    import x_squared

    monkeypatch.setattr(x_squared, "train", lambda *_: pytest.fail("computed before the folder was there"))
    (tmp_path / "out").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not a run folder"):
            x_squared.main(x_squared.Config(out=tmp_path / "out", overwrite=overwrite))
    (tmp_path / "out" / "status.json").write_text('{"state": "complete"}')
    with pytest.raises(ValueError, match="exists"):
        x_squared.main(x_squared.Config(out=tmp_path / "out"))


def test_what_a_script_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    import _results
    import x_squared

    (tmp_path / "out").mkdir()
    for start in (x_squared._common.start, _results.start):
        monkeypatch.setattr(sys, "argv", ["x_squared.py", "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stopped:
            start(x_squared.main, x_squared.Config)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "not a run folder" in line


def test_an_experiment_writes_a_whole_run_folder_and_the_quick_form_its_own(tmp_path, monkeypatch):
    import _common

    monkeypatch.chdir(tmp_path)
    for config in (_common.Options(seed=3), _common.Options(seed=4, quick=True)):
        with _common.run("name", config) as run:
            run.finish({"found": 1}, "# Report\n", drawn=Figure())
    full, quick = (tmp_path / "runs/experiments" / name for name in ("name", "name-quick"))
    assert {path.name for path in full.iterdir()} >= {"config.json", "metrics.json", "report.md", "drawn.png"}
    metrics = json.loads((full / "metrics.json").read_text())
    assert (metrics["found"], metrics["config"]["seed"]) == (1, 3)
    assert metrics["versions"]["jax"] == jax.__version__
    assert {"commit", "cores", "device", "began"} <= metrics.keys()
    assert json.loads((quick / "config.json").read_text())["quick"]
    with pytest.raises(ValueError, match="exists"), _common.run("name", _common.Options()):
        pass
    with _common.run("name", _common.Options(overwrite=True)) as run:
        run.finish({"found": 2}, "")
    assert json.loads((full / "metrics.json").read_text())["found"] == 2


def test_an_interrupted_fit_is_no_result(tmp_path, monkeypatch):
    import x_squared

    find_rotations = rs.find_rotations
    monkeypatch.setattr(
        rs, "find_rotations", lambda *args, **kw: dataclasses.replace(find_rotations(*args, **kw), result=INTERRUPTED)
    )
    config = x_squared.Config(
        out=tmp_path / "out", networks=1, width=4, training_steps=5, points=16, steps=5, restarts=1
    )
    with pytest.raises(KeyboardInterrupt):
        x_squared.main(config)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The options of a benchmark."""

    quick: bool = False
    seeds: int = 3
    out: Path | None = None


def test_results_of_another_form_are_not_replaced(tmp_path):
    from _results import Results, read

    out = tmp_path / "new" / "robustness.json"
    Results(Benchmark(out=out)).write([1])
    Results(Benchmark(out=out)).write([2])
    content = read(out)
    assert (content["results"], content["form"], content["config"]["seeds"]) == ([2], "full", 3)
    for other, form in {Benchmark(quick=True, out=out): "quick", Benchmark(seeds=2, out=out): "full, seeds=2"}.items():
        with pytest.raises(ValueError, match=f"not '{form}'"):
            Results(other)
    out.write_text("[1]")
    with pytest.raises(ValueError, match="was not written by rotsparse: move it away"):
        Results(Benchmark(out=out))
    Results(Benchmark()).write([1])  # nowhere


def test_the_summary_names_forms_machines_and_commits(tmp_path, monkeypatch):
    import _provenance
    import summary
    from _results import Results

    cell = {"cell": "clean", "errors": {"rotsparse": [0.1, 0.3], "FastICA": [0.5], "picard": [0.4]}}
    row = {"d": 32, "loop_s": 2.0, "vmap_s": 1.0}
    monkeypatch.setattr(_provenance, "commit", lambda: "a" * 40)
    Results(Benchmark(out=tmp_path / "robustness.json")).write([cell])
    monkeypatch.setattr(_provenance, "commit", lambda: "b" * 40 + "-dirty")
    Results(Benchmark(quick=True, out=tmp_path / "layers_at_once.json")).write([row])
    text = summary.table(tmp_path)
    assert "| error, clean, % | 0.2 | 0.4 (picard) | ε by held-out examples | full |" in text
    assert "| twelve layers, d = 32: seconds | 2.00 (loop) | 1.00 (vmap) | 0.50× | quick |" in text
    assert "commits aaaaaaaaaa, bbbbbbbbbb with uncommitted changes;" in text
    assert f"jax {jax.__version__}" in text
    assert f"{_provenance.cores()} CPU cores" in text
    with pytest.raises(ValueError, match="no results"):
        summary.table(tmp_path / "elsewhere")


def test_every_benchmark_has_rows_in_the_summary():
    import summary

    scripts = {p.stem for p in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert {benchmark.__name__ for benchmark in summary.BENCHMARKS} == scripts - {
        "summary",
        "pca",
        "nulls",
        "units",
        "finite_moves",
        "constructed",
        "width",
        "accelerator",
        "cold_start",
        "decode",
    }  # these have tables of their own


def test_constructed_layers_are_what_they_say_and_rules_decide():
    import constructed

    config = constructed.Config(d=8, examples=(100, 50))
    for kind, make in {**constructed.NOTHING, **constructed.STRUCTURE}.items():
        problem = make(np.random.default_rng(0), config)
        assert problem.layer(jnp.asarray(problem.test)).shape == (len(problem.test), problem.layer.d_out)
        assert (problem.oracle is not None) == (kind in constructed.STRUCTURE)
    exact = constructed.STRUCTURE["block, planted"](np.random.default_rng(0), config)
    assert exact.oracle is not None
    turned = [constructed.figures(exact.layer, exact.train, exact.test, r) for r in (
        exact.oracle, rs.Rotations.haar(jax.random.key(0), 8, 8))]  # fmt: skip
    assert all(turned[0][name][0] > turned[1][name][0] for name in turned[0])

    def case(learned, *draws):
        figures = [dict.fromkeys(turned[0], (share, 0.001)) for share in (learned, *draws)]
        return constructed.Case("", True, figures[0], figures[0], {"random weights": figures[1:]})

    for rule in constructed.RULES.values():
        assert rule(case(0.5, 0.2, 0.21, 0.22)) and not rule(case(0.21, 0.2, 0.21, 0.22))
    table = constructed.rules_table([case(0.5, 0.2, 0.21, 0.22), case(0.2, 0.2, 0.21, 0.22)])
    assert table.count("50.0% (1 of 2)") == len(constructed.RULES)


def test_blocks_of_layers_are_their_composition(x64, rng):
    import mnist

    widths = (7, 6, 5, 3)
    kinds = ("relu", "gelu", "identity")
    block = mnist.Block(
        rs.Dense(rng.standard_normal((o, i)), rng.standard_normal(o), activation=kind)
        for i, o, kind in zip(widths[:-1], widths[1:], kinds, strict=True)
    )
    x = jnp.asarray(rng.standard_normal((4, 7)))
    r = rs.Rotations.haar(jax.random.key(0), 7, 3)
    r_in, r_out = (jnp.asarray(np.linalg.qr(np.asarray(side, np.float64))[0]) for side in (r.r_in, r.r_out))
    expected = jnp.einsum("po,noi,qi->npq", r_out, jax.vmap(jax.jacfwd(block))(x), r_in)
    np.testing.assert_allclose(block.jacobian(x, r_in, r_out), expected, atol=1e-12)
    np.testing.assert_allclose(block.jacobian(x), jax.vmap(jax.jacfwd(block))(x), atol=1e-12)
    np.testing.assert_allclose(block.rotate(r_in, r_out)(x @ r_in.T), block(x) @ r_out.T, atol=1e-12)


def test_experiments_say_what_the_command_line_says(rng):
    from _verdict import judged

    layer = rs.Dense(rng.standard_normal((5, 4)).astype(np.float32), activation="tanh")
    train, test = np.split(rng.standard_normal((160, 4)).astype(np.float32), [100])
    solution = rs.find_rotations(layer, train, key=jax.random.key(0), restarts=2, method=rs.Anneal(steps=20))
    bases = {"learned": solution.rotations, "neurons": rs.baselines.neurons(layer, train)}
    comparison = rs.compare(layer, test, bases, key=jax.random.key(1))
    of = judged(layer, train, test, solution, comparison, key=jax.random.key(2))
    control = Control.from_json(of["control"])
    assert structure(control).headline() in of["verdict"]
    assert of["short_fit"]["value"] == control.learned[SHARE].value
    assert of["strictest_null"]["value"] == np.mean([draw[SHARE].value for draw in control.nulls[of["strictest"]]])
    assert of["reproduced"].keys() == {"in", "out"} and "found again" in of["agreement"]


@pytest.mark.parametrize("name", ["block", "single layer"])
def test_planted_jacobians_are_sparse_in_the_planted_basis_only(name):
    import planted

    config = planted.Config(n=16, examples=20)
    of = planted.block(config, seed=1) if name == "block" else planted.single_layer(config, 16, seed=1)
    z = of.layer.jacobian(jnp.asarray(of.x), jnp.asarray(of.truth.r_in), jnp.asarray(of.truth.r_out))
    zeros = np.mean(np.abs(z) < 1e-5)
    hidden = np.mean(np.abs(of.layer.jacobian(jnp.asarray(of.x), None, jnp.asarray(of.truth.r_out))) < 1e-5)
    assert zeros > 0.5
    assert hidden < zeros - 0.2


def test_the_table_of_the_benchmark_says_who_is_ahead():
    import pca

    def network(learned, rival):
        metrics = {"learned": learned, "pca": (0.1, 0.1, 0.2), "neurons": (0.2, 0.2, 0.2), "ica": rival}
        share = {name: {pca.SHARE: Interval(*m)._asdict()} for name, m in metrics.items()}
        return {"metrics": share, "control": None}

    networks = {"a": network((0.5, 0.4, 0.6), (0.3, 0.2, 0.39)), "b": network((0.5, 0.4, 0.6), (0.45, 0.4, 0.5))}
    ahead, within = pca.tables(networks, (pca.SHARE,)).splitlines()[2:]
    assert ahead.startswith("| a | **0.500** ±0.100 | 0.100 ±0.050 | ica 0.300")
    assert within.startswith("| b | 0.500 ±0.100 |")  # not bold: the intervals overlap


def test_generated_tables_replace_what_is_between_the_markers_and_nothing_else(tmp_path):
    from _publish import publish

    file = tmp_path / "results.md"
    file.write_text("before\n<!-- pca:begin -->\nold\n<!-- pca:end -->\nafter\n")
    for text in ("one\n", "two\n"):
        publish(file, "pca", text)
    assert file.read_text() == "before\n<!-- pca:begin -->\n\ntwo\n\n<!-- pca:end -->\nafter\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    file.write_text("nothing here")
    with pytest.raises(ValueError, match="no markers"):
        publish(file, "pca", "three")
    (tmp_path / "link.md").symlink_to(file)
    with pytest.raises(ValueError, match="symbolic link"):
        publish(tmp_path / "link.md", "pca", "four")


def test_networks_whose_files_are_missing_say_where_to_get_them(tmp_path):
    from _networks import Missing, cases

    found = dict(cases(tmp_path, tmp_path / "minilm"))
    for name in ("MNIST, hidden 1 → logits (raw)", "modular addition 0, MLP and skip", "stories260K, MLP 0"):
        with pytest.raises(Missing, match=r"not found\. The"):
            found[name]()


@pytest.mark.skipif(not (SHARED / "modular_addition").exists(), reason=f"there is no {SHARED}/modular_addition")
def test_whitened_inputs_leave_the_network_as_it_is():
    import _modular_addition as addition

    network = addition.Network(SHARED / "modular_addition/seed1.safetensors", 0)
    frame = addition.frames(network, 0.999)["mid"]
    whitened = network.with_whitened_inputs(frame)
    few = network.test[:500]
    before, after = (of.layers["ln2"](of.inputs["ln2"][few]) for of in (network, whitened))
    np.testing.assert_allclose(after, before, atol=1e-3)
    z = np.asarray(whitened.inputs["ln2"])[network.train][:, : frame.active]
    np.testing.assert_allclose(np.cov(z.T), np.eye(frame.active), atol=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "stories260k").exists(), reason=f"there is no {SHARED}/stories260k")
def test_stories260k_at_tiny_size(tmp_path, monkeypatch):
    import stories260k

    monkeypatch.setattr(stories260k, "SPARSITIES", (25, 50))
    effort = dataclasses.replace(stories260k.quick(stories260k.Config()).effort, steps=300)
    config = stories260k.Config(
        data=SHARED,
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


def test_labels_of_a_text_and_the_lead_over_the_twins():
    import probing

    words = ["Once", " a", "b", '"', "\n", "."]
    tokens = np.array([[0, 1, 2, 3, 1, 3, 4, 5], [1, 2, 2, 3, 0, 5, 4, 1]])
    labels = {name: of.reshape(2, 8).astype(int).tolist() for name, of in probing.text_labels(tokens, words, 1).items()}
    assert labels["begins a word"] == [[0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    assert labels["part of a word"] == [[1, 0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0, 0]]
    assert labels["capital"] == [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]
    assert labels["inside quotes"] == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert labels["first line"] == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert labels["is ' a'"] == [[0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    assert labels["is behind ' a'"] == [[0, 0, 1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]

    of = {"x": [0.9, 0.95, 1.0], "y": [0.7, 0.8, 0.9]}
    lower = {"x": [0.8, 0.8, 0.8], "y": [0.5, 0.5, 0.5]}
    table = {name: of if name == "learned" else lower for name in ("learned", "neurons", "pca", "ica", "varimax")}
    table |= {"twin 0": of, "twin 1": lower, "haar 0": lower, "haar 1": lower}
    found = probing.summary(table)
    assert found["areas"]["learned"] == pytest.approx([0.8, 0.875, 0.95])
    assert found["areas"]["twin"] == pytest.approx([0.725, 0.7625, 0.8])
    assert found["lead"] == pytest.approx([0.075, 0.1125, 0.15])
    assert "| layer 4 | in | 2 |" in probing.report({"layer 4": {"in": found}})

    rates = {name: np.full((2, 4), 0.3) for name in table} | {"learned": np.array([[1.0, 0.5, 0.5, 0.5], [0.5] * 4])}
    rates["twin 0"] = np.full((2, 4), 0.5)
    intruders = probing.intruder_summary(rates)
    assert intruders["rates"]["learned"] == pytest.approx(0.5625)
    assert intruders["rates"]["twin"] == pytest.approx(0.4) and intruders["rates"]["haar"] == pytest.approx(0.3)
    assert intruders["leads"]["twin"] == pytest.approx((0.1625, 0.0625))
    report = probing.report({"layer 4": {"in": found | {"intruders": {"token": intruders}}}})
    assert "| layer 4 | in | token | 0.562 |" in report and "+0.263 ±0.062 |" in report


def test_rows_measures_both_bases_on_own_and_on_other_tokens(rng):
    import rows

    turn = random_orthogonal(rng, 8).astype(np.float32)
    x, other = (rng.laplace(size=(n, 8)).astype(np.float32) ** 3 @ turn for n in (400, 200))
    config = rows.Config(steps=40)
    results = [rows.of_rows(x[:n], other, config) for n in (30, 400)]
    for r in results:
        assert r["steps"] == 40 and r["lost"]["neurons"][0] > 0
        assert r["lost"]["ours"][0] < r["lost"]["neurons"][0]
    assert results[1]["lost"]["ours"][1] < results[1]["lost"]["neurons"][1]
    lines = rows.report(results, config).splitlines()
    assert len(lines) == 8 and lines[4].startswith("| 30 |") and lines[5].startswith("| 400 |")
    assert rows.figure(results).axes[0].get_xlabel() == "tokens that the basis comes from"


def test_dropping_compares_what_bases_are_fitted_to(rng, tmp_path):
    import dropping

    from tiny_models import tiny

    tokens = rng.integers(0, 31, (40, 16))
    config = dropping.Config(layers=(0, 1), tokens=480, fisher_tokens=64, steps=30)
    rows = dropping.compared(tiny("llama"), tokens[:30], tokens[30:], config, tmp_path)
    assert {(r["basis"], r["fitted"]) for r in rows} == {
        ("neurons", "none"),
        ("principal components", "none"),
        *(("learned", metric) for metric in dropping.METRICS),
        (dropping.ORACLE, "fisher"),
        (dropping.ORACLE + dropping.IN_METRIC, "fisher"),
        *((of + dropping.IN_METRIC, m) for of in (dropping.COMPONENTS, dropping.LEARNED) for m in ("output", "fisher")),
    }
    assert len(rows) == 15 and all(r["divergence"] > 0 for r in rows)
    lines = dropping.report(rows, config).splitlines()
    assert len(lines) == 19 and sum(line.endswith("| 1.00 |") for line in lines) == 1
    assert dropping.figure(rows).axes[0].get_xlabel() == "divergence, nats a token"
