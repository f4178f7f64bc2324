"""What rotsparse writes, replaces and removes: its own, and nothing of anyone else's."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import save

from rotsparse._core import files
from rotsparse._core.lock import FolderLock, held


def tree(folder):
    """Every path below a folder, with what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's, with a file in it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "chapter").write_text("1")
    return folder


def test_a_file_that_rotsparse_did_not_write_is_not_replaced(tmp_path, mine):
    with pytest.raises(ValueError, match="chapter exists and was not written by rotsparse: move it away"):
        files.write_atomically(mine / "chapter", b"2")
    link = tmp_path / "link"
    link.symlink_to(mine / "chapter")
    with pytest.raises(ValueError, match="link is a symbolic link: name the file itself"):
        files.write_atomically(link, b"2")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="symbolic link"):
        files.write_atomically(dangling, b"2")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is no regular file"):
        files.write_atomically(tmp_path / "fifo", b"2")
    with pytest.raises(ValueError, match="mine is a folder"):
        files.write_atomically(mine, b"2")
    assert tree(mine) == {"chapter": b"1"} and link.is_symlink() and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "name, payload",
    [
        ("a.npz", files.npz(a=np.ones(3))),
        ("a.safetensors", save({"a": np.ones(3)}, metadata={files.SIGNATURE: "{}"})),
        ("a.json", json.dumps({"format": "rotsparse comparison 1"}, indent=2).encode()),
        ("a.md", files.MARKDOWN.encode() + b"# A"),
    ],
)
def test_a_signed_file_is_replaced_wherever_it_is(tmp_path, name, payload):
    for _ in range(2):
        files.write_atomically(tmp_path / name, payload)
    assert os.listdir(tmp_path) == [name]


def test_pictures_are_signed(tmp_path):
    for _ in range(2):
        with files.writing(tmp_path / "a.png") as file:
            Figure().savefig(file, format="png", metadata=files.PNG)


@pytest.mark.parametrize(
    "unsigned", [b"", b"PK\x03\x04", save({"a": np.ones(3)}), b'{"format": "other"}', b"\xff" * 90]
)
def test_files_of_others_are_not_signed(tmp_path, unsigned):
    (tmp_path / "a").write_bytes(unsigned)
    with pytest.raises(ValueError, match="not written by rotsparse"):
        files.write_atomically(tmp_path / "a", files.npz(a=np.ones(3)))
    assert (tmp_path / "a").read_bytes() == unsigned


def test_what_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="not written by rotsparse"), files.writing(tmp_path / "a") as file:
        file.write(b"1")
        (tmp_path / "a").write_text("mine")
    assert tree(tmp_path) == {"a": b"mine"}


def test_a_folder_that_was_made_knows_its_files(tmp_path):
    run = tmp_path / "deep" / "run"
    files.make_folder(run)
    assert files.is_made(run) and not files.is_made(tmp_path / "deep")
    files.make_folder(run / "figures")
    for _ in range(2):
        files.write_atomically(run / "figures" / "a.png", b"1")
    files.write_atomically(run / "table.md", b"1")
    assert files.foreign(run) == []
    files.check_replaceable(run)
    (run / "figures" / "notes").write_text("mine")
    (run / "empty").mkdir()
    (run / "link").symlink_to(tmp_path)
    assert files.foreign(run) == [run / "empty", run / "figures" / "notes", run / "link"]
    with pytest.raises(ValueError, match="run holds empty and 2 more, which rotsparse did not write"):
        files.check_replaceable(run)
    files.remove(run)
    assert tree(run) == {
        ".rotsparse": (run / ".rotsparse").read_bytes(),
        "empty": None,
        "figures": None,
        "figures/notes": b"mine",
        "link": str(tmp_path),
    }


def test_a_folder_of_its_own_is_removed_whole(tmp_path):
    files.make_folder(tmp_path / "run")
    files.make_folder(tmp_path / "run" / "a" / "b")
    files.write_atomically(tmp_path / "run" / "a" / "b" / "c", b"")
    files.remove(tmp_path / "run" / "a")
    assert set(tree(tmp_path)) == {"run", "run/.rotsparse"}
    (tmp_path / "run" / "a").write_text("mine")  # a name that was ours once
    assert files.foreign(tmp_path / "run") == [tmp_path / "run" / "a"]
    (tmp_path / "run" / "a").unlink()
    files.remove(tmp_path / "run")
    assert tree(tmp_path) == {}


