"""What the documentation shows works: its Python runs as it stands, its commands parse, its links lead somewhere."""

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import rotsparse as rs
from helpers import ROOT, SHARED
from rotsparse.cli import commands
from rotsparse.evaluation.substitution import KeepLargest, substitute
from rotsparse.examples import digits
from rotsparse.layers.files import load_layer

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def run(*blocks: str) -> dict:
    """Run blocks one after the other, and return the names that they define."""
    names: dict = {}
    for block in blocks:
        exec(compile(block, "<documentation>", "exec"), names)
    return names


@pytest.fixture(autouse=True, scope="module")
def network():
    """The digits network, which every example trains, is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train", functools.cache(digits.train))
        yield


@pytest.fixture
def few_steps(monkeypatch):
    """Fits are short, and without the pair searches that follow, where the text says nothing of that."""
    monkeypatch.setitem(rs.find_rotations.__kwdefaults__, "method", rs.Anneal(steps=200))
    few = functools.partial(rs.default_basis_method, steps=200)
    monkeypatch.setattr("rotsparse.fit.find_basis.default_basis_method", few)


def test_the_examples_of_the_readme_run(folder, few_steps, capsys):
    names = run(*blocks("README.md", "python"))
    printed = capsys.readouterr().out
    assert names["solution"].summary() in printed
    assert names["table"].verdict() in printed
    layer = load_layer("mlp.safetensors", names["layer"].activation)
    for name in ("w_in", "b_in", "w_out", "b_out"):
        np.testing.assert_array_equal(getattr(layer, name), getattr(names["layer"], name))
    np.testing.assert_array_equal(np.load("x.npy"), names["x"])


def test_the_recipe_for_sparse_inference_prints_its_figures(capsys):
    recipe, folding, _ = blocks("docs/sparse_inference.md", "python")
    names = run(recipe)
    (shown,) = blocks("docs/sparse_inference.md", "text")
    number = r"\d+\.\d+"
    printed = capsys.readouterr().out
    assert re.sub(number, "#", printed) == re.sub(number, "#", shown)
    figures = [np.array(re.findall(number, text), float) for text in (printed, shown)]
    np.testing.assert_allclose(*figures, rtol=0.15)  # another machine rounds differently, and annealing amplifies that

    exec(folding, names)
    kept = substitute(names["x_test"], names["r"], KeepLargest(32))
    np.testing.assert_allclose(names["y"], names["layer"](kept), atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the experiments' data (stories260K) in ../shared/data")
@pytest.mark.parametrize(("page", "block"), [("docs/models.md", 0), ("docs/sparse_inference.md", 2)])
def test_the_examples_with_a_real_model_run(page, block, folder, few_steps):
    for name, file in {
        "stories260K.bin": "stories260k/stories260K.bin",
        "tok512.bin": "stories260k/tok512.bin",
        "stories.txt": "text/ts_sample.txt",
    }.items():
        Path(name).symlink_to(SHARED / file)
    folded = run(blocks(page, "python")[block])["folded"]
    assert folded.exact_error < 1e-9 * folded.scale


def shown_commands() -> list[str]:
    text = "".join(block for page in sorted(PAGES) for block in blocks(page, "sh")).replace("\\\n", " ")
    return re.findall(r"^(?:srun )?rotsparse (.*)$", text, flags=re.MULTILINE)


def test_the_commands_parse(rotsparse, monkeypatch):
    monkeypatch.setattr(commands, "run", lambda command: 0)
    assert len(shown_commands()) > 5
    for command in shown_commands():
        code, printed = rotsparse(*shlex.split(command, comments=True))
        assert code == 0, f"rotsparse {command}: {printed}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if heading:
            assert heading in anchors(target.read_text()), f"{page} links to {link}"


def anchors(text: str) -> set[str]:
    """The names under which GitHub knows the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
