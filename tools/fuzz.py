"""Give thousands of damaged inputs to the package, and count what is answered wrongly.

    python tools/fuzz.py --cases 12000 --shards 2
    python tools/fuzz.py --only images --cases 1 --first 7673

Images, tables, lists, weights, bundles, runs and PEFT folders are damaged (``tests/helpers/fuzz``)
and read. An answer is a refusal in one line that names the cause, or a result that an oracle of its
own confirms; where nothing can confirm it, it counts as unjudged. Everything else is a fault:
``wrong``, ``raw`` (any exception but InputError), ``died``, ``hung`` (no answer in ``--timeout``
seconds of work, or ten times that) and ``above`` (more than ``--memory`` MiB at any time, the
package itself included).

Each shard is a process that stays; one that dies, hangs or takes too much memory is counted, and
another goes on with the next case. Prints the counts as JSON, and the faults to standard error;
exits with 1 if there are any. A case comes again with ``--only KIND --first CASE --cases 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastadapt.files import write_json

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ("wrong", "raw", "died", "hung", "above")
PATIENCE = 10  # times the seconds of work that an answer may take in all
ADDRESSES = 6 * 2**30  # bytes that a process may reserve beyond what its imports take


@dataclass
class Shard:
    """The cases of one process after another."""

    cases: list[tuple[str, int]]
    timeout: float
    memory: int
    counts: dict[str, Counter] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    largest: list[tuple[int, str]] = field(default_factory=list)

    def run(self) -> None:
        """Run all cases."""
        done = 0
        while done < len(self.cases):
            done += self._run_from(self.cases[done:])

    def _run_from(self, cases: list[tuple[str, int]]) -> int:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "XDG_STATE_HOME": folder,
            }
            command = [sys.executable, __file__, "--worker", folder]
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            try:
                return self._ask(process, cases)
            finally:
                process.kill()
                process.wait()

    def _ask(self, process: subprocess.Popen, cases: list[tuple[str, int]]) -> int:
        assert process.stdin is not None and process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        for done, (kind, case) in enumerate(cases):
            try:
                process.stdin.write(json.dumps([kind, case]) + "\n")
                process.stdin.flush()
                line = self._wait(process.pid, lines)
            except queue.Empty:
                self._note(kind, case, "hung", f"no answer in {self.timeout:.0f} s")
                return done + 1
            except BrokenPipeError:
                line = None
            if line is None:
                self._note(kind, case, "died", f"exit status {process.wait()}")
                return done + 1
            said = json.loads(line)
            name = f"{kind} case {case}"
            self.slowest = sorted([*self.slowest, (said["seconds"], name)])[-3:]
            self.largest = sorted([*self.largest, (said["mib"], name)])[-3:]
            outcome, detail = said["outcome"], said["detail"]
            if said["mib"] > self.memory:
                outcome, detail = "above", f"{said['mib']} MiB; {outcome}: {detail}"
            self._note(kind, case, outcome, detail)
            if outcome == "above":
                return done + 1  # what it keeps must not count for the next
        return len(cases)

    def _wait(self, process: int, lines: queue.Queue[str | None]) -> str | None:
        """Wait for a line as long as is allowed: a busy machine's time does not count."""
        worked, end = _cpu_seconds(process), time.monotonic() + PATIENCE * self.timeout
        while True:
            try:
                return lines.get(timeout=min(1.0, self.timeout))
            except queue.Empty:
                if _cpu_seconds(process) - worked > self.timeout or time.monotonic() > end:
                    raise

    def _note(self, kind: str, case: int, outcome: str, detail: str) -> None:
        counts = self.counts.setdefault(kind, Counter())
        counts["cases"] += 1
        counts[outcome] += 1
        if outcome in FAULTS:
            self.faults.append(f"{kind} case {case}: {outcome}: {detail}")
            print(self.faults[-1], file=sys.stderr, flush=True)


