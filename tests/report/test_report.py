"""The report: its data against plain NumPy, its figures, its files as a browser sees them."""

import base64
import html.parser
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import rotsparse as rs
from rotsparse._core.intervals import Interval
from rotsparse.data import moments
from rotsparse.data.moments import covariance
from rotsparse.evaluation import baselines
from rotsparse.evaluation.agreement import agreements
from rotsparse.evaluation.compare import Comparison, compare
from rotsparse.evaluation.tables import CHOSEN
from rotsparse.fit.default_method import default_method
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.rotations import Rotations
from rotsparse.report import figures, plot
from rotsparse.report.data import PictureData, picture_data
from rotsparse.report.write import write_report

FIGURES = {"overview", "heat_maps", "examples", "sorted", "curves", "history", "metrics"}
FINDING = "Sparser <b>by far</b> & so on."


@pytest.fixture(scope="module")
def case():
    """A small rectangular layer, fitted for a few steps from two starts."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    layer = MLP(normal(12, 6), normal(12), normal(5, 12))
    x, x_test = normal(40, 6), normal(30, 6)
    key = jax.random.key(0)
    solution = find_rotations(layer, x, key=key, restarts=2, method=default_method(steps=20), scale_inputs=False)
    bases = {"learned": solution.rotations} | baselines.all_baselines(layer, x, key=key)
    comparison = compare(layer, x_test, bases, scale_inputs=False, key=key, resamples=20)
    agreement = agreements(layer, x_test, solution, scale_inputs=False)
    of = {"layer": layer, "x_test": x_test, "bases": bases, "comparison": comparison}
    return SimpleNamespace(**of, solution=solution, agreement=agreement)


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    """A run folder with the report of `case`."""
    folder = tmp_path_factory.mktemp("run")
    config = {"seed": 3, "layer": "<script>alert(1)</script>", "hold": [], "versions": {"jax": "1.2.3"}}
    write_report(folder, **report_arguments(case), config=config, finding=FINDING, floor=0.25, function_error=1.25e-7)
    return folder


def report_arguments(case, *, scale_inputs=False, **changed):
    """The arguments of `write_report` for `case`, with some of its parts exchanged."""
    of = SimpleNamespace(**vars(case) | changed)
    data = picture_data(of.layer, of.x_test, of.bases, scale_inputs=scale_inputs)
    parts = {"comparison": of.comparison, "solution": of.solution, "agreement": of.agreement}
    return {"data": data, "examples": len(of.x_test), "scale_inputs": scale_inputs, **parts}


class Page(html.parser.HTMLParser):
    """Collects tags with their attributes and all text; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale_inputs", "scale_outputs"), [(False, False), (True, False), (True, True)])
