"""What the documentation shows works: every Python and shell block of every page runs, every link leads somewhere."""

import functools
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import rotsparse as rs
from helpers import ROOT, SHARED
from rotsparse.evaluation.substitution import KeepLargest, substitute
from rotsparse.examples import addition, digits
from rotsparse.layers.files import load_layer, save_layer

FILES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted(FILES)}
needs_stories = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the experiments' data (stories260K) in ../shared/data"
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

# What a block may be: code that is executed here, or text that is not code.
LANGUAGES = {"python", "sh", "text", "json"}

# Pages with a test of their own below, because they need data, several processes or a batch system.
APART = {"docs/models.md", "docs/sparse_inference.md", "docs/many_devices.md", "docs/elsewhere.md"}

STEPS = 20


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in that language."""
    return [block for name, block in FENCE.findall(PAGES[page]) if name == language]


def shortened(text: str) -> str:
    """Code with at most `STEPS` steps in place of every larger number that the text shows."""
    return re.sub(r"(steps[= ])(\d[\d_]*)", lambda m: m[1] + str(min(STEPS, int(m[2]))), text)


def execute(block: str, names: dict) -> None:
    """Run a block, which may use and define names."""
    exec(compile(shortened(block), "<documentation>", "exec"), names)


@pytest.fixture(autouse=True, scope="module")
def network():
    """The networks that the examples train are trained once, the one that adds for a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train", functools.cache(digits.train))
        patch.setattr(addition, "train", functools.cache(functools.partial(addition.train, steps=300)))
        yield


@pytest.fixture
def few_steps(monkeypatch):
    """Fits without a method take few steps, and pair searches are left out."""
    monkeypatch.setattr(rs.Refine, "after", lambda self, problem, solution, **_: solution)
    monkeypatch.setitem(inspect.unwrap(rs.find_rotations).__kwdefaults__, "method", rs.Anneal(steps=STEPS))
    few = functools.partial(rs.default_basis_method, steps=STEPS)
    monkeypatch.setattr("rotsparse.fit.find_basis.default_basis_method", few)


@pytest.fixture
def shell(rotsparse, folder):
    """A function that runs a shell block, line by line. Commands of rotsparse run in this process and must succeed."""
    network = digits.train()
    first, second, _ = network.layers
    save_layer(folder / "mlp.safetensors", rs.MLP(first.w, first.b, second.w, second.b))
    np.save("x.npy", network.train)

    def run(block: str) -> None:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            program, *arguments = words
            if program == "rotsparse":
                if arguments[0] in ("fit", "fit-model", "benchmark", "demo") and "--steps" not in arguments:
                    arguments += ["--steps", str(STEPS)]
                if arguments[0] in ("fit", "fit-model"):
                    arguments += ["--control", "none"]
                code, printed = rotsparse(*shlex.split(shortened(shlex.join(arguments))))
                assert code == 0, f"{line}: {printed}"
            elif program == "make":
                made = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
                assert made.returncode == 0, f"{line}: {made.stderr}"
            elif program == "pip":
                for extra in re.findall(r"\[(.*?)\]", line):
                    assert extra in PROJECT["optional-dependencies"], f"{line}: there is no extra {extra}"
            else:
                pytest.fail(f"no test knows how to run {line!r}")

    return run


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_block_says_what_it_is(page):
    assert {language for language, _ in FENCE.findall(PAGES[page])} <= LANGUAGES
    assert PAGES[page].count("```") % 2 == 0


@pytest.mark.parametrize(
    "page", [page for page in sorted(PAGES) if page not in APART and (blocks(page, "python") or blocks(page, "sh"))]
)
def test_the_blocks_of_a_page_run_one_after_the_other(page, few_steps, shell):
    names: dict = {}
    for language, block in FENCE.findall(PAGES[page]):
        if language == "python":
            execute(block, names)
        elif language == "sh" and not block.startswith("#!"):  # those have a test of their own
            shell(block)


