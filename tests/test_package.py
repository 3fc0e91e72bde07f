"""What an installation brings along."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_one_package_and_all_its_rooms(tmp_path):
    """Nothing may be installed as `kernels` or `export`: others' packages have these names."""
    source = tmp_path / "source"  # building leaves files behind
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastadapt", "kernels", "export", "bench"):
        shutil.copytree(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if ".dist-info" not in name} == {"fastadapt"}
    for room in ("kernels", "export", "bench", "layers"):
        assert f"fastadapt/{room}/__init__.py" in names


def test_every_package_is_listed():
    """A folder that pyproject.toml forgets would be missing from wheels, and only from wheels."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {name: Path(ROOT, folder) for name, folder in settings["package-dir"].items()}
    found = {
        ".".join((name, *file.parent.relative_to(folder).parts))
        for name, folder in rooms.items()
        for file in folder.rglob("__init__.py")
    }
    assert found == set(settings["packages"])
