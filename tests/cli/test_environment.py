"""Commands where the system around them is not as one would wish: each ends as it should, or says what is wrong."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from rotsparse._core import files
from rotsparse._core.reading import load_safetensors
from rotsparse.cli import main
from rotsparse.cli.output import Console
from rotsparse.layers.files import load_layer
from rotsparse.layers.rotations import Rotations
from rotsparse.models import open_store, save_model
from rotsparse.runs import folders, listing
from tiny_models import tiny_llama2c

FIT = (
    "fit",
    "--layer",
    "layer.npz",
    "--activations",
    "x.npy",
    "--solver",
    "adam",
    "--steps",
    "3",
    "--restarts",
    "1",
    "--control",
    "none",
)
FOLD = ("fold", "--layer", "layer.npz", "--activations", "x.npy", "--rotations", "r.safetensors")
HOSTILE = (
    "a[/]b",
    "r[red]x",
    "\x1b[31mred\x1b[0m",
    "a|b`c",
    "<script>",
    "new\nline",
    "né ☃",
    'it\'s ""',
    "-rf",
    ":bomb:",
)


@pytest.fixture
def inputs(folder, rng):
    """The current folder, with a layer, activations and rotations."""
    np.savez("layer.npz", w=rng.standard_normal((3, 4)).astype(np.float32))
    np.save("x.npy", rng.standard_normal((20, 4)).astype(np.float32))
    Rotations.identity(4, 3).save("r.safetensors")
    return folder


def started(*arguments, env=None, **options):
    """A command in a process of its own."""
    code = "from rotsparse_command import main; main()"
    environment = {name: value for name, value in (os.environ | (env or {})).items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        text=True,
        errors="surrogateescape",
        **options,
    )


def ran(*arguments, **options):
    """Exit code, output and errors of a command."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = started(*arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out or "", error or ""