def test_the_example_of_the_readme_prints_and_saves_what_it_says(folder, few_steps, capsys):
    names: dict = {}
    for block in blocks("README.md", "python"):
        execute(block, names)
    printed = capsys.readouterr().out
    assert names["solution"].summary() in printed
    assert rs.against_baselines(names["table"]) in printed
    assert names["folded"].error < 1e-3 * names["folded"].scale
    layer = load_layer("mlp.safetensors", names["layer"].activation)
    for name, w in names["layer"].weights().items():
        np.testing.assert_array_equal(layer.weights()[name], w)
    np.testing.assert_array_equal(np.load("x.npy"), names["x"])


def test_the_recipe_for_sparse_inference_prints_its_figures(capsys):
    recipe, folding, *_ = blocks("docs/sparse_inference.md", "python")
    names: dict = {}
    exec(compile(recipe, "<documentation>", "exec"), names)
    (shown,) = blocks("docs/sparse_inference.md", "text")
    number = r"\d+\.\d+"
    printed = capsys.readouterr().out
    assert re.sub(number, "#", printed) == re.sub(number, "#", shown)
    figures = [np.array(re.findall(number, text), float) for text in (printed, shown)]
    np.testing.assert_allclose(*figures, rtol=0.25)  # another machine rounds differently, and annealing amplifies that

    exec(folding, names)
    kept = substitute(names["x_test"], names["r"], KeepLargest(32))
    np.testing.assert_allclose(names["y"], names["layer"](kept), atol=1e-4)


def link_stories() -> None:
    for name, file in {
        "stories260K.bin": "stories260k/stories260K.bin",
        "tok512.bin": "stories260k/tok512.bin",
        "stories.txt": "text/ts_sample.txt",
    }.items():
        Path(name).symlink_to(SHARED / file)


@pytest.mark.slow
@needs_stories
def test_the_page_on_real_models_runs(folder, few_steps, shell):
    link_stories()
    names: dict = {}
    for language, block in FENCE.findall(PAGES["docs/models.md"]):
        if language == "python":
            execute(block, names)
        elif language == "sh":
            shell(block)
    assert names["folded"].exact_error < 1e-9 * names["folded"].scale


@pytest.mark.slow
@needs_stories
def test_sparse_inference_of_a_real_model_runs(folder, few_steps):
    link_stories()
    names: dict = {}
    _, _, fitting, exporting, loading, decoding, *_ = blocks("docs/sparse_inference.md", "python")
    execute(fitting, names)
    assert names["folded"].exact_error < 1e-9 * names["folded"].scale
    execute(exporting, names)
    assert names["done"].dense_error < 1e-4 * names["done"].scale
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        execute(loading, names)
        assert names["written"].shape == (1, 21)
    if importlib.util.find_spec("numba"):
        execute(decoding, names)
        assert names["decoder"].position == 59


@pytest.mark.peers
def test_the_page_on_other_libraries_runs(folder, few_steps, shell, capsys):
    pytest.importorskip("sae_lens", reason="needs the extra `peers`")
    names: dict = {}
    said = ""
    for language, block in FENCE.findall(PAGES["docs/elsewhere.md"]):
        if language == "python":
            execute(block, names)
            said += capsys.readouterr().out  # before the next command takes it
        elif language == "sh":
            shell(block)
    assert "64 128" in said and float(re.search("spread along the direction: (.*)", said)[1]) < 1e-3
    assert float(said.split()[-1]) == pytest.approx(4, abs=1e-3)


# --- many devices, and batch systems


def test_the_page_on_many_devices_runs_on_one(folder, few_steps):
    execute(blocks("docs/many_devices.md", "python")[0], {})


# Stand-ins for what a cluster has: they run the program here.
STUBS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "ssh": 'shift; exec bash -c "$*"',
    "scontrol": "exit 0",
    "python": f'exec {sys.executable} "$@"',
    "rotsparse": f'exec {sys.executable} -c "from rotsparse_command import main; main()" "$@"',
}


