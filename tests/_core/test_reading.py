"""Readers under damage: a clear error or the very numbers that were written, and memory for no more than is there."""

import json
import os
import tracemalloc
import zipfile
from collections import Counter
from typing import Any

import numpy as np
import pytest

from helpers import random_orthogonal
from rotsparse._core import files
from rotsparse._core.errors import CheckError
from rotsparse._core.reading import load_npy, load_npz, load_safetensors, safetensors
from rotsparse.data.sources import NpyFile
from rotsparse.data.store import StoreWriter, open_store
from rotsparse.engine.solution import History, Result, Solution
from rotsparse.layers.files import load_arrays, load_layer, save_layer
from rotsparse.layers.mlp import MLP
from rotsparse.layers.rotations import Rotations
from rotsparse.runs import folders, inputs, listing


def rotations_file(path, rng):
    path = path / "rotations.safetensors"
    q = [random_orthogonal(rng, d).astype(np.float32) for d in (4, 3)]
    Rotations(*q).save(path, {"seed": 0})

    def read():
        found = Rotations.load(path)[0]
        return [np.asarray(found.r_in), np.asarray(found.r_out)]

    return [path], read


def layer_file(path, rng):
    path = path / "layer.safetensors"
    layer = MLP(rng.standard_normal((5, 4)), rng.standard_normal(5), rng.standard_normal((3, 5)), activation="relu")
    save_layer(path, layer)
    return [path], lambda: list(load_layer(path, "relu").weights().values())


def npz_file(path, rng):
    path = path / "arrays.npz"
    path.write_bytes(files.npz(a=rng.standard_normal((4, 5)), b=np.arange(7)))
    return [path], lambda: [array for _, array in sorted(load_npz(path).items())]


def solution_file(path, rng):
    path = path / "solution.npz"
    bases: dict[str, Any] = {"in": random_orthogonal(rng, 4)}
    history = History(np.ones((1, 3)), np.array([0, 2]), np.ones((1, 2)))
    free = {"in": np.ones(4, bool)}
    Solution(
        bases=bases, result=Result.ALL_STEPS, detail="", value=0.5, start_value=1.0, validation_value=None,
        history=history, candidates=(bases,), candidate_values=np.array([0.5]), stats={"steps": 3}, free=free,
    ).save(path)  # fmt: skip

    def read():
        found = Solution.load(path)
        return [*found.bases.values(), found.candidate_values, np.array([found.value, found.start_value])]

    return [path], read


def store(path, rng):
    writer = StoreWriter(path / "store", {"model": "m", "width": 4, "tokens": {}})
    for i in range(2):
        writer.write(i, rng.standard_normal((6, 4)).astype(np.float32))
    writer.finish()

    def read():
        found = open_store(path / "store", "m")
        found.verify()
        return [found.read(range(len(found)))]

    return [*sorted((path / "store").glob("*.npy")), path / "store" / "manifest.json"], read


def run_folder(path, rng):
    """What a run was asked for and what it found: numbers and words, as `report` reads them again."""
    with folders.new_run(path / "run", config={"command": "fit", "seed": 3}) as run:
        folders.write_json(run / "config.json", {"command": "fit", "seed": 3, "eps": 0.1, "skip": False})
        folders.write_json(run / "metrics.json", {"objective": {"train": rng.standard_normal(), "floor": None}})
    paths = [path / "run" / name for name in ("config.json", "metrics.json", "status.json")]

    first = [folders.read_json(path) for path in paths]

    def read():
        found = [folders.read_json(path) for path in paths]
        return [np.asarray([str(now[key]) for key in then]) for now, then in zip(found, first, strict=True)]

    return paths, read


def npy_file(path, rng):
    """Without any checksum: a flipped bit of a number is another number."""
    path = path / "x.npy"
    np.save(path, rng.standard_normal((8, 3)))
    return [path], lambda: [load_npy(path)]


READERS = [rotations_file, layer_file, npz_file, solution_file, store, run_folder]


