"""The package can be built, installed and used, and what describes it agrees: versions, extras, CI."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import rotsparse as rs

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = rs.__version__

# What the CPU wheels of all extras need but brings no constraint of its own: torch pins its CUDA libraries itself.
UNPINNED = {"rotsparse"}


def constraints() -> dict[str, set[str]]:
    """The versions of every package in constraints.txt: more than one where they depend on the Python."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            found.setdefault(name, set()).add(version)
    return found


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert citation["version"] == VERSION
    assert newest is not None and newest[1] == VERSION
    assert citation["license"] == PROJECT["license"]


def test_constraints_pin_every_requirement():
    extras = PROJECT["optional-dependencies"].values()
    requirements = itertools.chain(PROJECT["dependencies"], *extras)
    names = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    assert names - UNPINNED <= set(constraints())


def test_the_hooks_have_the_versions_of_the_constraints():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    pins = [pin for repo in config["repos"] for hook in repo["hooks"] for pin in hook["additional_dependencies"]]
    assert pins
    for name, version in (pin.split("==") for pin in pins):
        assert constraints()[name] == {version}


def test_the_hosted_ci_runs_targets_that_exist_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^make (\w+)", "\n".join(runs), flags=re.MULTILINE)
    own = re.findall(r"^make (\w+)", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    assert set(own) <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"][0] == oldest


@pytest.mark.slow
@pytest.mark.peers
def test_the_wheel_installs_into_a_bare_environment_and_runs_the_demo(tmp_path):
    for tool in ("build", "hatchling", "twine"):
        pytest.importorskip(tool, reason="needs the extra `release`")

    def run(*command: object) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    archives = sorted((tmp_path / "dist").iterdir())
    assert [a.name for a in archives] == [f"rotsparse-{VERSION}-py3-none-any.whl", f"rotsparse-{VERSION}.tar.gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *archives)

    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # It sees the dependencies that are installed here, and none of the links to this checkout among them.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(here))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", archives[0])
    about = run(python, "-c", "import rotsparse as rs; print(rs.__version__, rs.__file__)").split()
    assert about[0] == VERSION
    assert Path(about[1]).is_relative_to(site)
    run(tmp_path / "bare" / "bin" / "rotsparse", "demo", "--steps", "20", "--out", tmp_path / "demo")
    assert (tmp_path / "demo" / "report.html").stat().st_size > 100_000
