"""The report: its data against plain NumPy, its ordering on planted structure, its files as a browser sees them."""

import base64
import html.parser
import io
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from rotsparse.data.moments import covariance
from rotsparse.evaluation import baselines
from rotsparse.evaluation.agreement import agreements
from rotsparse.evaluation.compare import compare
from rotsparse.evaluation.tables import CHOSEN
from rotsparse.fit.default_method import default_method
from rotsparse.fit.find_rotations import find_rotations
from rotsparse.layers.mlp import MLP, Dense
from rotsparse.layers.rotations import Rotations
from rotsparse.report import figures
from rotsparse.report.data import picture_data
from rotsparse.report.ordering import diagonal_order
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
    write_report(
        folder, **vars(case), scale_inputs=False, config=config, finding=FINDING, floor=0.25, function_error=1.25e-7
    )
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags with their attributes and all text; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
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
    monkeypatch.setattr("rotsparse.report.data._CHUNK_BYTES", 7 * 4 * 12 * 6)  # seven examples a chunk
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


# --- ordering -----------------------------------------------------------------------------------------------------


def planted(rng, sizes):
    """A permuted block-diagonal matrix with faint noise, and the block of each row and column."""
    in_block = [np.repeat(np.arange(len(sizes)), side) for side in zip(*sizes, strict=True)]
    rows, columns = (rng.permutation(block) for block in in_block)
    return rng.uniform(0.6, 1, (len(rows), len(columns))) * np.where(rows[:, None] == columns, 1, 0.05), rows, columns


def distance_from_diagonal(a):
    """Mean distance of the entries from the diagonal, weighted by their squares; about a third for no structure."""
    i, j = (np.arange(n) / (n - 1) for n in a.shape)
    return np.average(np.abs(i[:, None] - j), weights=np.square(a))


@given(st.integers(0, 10_000), st.lists(st.tuples(st.integers(2, 5), st.integers(0, 3)), min_size=2, max_size=6))
def test_ordering_recovers_planted_blocks(seed, shapes):
    # Blocks are at least as wide as high, so that every row finds a partner in its own block.
    a, rows, columns = planted(np.random.default_rng(seed), [(m, m + extra) for m, extra in shapes])
    for matrix, of_rows, of_columns in ((a, rows, columns), (a.T, columns, rows)):
        row_order, column_order = diagonal_order(matrix)
        assert sorted(row_order) == list(range(len(of_rows)))
        assert sorted(column_order) == list(range(len(of_columns)))
        for blocks in (of_rows[row_order], of_columns[column_order]):
            assert np.count_nonzero(np.diff(blocks)) == len(shapes) - 1, "the rows of a block are not together"
        np.testing.assert_array_equal(
            list(dict.fromkeys(of_rows[row_order])), list(dict.fromkeys(of_columns[column_order]))
        )


def test_ordering_brings_mass_to_the_diagonal(rng):
    a = planted(rng, [(4, 4)] * 10)[0]
    rows, columns = diagonal_order(a)
    assert distance_from_diagonal(a) > 0.3
    assert distance_from_diagonal(a[rows][:, columns]) < 0.06


def test_ordering_puts_strong_pairs_first_and_empty_rows_last(rng):
    a = np.diag([3.0, 0, 5, 4])[rng.permutation(4)]
    rows, columns = diagonal_order(np.vstack([np.zeros((2, 4)), a]))
    ordered = np.vstack([np.zeros((2, 4)), a])[rows][:, columns]
    np.testing.assert_array_equal(np.diag(ordered[:4]), [5, 4, 3, 0])
    assert not ordered[3:].any()


# --- figures ------------------------------------------------------------------------------------------------------


def test_every_figure_is_a_picture_of_the_right_size(folder):
    assert {path.stem for path in (folder / "figures").iterdir()} == FIGURES
    for path in (folder / "figures").iterdir():
        pixels = imread(path)
        assert pixels.shape[1] == 1600, path
        assert 500 < pixels.shape[0] < 4000, path
        assert np.mean(pixels[..., :3].min(axis=-1) < 0.9) > 0.01, f"{path} is blank"
        border = np.concatenate([pixels[[0, -1]].reshape(-1, 4), pixels[:, [0, -1]].reshape(-1, 4)])
        assert (border == 1).all(), f"{path} is cut off at its border"


def test_heat_maps_show_the_ordered_means_on_one_scale(case):
    data = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    images = [image for ax in figures.heat_maps(data, case.comparison).axes for image in ax.get_images()]
    for image, basis in zip(images, ("neurons", "learned"), strict=False):
        rows, columns = diagonal_order(data.mean[basis])
        np.testing.assert_allclose(np.asarray(image.get_array()), data.mean[basis][rows][:, columns])
        assert image.get_clim() == images[0].get_clim()


def test_a_curve_for_every_basis_and_a_line_for_every_restart(case):
    data = picture_data(case.layer, case.x_test, case.bases, scale_inputs=False)
    drawn = [np.asarray(line.get_ydata()) for line in figures.sorted_magnitudes(data, case.comparison).axes[0].lines]
    for name, curve in data.curves.items():
        assert any(len(y) == len(curve) and np.array_equal(y, curve) for y in drawn), name
    lines = figures.history(case.solution, 0.25).axes[0].lines
    course = case.solution.history
    for expected in (*course.objective, *course.checked, [0.25, 0.25]):
        assert any(np.array_equal(line.get_ydata(), expected) for line in lines)


def test_figures_are_the_same_bytes_each_time_and_leave_no_trace(case):
    before = dict(matplotlib.rcParams)
    once, again = (figures.png(figures.metrics(case.comparison)) for _ in range(2))
    assert once == again
    assert dict(matplotlib.rcParams) == before


# --- page ---------------------------------------------------------------------------------------------------------


def test_page_needs_nothing_beside_itself(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    markup = re.sub(r"data:image/png;base64,[\w+/=]+", "", (folder / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import", markup)


def test_page_embeds_the_figures_with_a_text_for_those_who_cannot_see_them(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    embedded = [base64.b64decode(image["src"].split(",", 1)[1]) for image in images]
    files = {name: (folder / "figures" / f"{name}.png").read_bytes() for name in FIGURES - {"overview"}}
    assert sorted(embedded) == sorted(files.values())
    assert all(len(image["alt"]) > 30 for image in images)
    assert all(imread(io.BytesIO(png)).ndim == 3 for png in embedded)


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
        changed = vars(case) | {"solution": solution, "agreement": agreement}
        write_report(tmp_path, **changed, scale_inputs=False, config={}, finding="None.")
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
    write_report(tmp_path, **vars(case) | changed, scale_inputs=True, config={}, finding="None.")
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "standard deviation of its input direction" in text
    for absent in ("restarts agree", "Floor", "Function error", "gap closed"):
        assert absent not in text, absent


def test_a_report_is_not_written_into_a_folder_that_does_not_exist(case, tmp_path):
    with pytest.raises(OSError):
        write_report(tmp_path / "no", **vars(case), scale_inputs=False, config={}, finding="")
    assert not (tmp_path / "no").exists()
