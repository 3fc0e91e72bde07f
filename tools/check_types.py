"""Check the types of the whole package with mypy, without a download.

    python tools/check_types.py [mypy's options]

`kernels/`, `export/` and `bench/` are sub-packages of `fastadapt` by setuptools' mapping, which no
type checker knows. So it is shown a folder of links in which they are what they are once installed;
what it reports is given the files' own names again.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build" / "types"


def link_tree() -> dict[str, str]:
    """Link every source folder where it is installed.

    Returns:
        The links' paths, relative to the repository, and the folders they stand for.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name.replace(".", "/"): path for name, path in settings["package-dir"].items()}
    whole = TREE / "fastadapt"
    whole.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "fastadapt").iterdir()}
    wanted |= {name.partition("/")[2]: ROOT / path for name, path in folders.items() if "/" in name}
    for link in whole.iterdir():
        link.unlink()
    for name, path in wanted.items():
        (whole / name).symlink_to(path)
    tree = TREE.relative_to(ROOT)
    longest_first = sorted(folders.items(), key=lambda item: -len(item[0]))
    return {f"{tree}/{name}/": f"{path}/" for name, path in longest_first}


def main() -> int:
    """Run mypy and print what it finds."""
    names = link_tree()
    command = [sys.executable, "-m", "mypy", "--package", "fastadapt", *sys.argv[1:]]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    for link, folder in names.items():
        output = output.replace(link, folder)
    print(output, end="")
    return done.returncode


def environment() -> dict[str, str]:
    """Return the environment with the links' folder first where mypy looks."""
    import os

    return os.environ | {"MYPYPATH": str(TREE)}


if __name__ == "__main__":
    raise SystemExit(main())
