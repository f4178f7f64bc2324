"""Every command on a disk that is full at some moment: an error that says so, and nothing half-written is taken for
whole. A real disk, of a few megabytes in memory, where the system lets us mount one."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_nothing_is_lost import LAYER, QUICK, STEPS, command, prepared, quick, snapshot  # noqa: F401

pytestmark = pytest.mark.slow

MODEL = ("--model", "model.bin", "--tokens", "tokens.npy")
SIZE = 6 * 2**20
MOMENTS = 16  # from no room at all to three times what the result takes: there are checkpoints while a fit runs

COMMANDS = {
    "fit": ("fit", *LAYER, *QUICK, "--out", "new", "--overwrite"),
    "fit over a run": ("fit", *LAYER, *QUICK, "--out", "done", "--overwrite"),
    "benchmark": ("benchmark", *LAYER, *STEPS, "--out", "new", "--overwrite"),
    "demo": ("demo", "--network", "digits", "--control", "none", "--steps", "3", "--out", "new", "--overwrite"),
    "compare": ("compare", *LAYER, "--out", "new.json", "--overwrite"),
    "fold": ("fold", *LAYER, "--rotations", "done", "--out", "new.safetensors", "--overwrite"),
    "report": ("report", "done"),
    "explain": ("explain", "models"),
    "export": ("export", "done", "--out", "new"),
    "capture": ("capture", *MODEL, "--length", "8", "--out", "new"),
    "fit-model": ("fit-model", "--model", "model.bin", "--store", "store", *QUICK, "--layers", "0", "--out", "new",
                  "--overwrite"),
    "fold-model": ("fold-model", *MODEL, "--rotations", "models", "--out", "new"),
    "fold-model of the stream": ("fold-model", *MODEL, "--rotations", "models/layer-0/rotations.safetensors", "--out",
                                 "new.bin"),
}  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system in memory cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def room(place):
    about = os.statvfs(place)
    return about.f_bavail * about.f_frsize


def fill(place, left):
    """Leave only so many bytes of a disk."""
    with open(place / "ballast", "wb") as file:
        file.write(bytes(max(0, room(place) - left)))
        file.flush()


def unharmed(before, after, what):
    for path, about in before.items():
        assert after.get(path) == about, f"{path}: {what}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name, disk, prepared, quick, monkeypatch, capsys):  # noqa: F811
    template = prepared(True)
    shutil.copytree(template, disk, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(disk)
    way = COMMANDS[name]
    target = Path(way[-1] if way[0] in ("report", "explain") else way[way.index("--out") + 1])
    at_first, needed = room(disk), 0
    earlier = snapshot(disk)
    assert command(*way) == 0
    needed = max(at_first - room(disk), 50_000)
    if name not in ("fit over a run", "report", "explain"):
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    whole = snapshot(disk / target) if target.exists() else None
    ends = []
    for left in np.linspace(0, 3 * needed, MOMENTS):
        fill(disk, int(left))
        code = command(*way)
        said = capsys.readouterr()
        ends.append(code)
        assert code in (0, 2) and "Traceback" not in said.err, said.err
        (disk / "ballast").unlink()
        if code == 2:
            assert "No space left on device" in said.err, said.err
            others = {p: about for p, about in earlier.items() if not p.is_relative_to(disk / target)}
            unharmed(others, snapshot(disk), f"{name} with {left:.0f} bytes left\n{said.err}")
            leftovers = [p for p in disk.rglob(".rotsparse-*") if not p.is_relative_to(disk / "new.unfinished")]
            assert not leftovers, f"with {left:.0f} bytes left: {leftovers}"
            if name == "fit over a run":
                unharmed({p: a for p, a in whole.items() if p.name != "."}, snapshot(disk / target), "the earlier run")
            elif name not in ("capture", "report", "explain"):
                assert not os.path.lexists(target), f"with {left:.0f} bytes left: a part of the result"
            assert command(*way) == 0, f"again, with room: {capsys.readouterr().err}"
        if name not in ("fit over a run", "report", "explain"):
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        elif name == "fit over a run":
            whole = snapshot(disk / target)
    assert ends[0] == 2, "with no room at all nothing is written"
    print(f"\n{name}: {ends.count(2)} times no room, {ends.count(0)} times enough")
