"""``python -m fastadapt.bench``: the same as ``fastadapt bench``."""

from __future__ import annotations

import argparse
import sys

from fastadapt.bench import BENCHMARKS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastadapt.bench")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", metavar="OUT", help="write the results to this file")
    args = parser.parse_args()
    return run(args.names, quick=args.quick, json_out=args.json)


if __name__ == "__main__":
    sys.exit(main())