def whole(run):
    """Whether a run is complete and everything in it was made by rotsparse."""
    page = (run / "report.html").read_text(encoding="utf-8")
    return (
        json.loads((run / "status.json").read_text())["state"] == "complete"
        and "</html>" in page
        and not files.foreign(run)
    )


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_wherever_they_are_printed(name, inputs, rotsparse, capsys):
    out = Path("out") / f"{name}.safetensors"
    code, said = rotsparse(*FOLD, "--out", f"./{out}")
    assert code == 0 and out.exists()
    shown = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert f"wrote out/{shown}.safetensors" in said and "\x1b" not in said
    code, said = rotsparse(*FOLD, "--out", f"./{out}")
    assert code == 2 and "exists: choose another file" in said and "\x1b" not in said
    folder = Path("out") / name
    folder.mkdir(parents=True)
    Rotations.identity(4, 3).save(folder / "rotations.safetensors")
    code, said = rotsparse("compare", *FOLD[1:5], "--rotations", f"./{folder}")
    assert code == 0 and "\x1b" not in said and shown.split("/")[-1][:4] in said


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_run_does_not_break_the_list(name, tmp_path, capsys):
    for place, error in ((name, "x"), ("run", name)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        status = {"state": "failed", "error": error, "config": {"command": name, "steps": name}}
        (tmp_path / place / "status.json").write_text(json.dumps(status))
    console = Console(width=300, force_terminal=True)
    with console.capture() as shown:
        console.print(listing.table(tmp_path))
        console.print(name)
    assert name.replace("\x1b", "\\x1b").replace("\n", "\\n") in shown.get()
    assert "\x1b[31mred" not in shown.get() and "💣" not in shown.get()


def test_a_warning_is_text_too():
    before = warnings.formatwarning
    with main._warnings_as_text():
        shown = warnings.formatwarning(UserWarning("\x1b[31m and [/x]"), UserWarning, "file.py", 1)
        assert shown == "rotsparse: warning: \\x1b[31m and [/x]\n"
    assert warnings.formatwarning is before


def test_a_name_that_is_too_long(inputs, rotsparse):
    code, said = rotsparse(*FIT, "--out", "x" * 255)
    assert code == 2 and "File name too long" in said and "Errno" not in said
    code, said = rotsparse(*FOLD, "--out", "x" * 243 + ".safetensors")
    assert code == 0
    assert sorted(p.name for p in inputs.iterdir() if p.name.startswith(".")) == []


def test_a_thousand_runs_are_listed_in_a_moment(tmp_path):
    for i in range(1000):
        run = tmp_path / f"sweep-{i % 10}" / f"run-{i}"
        run.mkdir(parents=True)
        config = {"command": "fit", "steps": 50}
        (run / "status.json").write_text(json.dumps({"state": "complete", "config": config}))
        (run / "metrics.json").write_text(json.dumps({"result": "ALL_STEPS", "metrics": [1.0] * 300}))
        lines = [json.dumps({"step": step, "objective": [1.0], "checked": [0.5]}) for step in range(50)]
        (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    begun = time.process_time()
    console = Console(width=20)
    with console.capture() as shown:
        console.print(listing.table(tmp_path))
    assert time.process_time() - begun < 5
    assert len(shown.get().splitlines()) > 1000


def test_the_clock_is_set_back_during_a_run(inputs, rotsparse, monkeypatch):
    now = [2e9]

    def earlier():
        now[0] -= 1000
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    assert rotsparse(*FIT, "--out", "run")[0] == 0 and whole(inputs / "run")
    assert json.loads((inputs / "run" / "metrics.json").read_text())["seconds"] >= 0


# --- in processes of their own --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"HOME": None},
        {"HOME": "/dev/null"},
        {"XDG_CACHE_HOME": "/dev/null", "JAX_COMPILATION_CACHE_DIR": None},
        {"JAX_COMPILATION_CACHE_DIR": "/dev/null/cache"},
        {"TMPDIR": "/nowhere"},
        {"LANG": "C", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"COLUMNS": "20"},
        {"TERM": "dumb"},
    ],
    ids=lambda env: " ".join(f"{name}={value}" for name, value in env.items()).replace("/", "-"),
)
def test_a_fit_in_a_strange_environment(env, inputs):
    code, _, error = ran(*FIT, "--out", "né ☃", env=env, stdin=subprocess.DEVNULL)
    assert code == 0 and whole(inputs / "né ☃"), error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-", "1>/dev/full", "2>/dev/full", "1>/dev/full 2>/dev/full"]
)
def test_streams_that_are_closed_or_full(closed, inputs):
    """The run is written whatever becomes of what is printed, and none of it ends up in a file of the run."""
    code = "from rotsparse_command import main; main()"
    line = f'exec "$0" -c "$1" "${{@:2}}" {closed}'
    ended = subprocess.run(
        ["bash", "-c", line, sys.executable, code, *FIT, "--out", "run"], capture_output=True, text=True
    )
    assert ended.returncode == 0 and whole(inputs / "run"), ended.stderr
    for file in (inputs / "run").rglob("*.json"):
        json.loads(file.read_text())