@pytest.mark.parametrize("kind", [*READERS, npy_file], ids=lambda kind: kind.__name__)
def test_damage_is_an_error_or_nothing(kind, tmp_path, rng):
    """Truncations at every twentieth of the length, and random flips of single bits."""
    paths, read = kind(tmp_path, rng)
    expected, ends = read(), Counter()

    def attempt(path, damaged, what):
        path.write_bytes(damaged)
        tracemalloc.reset_peak()
        try:
            found = read()
        except ValueError as error:
            assert str(tmp_path) in str(error), error  # it names the file
            ends["refused"] += 1
        else:
            same = len(found) == len(expected) and all(map(np.array_equal, found, expected))
            ends["the same numbers" if same else "other numbers"] += 1
            assert same or kind is npy_file, what
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20, what

    tracemalloc.start()
    for path in paths:
        intact = path.read_bytes()
        for twentieth in range(20):
            cut = len(intact) * twentieth // 20
            attempt(path, intact[:cut], f"{path.name} cut to {cut} of {len(intact)}")
        for _ in range(300 // len(paths)):
            damaged, at, bit = bytearray(intact), int(rng.integers(len(intact))), int(rng.integers(8))
            damaged[at] ^= 1 << bit
            attempt(path, bytes(damaged), f"{path.name}: bit {bit} of byte {at}")
        path.write_bytes(intact)
    tracemalloc.stop()
    assert all(map(np.array_equal, read(), expected))
    print(f"\n{kind.__name__}: {dict(ends)}")


def npy_bytes(shape, dtype="<f4", payload=b""):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


@pytest.mark.parametrize("shape", [(2**32, 4), (2**62, 2**62), (10**30,), (-1, 4), (True, 4), (2, 2)])
def test_a_header_that_asks_for_more_than_there_is(shape, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy_bytes(shape))
    for read in (load_npy, NpyFile, load_arrays):
        with pytest.raises(ValueError, match=r"x.npy"):
            read(tmp_path / "x.npy")


@pytest.mark.parametrize("dtype", ["|O", "|V0", "<U0", [("a", "<f4")], "nonsense"])
def test_odd_types(dtype, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy_bytes((2, 2), dtype, b"\0" * 64))
    with pytest.raises(ValueError, match=r"x.npy"):
        NpyFile(tmp_path / "x.npy")
    try:
        load_npy(tmp_path / "x.npy")
    except ValueError as error:
        assert "x.npy" in str(error)


def test_a_bomb_is_not_unpacked(tmp_path):
    """Two gigabytes of zeros in two megabytes, and an archive that declares less than it holds."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("w.npy", "w", force_zip64=True) as f:
        f.write(npy_bytes((2**29,)))
        for _ in range(128):
            f.write(bytes(2**24))
    assert path.stat().st_size < 3 * 2**20
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb.npz .* would unpack to 2,147,\d{3},\d{3}: if that is right"):
        load_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    # What compresses well and is small is no bomb.
    np.savez_compressed(tmp_path / "zeros.npz", w=np.zeros((1000, 1000), np.float32))
    assert load_npz(tmp_path / "zeros.npz")["w"].shape == (1000, 1000)


@pytest.mark.parametrize(
    "reader", [load_npy, load_npz, load_safetensors, Rotations.load, Solution.load, NpyFile, inputs.file_hash]
)
def test_only_regular_files_are_opened(reader, tmp_path):
    os.mkfifo(tmp_path / "fifo.npz")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "dangling.npz").symlink_to(tmp_path / "nothing")
    for name in ("fifo.npz", "folder.npz", "dangling.npz", "missing.npz"):
        with pytest.raises(ValueError, match=name):
            reader(tmp_path / name)
    for special in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=special):
            reader(special)


def test_a_manifest_names_nothing_outside_its_store(tmp_path, rng):
    store(tmp_path, rng)
    np.save(tmp_path / "secret.npy", np.ones((6, 4), np.float32))
    manifest = tmp_path / "store" / "manifest.json"
    intact = json.loads(manifest.read_text())
    for name in ("../secret.npy", str(tmp_path / "secret.npy"), "a/../../secret.npy", "", ".", "..", 3, None, "a\0b"):
        shards = [intact["shards"][0] | {"file": name}, intact["shards"][1]]
        manifest.write_text(json.dumps(intact | {"shards": shards}))
        with pytest.raises(ValueError, match=r"which is no file within .*store: it is not read"):
            open_store(tmp_path / "store")
    # A link of the user's, to where there is more room, is followed.
    manifest.write_text(json.dumps(intact))
    (tmp_path / "store" / "00000.npy").rename(tmp_path / "elsewhere.npy")
    (tmp_path / "store" / "00000.npy").symlink_to(tmp_path / "elsewhere.npy")
    open_store(tmp_path / "store").verify()


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '"x"', "[" * 10**5, '{"state": [], "config": 3}', "\x00", '{"config": {}}']
)
def test_damaged_run_folders_are_listed_or_passed_over(content, tmp_path):
    """One of them does not break the list of all."""
    with folders.new_run(tmp_path / "good", config={"command": "fit"}) as run:
        folders.write_json(run / "config.json", {"command": "fit"})
    for name in ("status.json", "config.json", "metrics.json", "log.jsonl"):
        bad = tmp_path / f"bad-{name}"
        bad.mkdir()
        (bad / "status.json").write_text('{"state": "complete"}')
        (bad / name).write_text(content)
    assert "good" in [run.folder.name for run in listing.runs_in(tmp_path)]
    listing.table(tmp_path)


def test_the_digest_of_arrays_is_checked(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors({"a": np.ones(4, np.float32)}))
    assert load_safetensors(tmp_path / "a.safetensors")[0]["a"].sum() == 4
    intact = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(intact[:-1] + b"\x40")
    with pytest.raises(CheckError, match="is damaged: its arrays are not those that were written"):
        load_safetensors(tmp_path / "a.safetensors")


def test_a_file_that_is_larger_than_what_rotsparse_writes_is_not_read(tmp_path):
    with (tmp_path / "status.json").open("wb") as file:
        file.truncate(2**31)  # takes no room on the disk
    with pytest.raises(ValueError, match="2,147,483,648 bytes, more than rotsparse writes"):
        folders.read_json(tmp_path / "status.json")