def test_a_file_that_became_a_link_is_not_ours_any_more(tmp_path, mine):
    files.make_folder(tmp_path / "run")
    files.write_atomically(tmp_path / "run" / "table", b"")
    (tmp_path / "run" / "table").unlink()
    (tmp_path / "run" / "table").symlink_to(mine / "chapter")
    with pytest.raises(ValueError, match="symbolic link"):
        files.write_atomically(tmp_path / "run" / "table", b"2")
    files.remove(tmp_path / "run")
    assert (tmp_path / "run" / "table").is_symlink() and tree(mine) == {"chapter": b"1"}


def test_nothing_is_written_through_a_linked_folder(tmp_path, mine):
    files.make_folder(tmp_path / "run")
    (tmp_path / "run" / "figures").symlink_to(mine)
    with pytest.raises(ValueError, match=f"figures is a symbolic link to {mine}: name that folder itself"):
        files.make_folder(tmp_path / "run" / "figures")
    with pytest.raises(ValueError, match="figures is a symbolic link"):
        files.write_atomically(tmp_path / "run" / "figures" / "a", b"")
    with pytest.raises(ValueError, match="figures is a symbolic link"):
        files.write_atomically(tmp_path / "run" / "figures" / "chapter", b"")
    files.remove(tmp_path / "run" / "figures")
    files.remove(tmp_path / "run")
    assert tree(mine) == {"chapter": b"1"}


def test_folders_above_may_be_links_of_the_user(tmp_path, mine):
    (tmp_path / "runs").symlink_to(mine)
    files.make_folder(tmp_path / "runs" / "run")
    files.write_atomically(tmp_path / "runs" / "run" / "table", b"1")
    assert (mine / "run" / "table").read_bytes() == b"1"
    files.remove(tmp_path / "runs" / "run")
    assert tree(mine) == {"chapter": b"1"}


def test_a_folder_that_is_given_stays_the_users(tmp_path, mine):
    files.adopt(mine)
    files.write_atomically(mine / "log", b"1")
    files.write_atomically(mine / "log", b"2")
    with pytest.raises(ValueError, match="not written by rotsparse"):
        files.write_atomically(mine / "chapter", b"2")
    files.make_folder(mine / "step")
    files.write_atomically(mine / "step" / "a", b"1")
    (mine / "other").mkdir()
    (mine / "other" / "a").write_text("1")
    with pytest.raises(ValueError, match="not written by rotsparse"):
        files.write_atomically(mine / "other" / "a", b"2")
    assert not files.is_made(mine)
    with pytest.raises(ValueError, match="will not be replaced"):
        files.check_replaceable(mine)
    files.remove(mine / "step")
    files.remove(mine)  # what was not made as a whole is not removed as a whole
    assert {"chapter", "log", "other/a"} <= tree(mine).keys() and "step" not in tree(mine)


def test_runs_within_a_run_are_not_part_of_it(tmp_path):
    outer, inner = tmp_path / "run", tmp_path / "run" / "inner"
    files.make_folder(outer)
    files.make_folder(inner, own=True)
    files.write_atomically(inner / "table", b"1")
    assert files.foreign(outer) == [inner] and files.foreign(inner) == []
    files.remove(outer)
    assert (inner / "table").read_bytes() == b"1"


@pytest.mark.parametrize("within", [False, True])
def test_a_new_folder_is_whole_or_not_there(tmp_path, within):
    if within:
        files.make_folder(tmp_path / "run")
    path = tmp_path / "run" / "new"
    with pytest.raises(KeyboardInterrupt), files.new_folder(path) as work:
        (work / "state").mkdir()
        (work / "state" / "a").write_text("1")
        raise KeyboardInterrupt
    assert [name for name in tree(tmp_path) if name not in ("run", "run/.rotsparse")] == []
    with files.new_folder(path) as work:
        (work / "state").mkdir()
        (work / "state" / "a").write_text("1")
        assert not path.exists()
    assert (path / "state" / "a").read_text() == "1" and files.foreign(path if not within else tmp_path / "run") == []
    with pytest.raises(ValueError, match="exists already"), files.new_folder(path):
        pass
    files.remove(path)
    assert not path.exists()


