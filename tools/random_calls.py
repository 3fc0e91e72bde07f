"""Run random calls of every operation, in processes, and count what is wrong.

    python tools/random_calls.py --cases 2000 --shards 16
    python tools/random_calls.py --cases 5 --shards 2 --only residual_mlp

The output and every gradient of a call may have at most twice PyTorch's error in the same dtype,
against fp64, as in the tests. On a machine with GPUs the shards share them; without one, sizes are
small and the kernels run in Triton's interpreter. A case is the seed of a call and of its sizes: it
comes again with ``--first CASE --cases 1 --only OPERATION``.

Prints the counts as JSON, and what is wrong, call by call, to standard error; exits with 1 if
anything is. A process that dies or hangs is counted, and another goes on with the next call. A call
for which the GPU has no memory left, since others hold it, is tried again. ``--seconds`` ends the
run early; the counts say how many calls were made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastadapt.files import write_json

ROOT = Path(__file__).resolve().parents[1]
FATAL = 3  # exit status of a worker whose GPU context is lost
AT_ONCE = 2000  # calls on one process's command line, which has a limit
KEPT = 2**30  # bytes of freed GPU memory that a worker keeps from other workers


@dataclass
class Shard:
    """The calls of one process: every operation's cases, ``step`` apart."""

    calls: list[tuple[str, int]]
    environment: dict[str, str]
    timeout: float
    seconds: float = math.inf
    counts: dict[str, Counter] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run all calls; start another process after one that dies or hangs."""
        done, end = 0, time.monotonic() + self.seconds
        while done < len(self.calls) and time.monotonic() < end:
            done += self._run_from(done, end)

    def _run_from(self, first: int, end: float) -> int:
        """Run a process from call ``first`` on, and return how many calls it came through."""
        calls = self.calls[first : first + AT_ONCE]
        command = [sys.executable, __file__, "--worker", json.dumps(calls)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        done, hung = 0, False
        while done < len(calls):
            if time.monotonic() > end:
                process.kill()
                process.wait()
                return done
            try:
                line = lines.get(timeout=self.timeout)
            except queue.Empty:
                hung = True
                process.kill()
                break
            if line is None:
                break
            self._note(calls[done], "wrong", json.loads(line))
            done += 1
        try:
            status = process.wait(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if done < len(calls) and (hung or status != FATAL):
            what = f"no result in {self.timeout:.0f} s" if hung else f"exit status {status}"
            self._note(calls[done], "hung" if hung else "died", [what])
            done += 1
        return done

    def _note(self, call: tuple[str, int], kind: str, found: list[str]) -> None:
        operation, case = call
        counts = self.counts.setdefault(operation, Counter())
        counts["calls"] += 1
        if found:
            counts[kind] += 1
            self.failures.append(f"{operation} case {case}: " + "; ".join(found))
            print(self.failures[-1], file=sys.stderr, flush=True)


def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def work(calls: list[tuple[str, int]]) -> int:
    """Run calls in this process, and print for each a list of what is wrong, as JSON."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    from tests.helpers.random_calls import operations

    gpu, known = torch.cuda.is_available(), operations()
    results, sys.stdout = sys.stdout, sys.stderr  # nothing else may come between
    for operation, case in calls:
        try:
            found = _call(known[operation], case, gpu)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        print(json.dumps(found), file=results, flush=True)
        if any("CUDA error" in line for line in found):
            return FATAL  # nothing after it can succeed in this process
    return 0


def _call(operation: Callable[..., list[str]], case: int, gpu: bool) -> list[str]:
    """Run a call; wait where other workers hold the GPU's memory."""
    import torch

    for attempt in range(60):
        try:
            return operation(case, "cuda" if gpu else "cpu", small=not gpu)
        except torch.OutOfMemoryError:
            if attempt == 59:
                raise
        finally:
            if gpu and torch.cuda.memory_reserved() > KEPT:
                torch.cuda.empty_cache()
        time.sleep(1)
    return []


def environments(shards: int) -> list[dict[str, str]]:
    """Share the GPUs among the shards, or the interpreter where there is none."""
    import torch

    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    count = torch.cuda.device_count()
    if count == 0:
        return [{**base, "TRITON_INTERPRET": "1"}] * shards
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(count)]
    return [{**base, "CUDA_VISIBLE_DEVICES": devices[i % count]} for i in range(shards)]


def run(
    cases: int, shards: int, first: int, only: str | None, timeout: float, seconds: float
) -> dict:
    """Run all shards and return the counts."""
    sys.path.insert(0, str(ROOT))
    import torch

    from fastadapt.bench.harness import git_commit
    from fastadapt.info import devices, versions
    from tests.helpers.random_calls import operations

    interpreter = not torch.cuda.is_available()
    names = [name for name in operations() if only in (None, name)]
    if not names:
        raise SystemExit(f"--only {only}: expected one of {', '.join(operations())}")
    parts = [
        Shard(
            [(n, c) for c in range(first + i, first + cases, shards) for n in names],
            env,
            timeout,
            seconds,
        )
        for i, env in enumerate(environments(shards))
    ]
    started = time.monotonic()
    threads = [threading.Thread(target=part.run) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = {
        name: {
            kind: sum(part.counts.get(name, Counter())[kind] for part in parts)
            for kind in ("calls", "wrong", "died", "hung")
        }
        for name in names
    }
    return {
        "commit": git_commit(),
        "versions": versions(),
        "devices": devices(),
        "interpreter": interpreter,
        "first": first,
        "cases": cases,
        "shards": shards,
        "seconds": round(time.monotonic() - started),
        "calls": sum(row["calls"] for row in counts.values()),
        "operations": counts,
        "failures": sorted(failure for part in parts for failure in part.failures),
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100, help="calls of each operation")
    parser.add_argument("--shards", type=int, default=1, help="processes")
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--only", help="one operation's name")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one call")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after which no call is begun"
    )
    parser.add_argument("--out", type=Path, help="file to write the counts to as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(json.loads(args.worker))
    if args.cases < 1 or args.shards < 1:
        parser.error("--cases and --shards are at least 1")
    shards = min(args.shards, args.cases)
    counts = run(args.cases, shards, args.first, args.only, args.timeout, args.seconds)
    print(json.dumps(counts, indent=2))
    if args.out is not None:
        write_json(args.out, counts)
    return 1 if counts["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