@pytest.fixture
def cluster(folder, rng):
    """A function that runs a script with bash, as a batch system with a single task would: its output. The layer in the
    folder is a small one, because its fits end in pair searches here."""
    w_in, w_out, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 8), (6, 12), (400, 8)))
    save_layer(folder / "mlp.safetensors", rs.MLP(w_in, None, w_out))
    np.save(folder / "x.npy", x)
    commands = folder / "bin"
    commands.mkdir()
    for name, script in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\n{script}\n")
        (commands / name).chmod(0o755)
    slurm = {"JOB_ID": "42", "STEP_NODELIST": "localhost", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    slurm |= {"STEP_NUM_NODES": "1", "STEP_NUM_TASKS": "1"}
    path = {"PATH": f"{commands}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def run(script: str, *, slurm_variables: bool = True) -> str:
        environment = os.environ | path
        environment |= {f"SLURM_{name}": value for name, value in slurm.items()} if slurm_variables else {}
        script = shortened(script.replace("/shared", str(folder)))
        done = subprocess.run(["bash"], input=script, env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_the_preemptible_job_fits_and_is_given_again(folder, cluster):
    (script,) = [block for block in blocks("docs/long_runs.md", "sh") if block.startswith("#!")]
    cluster(script)
    assert (folder / "runs" / "slurm" / "rotations.safetensors").exists()


@pytest.mark.slow
def test_the_program_for_many_hosts_runs_under_slurm_and_on_plain_hosts(folder, cluster):
    _, program, initialize = blocks("docs/many_devices.md", "python")
    slurm, hosts = blocks("docs/many_devices.md", "sh")
    program = shortened(program.replace("/shared", str(folder))).replace("batch_size=1024", "batch_size=16")
    (folder / "fit.py").write_text(program)
    cluster(slurm)
    assert rs.Solution.load(folder / "run" / "solution.npz").result.name

    shutil.rmtree(folder / "run")
    line = next(line for line in program.splitlines() if line.startswith("jax.distributed"))
    given = initialize.replace("host0:12345", f"localhost:{free_port()}").replace("num_processes=4", "num_processes=2")
    (folder / "fit.py").write_text(program.replace(line, given))
    cluster(hosts.replace("0 1 2 3", "0 1"), slurm_variables=False)
    assert rs.Solution.load(folder / "run" / "solution.npz").result.name


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(p.name for p in (ROOT / "docs" / "notebooks").glob("*.py")))
def test_the_notebooks_run(notebook, folder):
    environment = os.environ | {"MPLBACKEND": "Agg"}
    program = [sys.executable, str(ROOT / "docs" / "notebooks" / notebook)]
    done = subprocess.run(program, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.glob("*.png"))


# --- links, tables and names


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if heading:
            assert heading in anchors(target.read_text()), f"{page} links to {link}"


def anchors(text: str) -> set[str]:
    """The names under which GitHub and the site know the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_benchmarks_publish_into_pages_that_have_their_markers(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), str(ROOT / "benchmarks"), *sys.path])
    import constructed
    import pca
    import summary

    for page, name in ((summary.PAGE, "bench"), (pca.PAGE, "pca"), (constructed.PAGE, "constructed")):
        text = page.read_text()
        begin, end = text.index(f"<!-- {name}:begin -->"), text.index(f"<!-- {name}:end -->")
        assert text[begin:end].count("\n| ") > 10


def test_the_readme_is_short_and_names_every_package():
    text = PAGES["README.md"]
    assert len(text.split()) <= 750
    packages = {p.parent.name for p in (ROOT / "rotsparse").glob("*/__init__.py")} - {"examples"}
    assert packages == set(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE))


def test_the_api_reference_covers_the_public_names():
    shown = set(re.findall(r"^::: rotsparse\.(\w+)$", "\n".join(PAGES[p] for p in PAGES if "/api/" in p), re.MULTILINE))
    modules = {"baselines", "models"}  # shown as modules
    public = {name for name in vars(rs) if not name.startswith("_")} - SUBMODULES - modules
    assert public - shown == set()
    assert shown - public - SUBMODULES == set()


SUBMODULES = {p.parent.name for p in (ROOT / "rotsparse").glob("*/__init__.py")} | {"importlib"}