def test_picture_data_is_what_numpy_gets_with_all_jacobians_in_memory(case, scale_inputs, scale_outputs):
    sigma = covariance(case.x_test)[1]
    sigma_out = np.cov(np.asarray(case.layer(case.x_test), np.float64).T, bias=True)
    scales = {"scale_inputs": scale_inputs, "scale_outputs": scale_outputs}
    data = picture_data(case.layer, case.x_test, case.bases, **scales, examples=4)
    assert set(data.curves) == set(case.bases)
    for name, rotations in case.bases.items():
        r_in = np.asarray(rotations.r_in, np.float64)
        z = np.asarray(case.layer.jacobian(case.x_test), np.float64)
        z = np.abs(np.asarray(rotations.r_out, np.float64) @ z @ r_in.T)
        if scale_inputs:
            z = z * np.sqrt(np.diag(r_in @ sigma @ r_in.T))
        if scale_outputs:
            z = z / np.sqrt(np.diag(rotations.r_out @ sigma_out @ rotations.r_out.T))[:, None]
        z /= np.sqrt(np.mean(np.square(z)))
        if name in ("neurons", "learned"):
            np.testing.assert_allclose(data.mean[name], z.mean(axis=0), rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(data.examples[name], z[[0, 10, 19, 29]], rtol=2e-3, atol=1e-4)
        ordered = np.sort(z.ravel())[::-1]
        expected = ordered[np.ceil(data.ranks * z.size * (1 - 1e-9)).astype(int) - 1]
        visible = expected > 1e-3
        np.testing.assert_allclose(data.curves[name][visible], expected[visible], rtol=0.02)


def test_curves_show_exact_zeros_as_zero():
    # Row 1 of this ReLU layer is off for every example, row 0 is on.
    layer = Dense(np.eye(2, dtype=np.float32), np.array([5, -5], np.float32))
    x = jax.random.uniform(jax.random.key(0), (7, 2), minval=-1)
    identity = Rotations.identity(2, 2)
    data = picture_data(layer, x, {"neurons": identity, "learned": identity}, scale_inputs=False)
    curve = data.curves["learned"]
    # A quarter of the entries is 1 (twice the rms), the others are 0.
    np.testing.assert_allclose(curve[data.ranks <= 0.25], 2, rtol=0.01)
    assert (curve[data.ranks > 0.25] == 0).all()


def test_memory_is_a_chunk_and_so_is_the_result(case, monkeypatch):
    whole = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    monkeypatch.setattr(moments, "CHUNK_BYTES", 7 * 4 * 12 * 6)  # seven examples a chunk
    parts = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    for name in whole.mean:
        np.testing.assert_allclose(parts.mean[name], whole.mean[name], rtol=1e-5)
    for name, curve in whole.curves.items():
        np.testing.assert_allclose(parts.curves[name], curve, rtol=0.02)


def test_bases_without_neurons_or_learned_are_refused(case):
    for missing in ("neurons", "learned"):
        bases = {name: r for name, r in case.bases.items() if name != missing}
        with pytest.raises(ValueError, match=r"neurons.*learned"):
            picture_data(case.layer, case.x_test, bases, scale_inputs=False)


# --- order --------------------------------------------------------------------------------------------------------


def test_the_order_by_influence_draws_no_diagonal_into_noise():
    """A rule that pairs rows with columns does: half of the mass of its noise comes close to the diagonal."""
    noise = np.abs(np.random.default_rng(0).standard_normal((60, 60)))
    rows, columns = plot.by_influence(noise)
    assert sorted(rows) == sorted(columns) == list(range(60))
    ordered = noise[rows][:, columns]
    assert (np.diff(np.square(ordered).sum(axis=1)) <= 0).all() and (np.diff(np.square(ordered).sum(axis=0)) <= 0).all()
    band = np.abs(np.subtract.outer(np.arange(60), np.arange(60))) < 3
    assert abs(ordered[band].mean() / ordered.mean() - 1) < 0.1


def test_what_is_stored_of_the_pictures_is_what_was_drawn(case, tmp_path):
    data = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    data.save(tmp_path / "pictures.npz")
    again = PictureData.load(tmp_path / "pictures.npz")
    for name in ("mean", "examples", "curves"):
        before, after = getattr(data, name), getattr(again, name)
        assert before.keys() == after.keys()
        for basis in before:
            np.testing.assert_allclose(after[basis], before[basis], rtol=1e-6)
    for broken in ({"ranks": data.ranks}, {"x": np.zeros(3)}):
        (tmp_path / "pictures.npz").unlink()
        np.savez(tmp_path / "pictures.npz", **broken)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="holds no pictures"):
            PictureData.load(tmp_path / "pictures.npz")


def test_a_comparison_is_read_as_it_was_written(case):
    made = case.comparison
    again = Comparison.from_json(json.loads(json.dumps(made.to_json())))
    assert again.metrics == made.metrics and again.concentration == made.concentration and again.curves == made.curves


# --- figures ------------------------------------------------------------------------------------------------------


def test_every_figure_is_a_picture_of_the_right_size(folder):
    kinds = {"png", "svg", "pdf"}
    written = {path.name for path in (folder / "figures").iterdir()}
    assert written == {f"{name}.{kind}" for name in FIGURES for kind in kinds}
    for path in (folder / "figures").glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")
    for path in (folder / "figures").glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        fills = re.findall(r"fill: #ffffff", path.read_text())
        assert root.tag.endswith("svg") and not fills, "transparent"
    for path in (folder / "figures").glob("*.png"):
        pixels = imread(path)
        assert pixels.shape[1] == 1600, path
        assert 500 < pixels.shape[0] < 4000, path
        assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 0.01, f"{path} is blank"
        border = np.concatenate([pixels[[0, -1]].reshape(-1, 4), pixels[:, [0, -1]].reshape(-1, 4)])
        assert (border == 1).all(), f"{path} is cut off at its border"


@pytest.mark.parametrize("theme", [plot.LIGHT, plot.DARK], ids=["light", "dark"])
def test_heat_maps_show_the_means_on_one_scale_with_the_numbers_of_directions(case, theme):
    data = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    axes = [ax for ax in figures.heat_maps(data, case.comparison, theme).axes if ax.get_images()]
    for ax, basis in zip(axes, ("neurons", "learned"), strict=False):
        (image,) = ax.get_images()
        natural = tuple(np.arange(n) for n in data.mean[basis].shape)
        rows, columns = plot.by_influence(data.mean[basis]) if basis == "neurons" else natural
        np.testing.assert_allclose(np.asarray(image.get_array()), data.mean[basis][rows][:, columns])
        assert image.get_clim() == axes[0].get_images()[0].get_clim()
        assert [t.get_text() for t in ax.get_yticklabels()] == [str(n) for n in rows]
        assert [t.get_text() for t in ax.get_xticklabels()] == [str(n) for n in columns]