def _cpu_seconds(process: int) -> float:
    """Return the seconds that a process has worked; 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def work(folder: Path) -> int:
    """Answer cases from standard input, one JSON line each."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    from tests.helpers.fuzz.targets import NAMES, run_case

    _limit_addresses()
    results, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # libraries in C print where they like
    targets = {}
    for line in sys.stdin:
        kind, case = json.loads(line)
        if kind not in targets:
            own = folder / kind
            own.mkdir()
            targets[kind] = NAMES[kind](own)
        _forget_peak()
        start = time.perf_counter()
        found = run_case(targets[kind], case, folder / "scratch")
        said = {"outcome": found.outcome, "detail": found.detail}
        said |= {"seconds": round(time.perf_counter() - start, 3), "mib": _peak_mib()}
        print(json.dumps(said), file=results, flush=True)
    return 0


def _limit_addresses() -> None:
    """Let no input reserve so much that it harms others; a limit is an error of its own."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) // 1024


def plan(cases: int, first: int, only: str | None) -> list[tuple[str, int]]:
    """Share the cases among the kinds, in turns."""
    from tests.helpers.fuzz.targets import NAMES, SHARES

    if only is not None:
        return [(only, case) for case in range(first, first + cases)]
    kinds = [name for name, kind in NAMES.items() for _ in range(SHARES[kind])]
    numbers = Counter(dict.fromkeys(NAMES, first))
    planned = []
    for index in range(cases):
        kind = kinds[index * 37 % len(kinds)]
        planned.append((kind, numbers[kind]))
        numbers[kind] += 1
    return planned


def run(cases: int, shards: int, first: int, only: str | None, timeout: float, memory: int) -> dict:
    """Run all shards and return the counts."""
    sys.path.insert(0, str(ROOT))
    from fastadapt.bench.harness import git_commit
    from fastadapt.info import versions
    from tests.helpers.fuzz.targets import NAMES

    if only is not None and only not in NAMES:
        raise SystemExit(f"--only {only}: expected one of {', '.join(NAMES)}")
    planned = plan(cases, first, only)
    parts = [Shard(planned[i::shards], timeout, memory) for i in range(shards)]
    threads = [threading.Thread(target=part.run) for part in parts]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = {
        name: dict(sum((part.counts.get(name, Counter()) for part in parts), Counter()))
        for name in NAMES
        if any(name in part.counts for part in parts)
    }
    total = sum(map(Counter, kinds.values()), Counter())
    return {
        "commit": git_commit(),
        "command": f"python tools/fuzz.py --cases {cases} --first {first}"
        + (f" --only {only}" if only else ""),
        "versions": versions(),
        "seconds": round(time.monotonic() - start),
        "memory_limit_mib": memory,
        "timeout_seconds_of_work": timeout,
        "total": {**total, **{fault: total[fault] for fault in FAULTS}},
        "kinds": kinds,
        "slowest": sorted(item for part in parts for item in part.slowest)[-3:],
        "largest_mib": sorted(item for part in parts for item in part.largest)[-3:],
        "faults": sorted(fault for part in parts for fault in part.faults),
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="number of each kind's first case")
    parser.add_argument("--only", help="one kind's name")
    parser.add_argument("--shards", type=int, default=1, help="processes")
    parser.add_argument("--timeout", type=float, default=60, help="seconds of work for one case")
    parser.add_argument("--memory", type=int, default=2048, help="MiB of a process, at most")
    parser.add_argument("--out", type=Path, help="file to write the counts to as well")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args.worker)
    if args.cases < 1 or args.shards < 1:
        parser.error("--cases and --shards are at least 1")
    shards = min(args.shards, args.cases)
    counts = run(args.cases, shards, args.first, args.only, args.timeout, args.memory)
    print(json.dumps(counts, indent=2))
    if args.out is not None:
        write_json(args.out, counts)
    return 1 if counts["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
