"""Compare the PTX of every kernel between two checkouts, without a GPU.

    python tools/compare_ptx.py dump --out old.json      (in one checkout)
    python tools/compare_ptx.py dump --out new.json      (in the other)
    python tools/compare_ptx.py diff old.json new.json

A dump calls every operation with many sizes, dtypes and forms and compiles what it launches.
Names, comments and line information are taken out of the PTX; launches are matched by the call that
they belong to, not by the names of kernels or modules. ``diff`` prints what differs and exits with
1 if anything does. Another Triton takes part through ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path


def dump(
    out: Path,
    *,
    capabilities: list[int],
    small: bool,
    assemble: bool,
    only: str,
    cache: Path | None,
) -> None:
    """Compile the kernels of all calls and write their launches and PTX to a file."""
    # By its own folder: the root would bring this checkout's package before the installed one.
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    import compiled_kernels
    import triton

    cache = cache or Path(tempfile.mkdtemp(prefix="fastadapt-ptx-"))
    launches: dict[str, list] = {}
    texts: dict[str, str] = {}
    for capability in capabilities:
        for name, call in compiled_kernels.calls(small=small).items():
            if only not in name:
                continue
            start = time.perf_counter()
            launched = []
            for launch in compiled_kernels.compiled(
                call, capability, cache=cache, assemble=assemble
            ):
                key = hashlib.sha256(launch.ptx.encode()).hexdigest()[:16]
                texts[key] = launch.ptx
                if launch.shared > compiled_kernels.GPUS[capability][1]:
                    print(f"{launch.kernel} needs {launch.shared} bytes of shared memory")
                launched.append([launch.kernel, launch.grid, launch.numbers, launch.shared, key])
            launches[f"sm_{capability} {name}"] = launched
            seconds = time.perf_counter() - start
            print(f"sm_{capability} {name}: {len(launched)} launches, {seconds:.1f} s", flush=True)
    kernels = {launch[0] for launched in launches.values() for launch in launched}
    print(f"{len(launches)} calls, {len(kernels)} kernels, {len(texts)} different PTX")
    found = {"triton": triton.__version__, "only": only, "launches": launches, "ptx": texts}
    out.write_text(json.dumps(found, indent=0), encoding="utf-8")


def diff(before: Path, after: Path) -> bool:
    """Print what differs between two dumps.

    Returns:
        Whether anything does.
    """
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    differs = False
    if a["triton"] != b["triton"]:
        print(f"Triton {a['triton']} and {b['triton']}: dump both with the same")
        differs = True
    for name in sorted(a["launches"].keys() | b["launches"].keys()):
        if a["only"] not in name or b["only"] not in name:
            continue
        old, new = a["launches"].get(name), b["launches"].get(name)
        if old is None or new is None:
            print(f"{name}: only in {before if new is None else after}")
            differs = True
            continue
        # Without the name of the kernel; launches may come in another order.
        count = [Counter(json.dumps(launch[1:]) for launch in launched) for launched in (old, new)]
        if count[0] == count[1]:
            continue
        differs = True
        gone = [launch for launch in old if json.dumps(launch[1:]) in count[0] - count[1]]
        come = [launch for launch in new if json.dumps(launch[1:]) in count[1] - count[0]]
        print(f"{name}: {len(gone)} launches gone, {len(come)} new")
        for launch in gone:
            print(f"  - {launch[0]} grid {launch[1]} numbers {launch[2]} shared {launch[3]}")
        for launch in come:
            print(f"  + {launch[0]} grid {launch[1]} numbers {launch[2]} shared {launch[3]}")
        if gone and come and gone[0][-1] != come[0][-1]:
            texts = a["ptx"][gone[0][-1]].splitlines(), b["ptx"][come[0][-1]].splitlines()
            for line in list(difflib.unified_diff(*texts, lineterm="", n=1))[2:22]:
                print(f"      {line}")
    both = a["launches"].keys() & b["launches"].keys()
    count = sum(len(a["launches"][name]) for name in both)
    print(f"{count} launches of {len(both)} calls: {'different' if differs else 'equal'}")
    return differs


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump", help="compile this checkout's kernels")
    dumping.add_argument("--out", type=Path, required=True, help="file to write")
    dumping.add_argument("--capabilities", type=int, nargs="+", default=[90], help="default: 90")
    dumping.add_argument("--small", action="store_true", help="the few calls that the tests make")
    dumping.add_argument("--assemble", action="store_true", help="make machine code, too")
    dumping.add_argument("--only", default="", help="calls whose name contains this")
    dumping.add_argument("--cache", type=Path, help="folder to keep compiled kernels in")
    diffing = commands.add_parser("diff", help="compare two dumps")
    diffing.add_argument("before", type=Path)
    diffing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "dump":
        dump(
            args.out,
            capabilities=args.capabilities,
            small=args.small,
            assemble=args.assemble,
            only=args.only,
            cache=args.cache,
        )
        return 0
    return int(diff(args.before, args.after))


if __name__ == "__main__":
    sys.exit(main())