def colours(ax):
    return [line.get_color() for line in ax.lines if len(line.get_xdata()) > 2]


def test_a_curve_for_every_basis_and_a_line_for_every_restart(case):
    data = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    ax = figures.sorted_magnitudes(data, case.comparison).axes[0]
    drawn = [np.asarray(line.get_ydata()) for line in ax.lines]
    for name, curve in data.curves.items():
        assert any(len(y) == len(curve) and np.array_equal(y, curve) for y in drawn), name
    lines = figures.history(case.solution, 0.25).axes[0].lines
    course = case.solution.history
    for expected in (*course.objective, *course.checked, [0.25, 0.25]):
        assert any(np.array_equal(line.get_ydata(), expected) for line in lines)


def test_no_colour_stands_for_two_bases(case):
    """Grey does: it says that a curve is none of those that are named."""
    data = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    for ax in (figures.sorted_magnitudes(data, case.comparison).axes[0], *figures.curves(case.comparison).axes):
        named = [colour for colour in colours(ax) if colour != plot.LIGHT.pale]
        assert sorted(named) == sorted({plot.LIGHT.ink, plot.LIGHT.learned, plot.LIGHT.rival})
    best = plot.best_rival(list(case.bases), case.comparison)
    shares = {basis: of["fraction_below_0.1_rms"].value for basis, of in case.comparison.metrics.items()}
    assert shares[best] == max(share for basis, share in shares.items() if basis not in ("neurons", "learned"))


@pytest.mark.parametrize(("values", "scale"), [([1, 5, 19], "linear"), ([1, 5, 21], "log"), ([0, 5, 50], "linear")])
def test_an_axis_is_logarithmic_where_values_span_decades(values, scale):
    bases = ("learned", "neurons", "pca")
    of = Comparison({b: {"edges_99": Interval(v, v, v)} for b, v in zip(bases, values, strict=True)})
    ax = Figure().subplots()
    plot.metric(ax, of, "edges_99")
    assert ax.get_xscale() == scale and ("logarithmic" in ax.texts[0].get_text()) == (scale == "log")
    low, high = ax.get_xlim()
    assert low <= min(values) and max(values) <= high


def test_the_history_begins_where_its_values_do(case):
    ax = figures.history(case.solution).axes[0]
    course = np.concatenate([case.solution.history.objective.ravel(), case.solution.history.checked.ravel()])
    low, high = ax.get_ylim()
    assert low <= course.min() and course.max() <= high and low > course.min() - 0.1 * (course.max() - course.min())


def test_the_public_functions_draw_on_any_axes(case):
    data = rs.plot.picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    axes = Figure(figsize=(8, 8)).subplots(2, 3).flat
    rs.plot.matrix(axes[0], data.mean["learned"])
    rs.plot.sorted_magnitudes(axes[1], data)
    rs.plot.small_entries(axes[2], case.comparison)
    rs.plot.energy(axes[3], case.comparison, theme=rs.plot.DARK)
    rs.plot.history(axes[4], case.solution)
    rs.plot.metric(axes[5], case.comparison, "hoyer")
    assert all(ax.has_data() for ax in axes)
    with pytest.raises(AttributeError, match="no attribute 'plots'"):
        _ = rs.plots  # type: ignore[attr-defined]


def test_figures_are_the_same_bytes_each_time_and_leave_no_trace(case):
    before = dict(matplotlib.rcParams)
    for kind in (figures.png, figures.svg, figures.pdf):
        once, again = (kind(figures.history(case.solution)) for _ in range(2))
        assert once == again
    assert dict(matplotlib.rcParams) == before


# --- page ---------------------------------------------------------------------------------------------------------