def test_put_replaces_a_run_by_a_run_and_nothing_else(tmp_path, mine):
    def run(name, text):
        files.make_folder(tmp_path / name)
        files.write_atomically(tmp_path / name / "table", text)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"mine has no .rotsparse"):
        files.put(run("a", b"1"), mine, replace=True)
    files.put(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="b exists already"):
        files.put(run("a", b"2"), tmp_path / "b")
    files.put(tmp_path / "a", tmp_path / "b", replace=True)
    assert (tmp_path / "b" / "table").read_bytes() == b"2" and sorted(os.listdir(tmp_path)) == ["b", "mine"]
    (tmp_path / "b" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="b holds notes"):
        files.put(run("a", b"3"), tmp_path / "b", replace=True)
    assert tree(mine) == {"chapter": b"1"} and (tmp_path / "b" / "notes").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": "rotsparse record 1"}', "\x00", "[" * 10**5])
def test_a_damaged_record_proves_nothing(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".rotsparse").write_text(text)
    (tmp_path / "run" / "a").write_text("mine")
    assert not files.is_made(tmp_path / "run")
    files.remove(tmp_path / "run")
    assert (tmp_path / "run" / "a").read_text() == "mine"


def test_a_record_reaches_no_further_than_its_folder(tmp_path, mine):
    files.make_folder(tmp_path / "run")
    with (tmp_path / "run" / ".rotsparse").open("a") as record:
        record.write('"../mine/chapter"\n{"prefix": "../"}\n{"prefix": ""}\n{"prefix": 1}\n3\n')
    (tmp_path / "run" / "a").write_text("mine")
    files.remove(tmp_path / "run")
    assert tree(mine) == {"chapter": b"1"} and (tmp_path / "run" / "a").exists()


def test_the_record_is_not_written_through_links(tmp_path, mine):
    """A hard link to a file of the user's is no place to append to."""
    files.make_folder(tmp_path / "run")
    os.link(tmp_path / "run" / ".rotsparse", mine / "copy")
    before = (mine / "copy").read_bytes()
    with pytest.raises(ValueError, match="other names"):
        files.write_atomically(tmp_path / "run" / "a", b"")
    assert (mine / "copy").read_bytes() == before


# --- locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "symlink", "hard link", "fifo", "folder"])
def test_a_lock_harms_nothing_that_is_in_its_place(tmp_path, mine, kind):
    run, precious = tmp_path / "run", mine / "chapter"
    run.mkdir()
    match kind:
        case "file":
            (run / "lock").write_text("the combination is 0000")
        case "symlink":
            (run / "lock").symlink_to(precious)
        case "hard link":
            os.link(precious, run / "lock")
        case "fifo":
            os.mkfifo(run / "lock")
        case "folder":
            (run / "lock").mkdir()
    before = os.lstat(run / "lock")
    with pytest.raises(ValueError, match=r"lock is|cannot write to .*directory") as error:
        FolderLock(run)
    assert "Errno" not in str(error.value)
    assert os.lstat(run / "lock") == before and precious.read_text() == "1"
    assert not held(run)


def test_a_lock_leaves_nothing_behind(tmp_path, mine):
    FolderLock(mine).release()
    assert tree(mine) == {"chapter": b"1"}
    code = (
        "import sys, os; from rotsparse._core.lock import FolderLock; FolderLock(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, mine])
    assert (mine / "lock").exists() and not held(mine)
    lock = FolderLock(mine)  # what a killed process left is taken over
    assert held(mine)
    lock.release()
    assert tree(mine) == {"chapter": b"1"}


def test_a_lock_goes_along_when_its_folder_moves(tmp_path):
    lock = FolderLock(tmp_path / "work")
    (tmp_path / "work").rename(tmp_path / "out")
    other = FolderLock(tmp_path / "work")
    lock.release()
    assert held(tmp_path / "work") and not (tmp_path / "out" / "lock").exists()
    other.release()


def test_a_record_that_was_cut_off_goes_on_with_a_new_line(tmp_path):
    """As a process that was killed while it wrote leaves it: what is added afterwards is known."""
    files.make_folder(tmp_path / "run", own=True)
    with (tmp_path / "run" / files.RECORD).open("a") as record:
        record.write('"half a na')
    files.write_atomically(tmp_path / "run" / "whole", b"1")
    assert files.is_recorded(tmp_path / "run" / "whole") and files.foreign(tmp_path / "run") == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    files.make_folder(tmp_path / "run", own=True)
    before = sorted(tmp_path.rglob("*"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        for attempt in (lambda: files.make_folder(tmp_path / "new"), lambda: files.adopt(tmp_path)):
            with pytest.raises((OSError, ValueError), match="No space left on device"):
                attempt()
    record = (tmp_path / "run" / files.RECORD).read_bytes()
    with monkeypatch.context() as patch:  # room for a few bytes more
        write = os.write
        patch.setattr(os, "write", lambda handle, payload: write(handle, payload[:5]))
        with pytest.raises(OSError, match="No space left on device"):
            files.write_atomically(tmp_path / "run" / "a name", b"1")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "run" / files.RECORD).read_bytes() == record
