"""The property that no command harms what it did not make: random folders of files, links, FIFOs and odd names in the
places that commands write to, every command with every option that replaces or resumes, bad inputs, and interruptions.
"""

import errno
import os
import shutil
import stat
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rotsparse._core import files
from rotsparse.evaluation import baselines
from rotsparse.examples import digits
from rotsparse.layers.mlp import Dense
from rotsparse.models import save_model
from rotsparse.report import figures
from rotsparse.runs import folders
from rotsparse_command import command_line
from tiny_models import tiny_llama2c

LAYER = ("--layer", "layer.npz", "--activations", "x.npy")
STEPS = ("--solver", "adam", "--steps", "3", "--restarts", "1")
QUICK = (*STEPS, "--control", "none")
MODEL = ("--model", "model.bin", "--tokens", "tokens.npy")

KINDS = ("file", "empty file", "folder", "empty folder", "link to a file", "link to a folder", "dangling link", "fifo")
ODD = ("notes", "a b", "it's", "né", "a[/]b", "new\nline", "\x1b[31m", "-rf", "x" * 255, os.fsdecode(b"\xff"))


@pytest.fixture
def quick(monkeypatch):
    """Nothing is drawn or trained, and a single baseline is fitted: what this test looks at is files."""
    for name in ("overview", "heat_maps", "examples", "sorted_magnitudes", "curves", "history", "metrics"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(figures, "png", lambda *_, **__: b"\x89PNG\r\n\x1a\n")
    monkeypatch.setattr(figures, "svg", lambda _: b"<svg></svg>")
    monkeypatch.setattr(figures, "pdf", lambda _: b"%PDF-1.4")
    methods = baselines.methods
    monkeypatch.setattr(baselines, "methods", lambda *a, **k: {"neurons": methods(*a, **k)["neurons"]})
    draw = np.random.default_rng(0).standard_normal
    layers = tuple(Dense(draw((o, i)), draw(o), activation="relu") for i, o in ((64, 5), (5, 4), (4, 3)))
    network = digits.Digits(layers, draw((30, 64)), draw((20, 64)), 0.9)
    monkeypatch.setattr(digits, "train", lambda _: network)


def command(*arguments):
    """The exit code of a command, run in this process and the current folder."""
    before, sys.argv = sys.argv, ["rotsparse", *map(str, arguments)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command_line()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    raise AssertionError("a command ends with an exit code")


def put(path, kind, outside):
    """Something of the user's at a path."""
    match kind:
        case "file":
            path.write_bytes(b"two years of work")
        case "empty file":
            path.touch()
        case "folder":
            path.mkdir()
            (path / "chapter.tex").write_bytes(b"two years of work")
            (path / "lock").write_bytes(b"the combination")
            (path / "link").symlink_to(outside)
        case "empty folder":
            path.mkdir()
        case "link to a file":
            path.symlink_to(outside / "bashrc")
        case "link to a folder":
            path.symlink_to(outside)
        case "dangling link":
            path.symlink_to(outside / "nothing")
        case "fifo":
            os.mkfifo(path)


def snapshot(folder):
    """Everything below a folder: what it is, and what it holds."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        if path.is_symlink():
            found[path] = ("link", os.readlink(path))
        elif path.is_dir():
            found[path] = ("folder", stat.S_IMODE(about.st_mode))
        elif path.is_file():
            found[path] = ("file", stat.S_IMODE(about.st_mode), path.read_bytes())
        else:
            found[path] = ("other", about.st_mode)
    return found


def made_by_rotsparse(tree):
    """The files and folders that rotsparse made, by its own account."""
    ours = set()
    for path, about in tree.items():
        if about[0] == "file" and (path.name == files.RECORD or files.is_recorded(path) or signed(path)):
            ours.add(path)
        if about[0] == "folder" and (files.is_made(path) or files.is_recorded(path)):
            ours.add(path)
    return ours


def within(path, allowed):
    return any(path.is_relative_to(a) for a in allowed)


def signed(path):
    try:
        files.check_new_file(path, overwrite=True)
    except ValueError:
        return False
    return True


def fail_at(monkeypatch, count, error):
    """Let the `count`-th time that anything is flushed to the disk fail."""
    left, fsync = [count], os.fsync

    def failing(handle):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)


def a_command(rng, whole_models):
    """A command with random options, and what it may write: paths, relative to the current folder."""
    out = str(rng.choice(["new", "done", "stopped", "deep/new", *(["models"] if whole_models else [])]))
    fit, compare, fold = ("fit", *LAYER, *QUICK), ("compare", *LAYER), ("fold", *LAYER)
    ways = [fit, fit, compare, fold, ("report",), ("explain",), ("export", "done"), ("runs",)]
    if whole_models:
        store = str(rng.choice(["store", "new"]))
        ways += [
            ("capture", *MODEL, "--length", "8", "--out", store),
            ("fit-model", "--model", "model.bin", "--store", "store", *QUICK, "--layers", "0"),
            ("sparsify", "model.bin", "tokens.npy", "--length", "8", "--methods", "pca", "--shares", "0.5"),
            ("fold-model", *MODEL),
            ("benchmark", *LAYER, *STEPS),
            ("demo", "--network", "digits", "--control", "none", "--steps", "3"),
        ]
    way = ways[int(rng.integers(len(ways)))]
    arguments, may = list(way), []
    options = [option for option in ("--overwrite", "--resume") if rng.random() < 0.5]
    match way[0]:
        case "fit" | "fit-model":
            arguments += ["--out", out, *options, *(["--tensorboard"] if rng.random() < 0.2 else [])]
            may = [out, f"{out}.unfinished"]
        case "sparsify":
            arguments += ["--out", out, *options]
            may = [out, f"{out}.unfinished"]
        case "benchmark" | "demo":
            arguments += ["--out", out, *options[:1][: "--overwrite" in options]]
            may = [out, f"{out}.unfinished"]
        case "compare" | "fold":
            ending = {"compare": "json", "fold": "safetensors"}[way[0]]
            file = f"{rng.choice(['new', 'earlier', 'done/new'])}.{ending}"
            arguments += ["--out", file, "--rotations", "done", *(["--overwrite"] if "--overwrite" in options else [])]
            may = [file]
            if file.startswith("done/"):
                may.append("done/.rotsparse")
        case "report" | "explain":
            target = str(rng.choice(["done", "stopped.unfinished", *(["models"] if whole_models else [])]))
            arguments += [target]
            may = [target]
        case "export":
            arguments += ["--out", out]
            may = [out]
        case "runs":
            arguments += ["."]
        case "capture":
            may = [store]
        case "fold-model":
            arguments += ["--out", "new.bin", "--rotations", "done/rotations.safetensors"]
            may = ["new.bin"]
    if rng.random() < 0.15:  # bad input
        at = next((i for i, word in enumerate(arguments) if word in ("layer.npz", "model.bin")), None)
        if at is not None:
            arguments[at] = str(rng.choice(["missing.npz", "cut.npz", "fifo.npz", "link.npz", "outside"]))
    return arguments, may


def places(rng, may):
    """Where users might have something, in the way of a command."""
    inside = ["lock", "status.json", "config.json", "figures", "figures/mine.png", "checkpoints", "log.jsonl"]
    inside += ["checkpoints/step-00000009", "checkpoints/notes", "tensorboard", ".rotsparse", "report.html", "0.input"]
    inside += ["directions.html", "layer-0/directions.html"]
    inside += ["0.input/00000.npy", "0.input/manifest.json", "1.input/lock", "layer-0", "layer-0/table.md", *ODD]
    for _ in range(int(rng.integers(1, 4))):
        place = Path(str(rng.choice([*may, "here"])))
        yield place if rng.random() < 0.3 else place / inside[int(rng.integers(len(inside)))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A function that makes the user's files and earlier results of every command, once for each kind of test."""
    made = {}

    def prepare(whole_models):
        if whole_models not in made:
            folder = tmp_path_factory.mktemp("prepared")
            made[whole_models] = folder
            rng = np.random.default_rng(0)
            here = os.getcwd()
            os.chdir(folder)
            try:
                np.savez("layer.npz", w=rng.standard_normal((3, 4)).astype(np.float32))
                np.save("x.npy", rng.standard_normal((20, 4)).astype(np.float32))
                Path("cut.npz").write_bytes(Path("layer.npz").read_bytes()[:100])
                os.mkdir("outside")
                Path("outside/bashrc").write_bytes(b"export A=1")
                os.symlink("layer.npz", "link.npz")
                assert command("fit", *LAYER, *QUICK, "--out", "done") == 0
                assert command("fit", *LAYER, *QUICK, "--out", "stopped") == 0
                # As a run that was killed leaves it.
                os.rename("stopped", "stopped.unfinished")
                files.make_folder("stopped.unfinished/checkpoints")
                with files.new_folder("stopped.unfinished/checkpoints/step-00000001") as step:
                    (step / "manifest.json").write_text("{}")
                status = Path("stopped.unfinished/status.json")
                folders.write_json(status, folders.read_json(status) | {"state": "running"})
                assert command("compare", *LAYER, "--out", "earlier.json") == 0
                assert command("fold", *LAYER, "--rotations", "done", "--out", "earlier.safetensors") == 0
                if whole_models:
                    save_model(tiny_llama2c(), "model.bin")
                    np.save("tokens.npy", rng.integers(0, 31, 80))
                    assert command("capture", *MODEL, "--length", "8", "--out", "store") == 0
                    fit = ("fit-model", "--model", "model.bin", "--store", "store", *QUICK, "--layers", "0")
                    assert command(*fit, "--out", "models") == 0
            finally:
                os.chdir(here)
        return made[whole_models]

    return prepare


@pytest.mark.parametrize(
    "tries, whole_models",
    [(range(30), False), *(pytest.param(range(a, a + 100), True, marks=pytest.mark.slow) for a in range(0, 400, 100))],
)
def test_no_command_harms_what_it_did_not_make(tries, whole_models, prepared, quick, folder, monkeypatch, capsys):
    template, ends = prepared(whole_models), Counter()
    for number in tries:
        rng = np.random.default_rng([number, whole_models])
        work = folder / f"try-{number}"
        shutil.copytree(template, work, symlinks=True)
        monkeypatch.chdir(work)
        os.mkfifo(work / "fifo.npz")
        arguments, may = a_command(rng, whole_models)
        theirs = set()
        for place in places(rng, may):
            path = work / place
            if any(parent.is_symlink() or (os.path.lexists(parent) and not parent.is_dir()) for parent in path.parents):
                continue
            kind = KINDS[int(rng.integers(len(KINDS)))]
            if os.path.lexists(path):
                # Where rotsparse wrote a file, a file of that name is the one it wrote: a link is not.
                if path.is_dir() or not kind.endswith(("link", "fifo", "folder")):
                    continue
                path.unlink()
            theirs |= {parent for parent in path.parents if parent.is_relative_to(work) and not parent.exists()}
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, kind, work / "outside")
            theirs |= {path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())}
        before = snapshot(work)
        ours = made_by_rotsparse(before) - theirs
        with monkeypatch.context() as patch:
            if rng.random() < 0.3:
                error = KeyboardInterrupt() if rng.random() < 0.5 else OSError(errno.ENOSPC, "No space left on device")
                fail_at(patch, int(rng.integers(1, 25)), error)
            code = command(*arguments)
        said = capsys.readouterr()
        ends[code] += 1
        what = f"try {number}: {arguments}, {sorted(str(p.relative_to(work)) for p in theirs)}: {code}\n{said.err}"
        assert code in (0, 1, 2, 75, 130), what
        assert (
            "Traceback" not in said.err and "error: [Errno" not in said.err and "\x1b[31m" not in said.out + said.err
        ), what
        after = snapshot(work)
        allowed = [work / path for path in may]
        for path, about in before.items():
            if path in ours and within(path, allowed):
                continue
            places_now = [path]
            for a in allowed:  # a finished run moves, and takes along what lies in its folder
                if a.name.endswith(".unfinished") and path.is_relative_to(a) and code in (0, 1):
                    places_now.append(a.with_name(a.name.removesuffix(".unfinished")) / path.relative_to(a))
            assert about in [after.get(place) for place in places_now], f"{path} was harmed\n{what}"
        new = [path for path in after if path not in before]
        parents = {parent for a in allowed for parent in a.parents}
        assert all(within(path, allowed) or path in parents for path in new), what
        assert not [path for path in new if path.name.startswith(".rotsparse-")], what
        monkeypatch.chdir(folder)
        shutil.rmtree(work)
    print(f"\n{len(tries)} tries, by exit code: {dict(ends)}; 0 tracebacks, nothing harmed")