def test_page_needs_nothing_beside_itself(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, name)
    markup = re.sub(r"data:image/png;base64,[\w+/=]+", "", (folder / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\((?!#)|@import", markup)


def test_page_embeds_the_figures_with_a_text_for_those_who_cannot_see_them(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    embedded = [base64.b64decode(image["src"].split(",", 1)[1]) for image in images]
    matrices = {name: (folder / "figures" / f"{name}.png").read_bytes() for name in ("heat_maps", "examples")}
    assert sorted(embedded) == sorted(matrices.values())
    dark = [base64.b64decode(of["srcset"].split(",", 1)[1]) for tag, of in page.tags if tag == "source"]
    assert len(dark) == 2
    for png in dark:
        pixels = imread(io.BytesIO(png))
        assert (pixels[0, :, 3] == 0).all(), "transparent at the border"
    lines = [attributes for tag, attributes in page.tags if tag == "div" and attributes.get("class") == "drawn"]
    assert len(lines) == len(FIGURES) - 3 and text.count("<svg") == len(lines)
    assert "var(--figure-learned)" in text and plot.LIGHT.learned not in text.split("</style>", 1)[1]
    assert all(len(of.get("alt") or of.get("aria-label")) > 30 for of in (*images, *lines))


def test_the_page_leads_to_the_directions_and_shows_their_graph(case, tmp_path):
    hostile = "</figcaption><script>alert(1)</script>"
    arguments = report_arguments(case)
    graph = '<svg class="graph"></svg>', hostile
    write_report(tmp_path, **arguments, config={}, finding="F", graph=graph, directions="directions.html")
    text = (tmp_path / "report.html").read_text()
    assert 'href="directions.html"' in text and "Which directions move which" in text and "<script" not in text
    assert text.index("Which directions") < text.index("<table"), "the graph comes before the tables"


def test_page_escapes_what_it_is_given(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>by far" not in text
    page = Page(text)
    assert FINDING in page.text
    assert "<script>alert(1)</script>" in page.text


def test_page_says_what_was_measured(case, folder):
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    for basis, of in case.comparison.metrics.items():
        assert f"{of['hoyer'].value:.3f}{of['hoyer'].low:.3f} to {of['hoyer'].high:.3f}" in text, basis
        assert f"{of['edges_99'].value:.0f}" in text, basis
        assert "".join(f"{share:.0%}" for share in case.comparison.concentration[basis]) in text, basis
    assert case.solution.result.value in text
    assert f"{case.solution.value:.4g} at the end" in text
    assert "1.2e-07" in text and f"{case.solution.rotations.orthogonality_error():.2e}" in text
    for cosines in case.solution.agreement().values():
        again = np.count_nonzero(cosines.min(axis=0) > 0.99)
        assert f"{again} of {cosines.shape[1]} fitted directions found again; mean |cos| {cosines.mean():.2f}" in text
    for of in case.agreement.values():
        assert of.sentence() in text
    assert "1.2.3" in text


def test_page_marks_the_best_basis_of_every_metric(case, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    first, second = re.findall(r'<table class="metrics">.*?</table>', text, re.DOTALL)
    metrics = list(case.comparison.metrics["learned"])
    for body, names, further in ((first, [m for m in metrics if m in CHOSEN], 4), (second, metrics, 0)):
        rows = [re.findall(r"<td( class=\"best\")?>", row) for row in body.split("<tr")[2:]]
        marked = [[basis for basis, row in zip(case.bases, rows, strict=True) if row[i]] for i in range(len(rows[0]))]
        assert marked == [[case.comparison.best(metric)] for metric in names] + [[]] * further


def test_agreement_is_that_of_the_fitted_directions(case, tmp_path):
    """Not of the directions outside of an active subspace, nor of a side that is held: those agree in any case."""
    for restricted in ({"active_subspace": 0.6}, {"hold": ("out",)}):
        fit: dict = {"restarts": 2, "method": default_method(steps=5), "scale_inputs": False, **restricted}
        solution = find_rotations(case.layer, case.x_test, key=jax.random.key(1), **fit)
        agreement = agreements(case.layer, case.x_test, solution, scale_inputs=False)
        arguments = report_arguments(case, solution=solution, agreement=agreement)
        write_report(tmp_path, **arguments, config={}, finding="None.")
        text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
        sides = {side: mask for side, mask in solution.free.items() if mask.any()}
        assert "in" in sides and sum(mask.sum() for mask in sides.values()) < 11
        for side, mask in sides.items():
            mean = solution.agreement()[side][:, mask].mean()
            assert f"of {mask.sum()} fitted directions found again; mean |cos| {mean:.2f}" in text
        assert text.count("directions found again") == len(sides)


def test_report_of_a_single_start_with_scaled_inputs(case, tmp_path):
    solution = find_rotations(case.layer, case.x_test, key=jax.random.key(1), method=default_method(steps=5))
    bases = {"learned": solution.rotations, "neurons": case.bases["neurons"]}
    comparison = compare(case.layer, case.x_test, bases, scale_inputs=True, key=jax.random.key(0), resamples=20)
    agreement = agreements(case.layer, case.x_test, solution)
    changed = {"bases": bases, "comparison": comparison, "solution": solution, "agreement": agreement}
    arguments = report_arguments(case, scale_inputs=True, **changed)
    write_report(tmp_path, **arguments, config={}, finding="None.")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "standard deviation of its input direction" in text
    for absent in ("restarts agree", "Floor", "Function error", "gap closed"):
        assert absent not in text, absent


def test_a_report_is_not_written_into_a_folder_that_does_not_exist(case, tmp_path):
    with pytest.raises(OSError):
        write_report(tmp_path / "no", **report_arguments(case), config={}, finding="")
    assert not (tmp_path / "no").exists()