@pytest.mark.slow
def test_few_open_files(inputs):
    code, _, error = ran(*FIT, "--out", "run", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert (code == 0 and whole(inputs / "run")) or (code == 2 and "Too many open files" in error), error
    assert "Traceback" not in error


@pytest.mark.slow
def test_two_processes_in_one_folder(inputs):
    both = [started(*FIT, "--out", "run", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(2)]
    errors = [str(p.communicate(timeout=300)[1]) for p in both]
    ends = [(p.returncode, error) for p, error in zip(both, errors, strict=True)]
    assert sorted(code for code, _ in ends) in ([0, 2], [0, 0]), ends
    for code, error in ends:
        assert code == 0 or "is in use by process" in error or "run exists" in error or "appeared while" in error, error
    assert whole(inputs / "run")


@pytest.mark.slow
def test_files_that_may_not_grow(inputs):
    """As on a full disk, at every size: exit code 2 and what is wrong, and nothing but the inputs is there."""

    def limited(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    before = {path.name for path in inputs.iterdir()}
    for size in (0, 300, 3000, 30000):
        code, _, error = ran(*FIT, "--out", "run", preexec_fn=lambda size=size: limited(size))
        assert code == 2 and "File too large" in error and "Traceback" not in error, error
        left = {path.name for path in inputs.iterdir()} - before - {"cache"}
        assert left <= {"run.unfinished"}
    assert ran(*FIT, "--out", "run", "--overwrite")[0] == 0 and whole(inputs / "run")


MODEL = ("--model", "model.bin", "--tokens", "tokens.npy")
# Commands that write, and what stands before each of them.
WAYS = {
    "fit": (*FIT, "--out", "run", "--resume", "--overwrite"),
    "fold": (*FOLD, "--out", "f.safetensors", "--overwrite"),
    "compare": ("compare", *FOLD[1:], "--out", "c.json", "--overwrite"),
    "capture": ("capture", *MODEL, "--length", "8", "--out", "store"),
    "fit-model": ("fit-model", "--model", "model.bin", "--store", "store", *FIT[5:], "--out", "models", "--resume",
                  "--overwrite"),
    "report": ("report", "run"),
    "explain": ("explain", "models"),
    "demo": ("demo", "--network", "digits", "--steps", "20", "--examples", "100", "--control", "none",
             "--out", "shown", "--overwrite"),
    "fold-model": ("fold-model", *MODEL, "--rotations", "models", "--out", "folded"),
    "export": ("export", "run", "--out", "sae"),
}  # fmt: skip
_MODELS = ["capture", "fit-model"]
BEFORE = {"fit-model": ["capture"], "report": ["fit"], "export": ["fit"], "explain": _MODELS, "fold-model": _MODELS}
# Commands that make what is not there yet, and what that is.
NEW = {"capture": "store", "fold-model": "folded", "export": "sae"}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_kills(name, inputs):
    """Kill -9 at eight random moments of a command: nothing half-written is taken for whole, and the same command given
    again (with --resume or --overwrite where it asks for one) succeeds. 80 kills over all commands."""
    rng = np.random.default_rng(list(WAYS).index(name))
    save_model(tiny_llama2c(), "model.bin")
    np.save("tokens.npy", rng.integers(0, 31, 4000))
    for way in BEFORE.get(name, []):
        assert ran(*WAYS[way])[0] == 0
    seconds, landed = 0.0, 0
    for _ in range(2):  # the first run compiles, and takes far longer than those that are killed
        shutil.rmtree(NEW.get(name, "nothing"), ignore_errors=True)
        begun = time.monotonic()
        assert ran(*WAYS[name])[0] == 0
        seconds = time.monotonic() - begun
    while landed < 8:  # a kill that came too late does not count
        shutil.rmtree(NEW.get(name, "nothing"), ignore_errors=True)
        process = started(*WAYS[name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(0.3, 1)) * seconds)
        process.kill()
        process.wait()
        landed += process.returncode == -signal.SIGKILL
        check_whole(name)
        code, _, error = ran(*WAYS[name])
        assert code == 0 or (name in ("fold-model", "export") and "exists" in error), f"{name}: {error}"
    print(f"\n{landed} kills of {name}: nothing half-written taken for whole, the command given again succeeded")
    assert not list(Path("run").rglob(".rotsparse-*"))


def check_whole(name):
    """What is there is whole."""
    match name:
        case "fold":
            load_layer("f.safetensors", "relu")
        case "compare":
            json.loads(Path("c.json").read_text())
        case "fit" | "fit-model" | "report" | "demo" | "explain":
            way = WAYS[name]
            target = Path(way[way.index("--out") + 1] if "--out" in way else way[1])
            assert folders.read_json(target / "status.json")["state"] == "complete"
        case "fold-model":
            if Path("folded").exists():
                for i in range(2):
                    load_layer(f"folded/layer-{i}/layer.safetensors", "silu")
        case "export":
            if Path("sae").exists():
                load_safetensors("sae/sae_weights.safetensors")
        case "capture":
            for i in range(2):
                if (Path("store") / f"{i}.input" / "manifest.json").exists():
                    try:
                        open_store(f"store/{i}.input").verify()
                    except ValueError as error:
                        assert "was interrupted" in str(error)
