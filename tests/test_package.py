"""Check what an installation brings along, and that the source archive can be tested."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("fastadapt", "kernels", "export", "bench")
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
WHICH = """
import os, subprocess, sys
import fastadapt.kernels

def test_which():
    installed = os.path.join(os.environ["INSTALLED"], "fastadapt", "kernels", "__init__.py")
    assert fastadapt.kernels.__file__ == installed
    code = "import fastadapt.kernels; print(fastadapt.kernels.__file__)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == installed
"""
# What belongs to a clone only.
CLONE = {".gitignore"}


def build(kind: str, source: Path, out: Path) -> Path:
    """Build as pip does, with the setuptools that is installed, and return the archive."""
    out.mkdir()
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Build the source archive from a copy, since building leaves files, and unpack it."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for path in ROOT.iterdir():
        if path.name in (*SOURCES, "tests", "tools", "docs", "examples", ".ci", ".github"):
            shutil.copytree(path, source / path.name, ignore=ignore)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    archive = build("build_sdist", source, folder / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """Build the wheel from the unpacked source archive, as an installer of it does."""
    return build("build_wheel", sdist, sdist.parent / "wheel")


def test_a_wheel_holds_one_package_and_all_its_folders(wheel):
    """Nothing may be installed as `kernels` or `export`: others' packages have these names."""
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if ".dist-info" not in name} == {"fastadapt"}
    installed = {name for name in names if name.startswith("fastadapt/")}
    expected = {
        f"fastadapt/{'' if folder == 'fastadapt' else folder + '/'}"
        f"{path.relative_to(ROOT / folder).as_posix()}"
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.py")
    }
    assert installed == expected | {"fastadapt/py.typed"}


def test_a_source_archive_holds_all_that_a_clone_does(sdist):
    found = {p.relative_to(sdist).as_posix() for p in sdist.rglob("*") if p.is_file()}
    assert {"tests/conftest.py", "tests/helpers/__init__.py", "Makefile", ".ci/run"} <= found
    if not (ROOT / ".git").exists():
        pytest.skip("no clone: the list of its files is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert not tracked - found - CLONE


def test_tests_run_beside_an_installed_wheel(sdist, wheel, tmp_path):
    """The folder `fastadapt` of the sources must not hide the installed package."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (sdist / "tests/test_which.py").write_text(WHICH)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_files.py", "tests/test_which.py"],
        cwd=sdist,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "INSTALLED": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_is_listed():
    """A folder that pyproject.toml forgets would be missing from wheels, and only from wheels."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: Path(ROOT, folder) for name, folder in settings["package-dir"].items()}
    found = {
        ".".join((name, *file.parent.relative_to(folder).parts))
        for name, folder in folders.items()
        for file in folder.rglob("__init__.py")
    }
    assert found == set(settings["packages"])


def test_the_version_stands_once():
    import fastadapt

    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", fastadapt.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert f"## [{fastadapt.__version__}]" in (ROOT / "CHANGELOG.md").read_text() or re.search(
        r"^## \[Unreleased\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
