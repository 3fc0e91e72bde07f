"""Check and time the kernels of the fused runtime, in all their variants, on a GPU.

    python -m tools.time_fused attention|depthwise|patches|narrow --out FOLDER
    python -m tools.time_fused models --out FOLDER [--compiled]
    python -m tools.time_fused compile vit_base_patch16_224 64
    python -m tools.time_fused kernels

Every variant is compared with fp32 first, on fresh random inputs; what is wrong is named and not
timed. Times are of replayed CUDA graphs over rotated inputs, in µs, beside the strongest rivals.
The fastest variants go to FOLDER/tuning.json, which FASTADAPT_TUNING takes. ``compile`` fills
PyTorch's caches for a rival, ``kernels`` Triton's for all variants, in parallel threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.bench import harness
from fastadapt.files import write_json
from fastadapt.kernels.common import launcher, tuning
from tools.fused_cases import BATCHES, BF16, CASES, Case

GELUS = ("none", "tanh")


def run_cases(name: str, out: Path) -> None:
    """Check and time all cases of an operation; print a line for each, and keep all times."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    results, wrong = {}, 0
    for case in CASES[name]():
        found, problems, failed = check(case)
        wrong += len(problems)
        for line in problems:
            print(f"WRONG {case.title}: {line}", flush=True)
        times, not_timed = measure(case, found)
        failed |= not_timed
        results[case.title] = {"times": times, "wrong": problems, "failed": failed}
        ours = {key: times[key] for key in found if key in times}
        rivals = ", ".join(f"{key} {times[key]:.1f}" for key in case.rivals if key in times)
        said = "     none right"
        if ours:
            best = min(ours, key=ours.__getitem__)
            said = f"{ours[best]:8.1f} µs  {best}"
            if case.key is not None:
                # Of one size at several batches the last, largest one decides.
                choice = {tuning.key(case.key[0], 0, case.key[1]): case.variants[best][0]}
                _add_choices(out / "tuning.json", choice)
        print(f"{case.title:34} {said}  |  {rivals}", flush=True)
        for key, reason in failed.items():
            print(f"    not run: {key}: {reason}", flush=True)
        write_json(out / f"{name}.json", results)
        torch.cuda.empty_cache()
    print(f"{name}: {wrong} wrong, {time.perf_counter() - start:.0f} s", flush=True)


def _add_choices(path: Path, choices: dict[str, dict[str, int]]) -> None:
    old = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, old | choices)


def compile_kernels() -> None:
    """Compile every variant of every case, in parallel threads, into Triton's cache."""
    start = time.perf_counter()
    for make in CASES.values():
        make()
    begun = launcher.begun()
    for ahead in begun:
        ahead.join()
    print(f"{len(begun)} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)


def check(case: Case) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the variants that are right, what is wrong with others, and why some do not run."""
    right, wrong, failed = [], [], {}
    inputs = case.inputs()
    truth = case.exact(*inputs)
    limit = 2 * harness.relative_error(case.plain(*inputs).float(), truth) + 1e-4
    for name, (_, call) in case.variants.items():
        try:
            poison = torch.full_like(truth, math.nan, dtype=BF16)  # what `empty` then finds
            del poison
            errors = [harness.relative_error(call(*inputs).float(), truth) for _ in range(3)]
        except Exception as error:
            if "illegal" in str(error) or "unspecified" in str(error):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        if all(error <= limit for error in errors):
            right.append(name)
        else:
            wrong.append(f"{name}: error {max(errors):.1e}, allowed {limit:.1e}")
    return right, wrong, failed


def measure(case: Case, right: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return times in µs of variants and rivals, and why others have none."""
    size = sum(t.nbytes for t in case.inputs() if isinstance(t, Tensor))
    sets = [case.inputs() for _ in range(harness.input_sets(size, most=4))]
    calls = {name: case.variants[name][1] for name in right} | case.rivals
    times, failed = {}, {}
    for name, call in calls.items():
        try:
            rotated = [functools.partial(call, *tensors) for tensors in sets]
            times[name] = harness.graph_time(rotated, repeats=2, replays=9)
        except Exception as error:
            if "illegal" in str(error):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return times, failed


def compile_ahead(backbone: str, batch: str) -> None:
    """Fill PyTorch's caches with a rival's code, in a process of its own."""
    from fastadapt.bench.suites import deployment

    subject = next(s for s in deployment.SUBJECTS if s.backbone == backbone)
    print(f"{backbone} {batch}: {deployment.prepare(subject, batch, '.'):.0f} s", flush=True)


def run_models(out: Path, compiled: bool) -> None:
    """Time whole models in every way, beside torch.compile before and after."""
    import fastadapt as fa
    from fastadapt.bench import deployed_calls
    from fastadapt.bench.suites import deployment
    from fastadapt.export.fused.convert import fuse
    from fastadapt.fusion.kernel_choices import Choices

    ways = {
        "ViT-B/16": [Choices(a, gelu=form) for a in ("kernel", "library") for form in GELUS],
        "ConvNeXt-B": [Choices(narrow=n, gelu=form) for n in (False, True) for form in GELUS],
    }
    images, results = deployed_calls.make_images(deployment.SAMPLES), {}
    for subject in deployment.SUBJECTS:
        model = deployment.make_model(subject)
        whole = deployment.with_graph_input(model)
        with torch.no_grad():
            expected = whole(images).numpy()
        fused = fuse(deployment.with_graph_input(fa.fold(model)), BF16).to(harness.device())
        rows = {}
        for batch in BATCHES:
            row = {}
            rival = None
            if compiled:
                providers = deployment.providers(subject, Path(tempfile.gettempdir()))
                torch.compiler.reset()
                rival = providers["bf16, torch.compile, CUDA graph"].make()
                row["compiled"] = deployed_calls.images_per_second(rival, batch, 0.4)
            for way in ways[subject.title]:
                name = _name(way)
                fused.choices = way
                call = fa.GraphedCall(fused, say=print)
                try:
                    found = deployment.check(call, images, expected, "bf16", [batch])
                    if not all(parity.passed for parity, _ in found):
                        print(f"WRONG {subject.title} {batch} {name}: {found}", flush=True)
                        continue
                    row[name] = deployed_calls.images_per_second(call, batch, 0.4)
                except Exception as error:
                    print(f"FAILED {subject.title} {batch} {name}: {str(error)[:200]}", flush=True)
                    if "illegal" in str(error):
                        raise
                del call
                harness.release()
            if rival is not None:
                row["compiled again"] = deployed_calls.images_per_second(rival, batch, 0.4)
            del rival
            harness.release()
            rows[batch] = row
            best = max(row.values(), default=0.0)
            for name, speed in row.items():
                mark = "*" if speed == best else " "
                against = row.get("compiled", 0.0)
                times = f" {speed / against:5.2f}×" if against else ""
                print(
                    f"{mark} {subject.title:10} {batch:4} {speed:9,.0f}{times}  {name}", flush=True
                )
            write_json(out / "models.json", results | {subject.title: rows})
        rows["latency"] = {}
        for way in (None, *ways[subject.title]):
            fused.choices = way
            name = "default choices" if way is None else _name(way)
            rows["latency"][name] = deployed_calls.latency(fa.GraphedCall(fused))
            print(f"  {subject.title}: one image, {name}: {rows['latency'][name]}", flush=True)
        results[subject.title] = rows
        write_json(out / "models.json", results)


def _name(way: Any) -> str:
    return f"attention {way.attention}, narrow {way.narrow}, GELU's form {way.gelu}"


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*CASES, "models", "compile", "kernels"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--compiled", action="store_true", help="time torch.compile as well")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if given.part == "compile":
        compile_ahead(*given.rest)
    elif given.part == "kernels":
        compile_kernels()
    elif given.part == "models":
        run_models(given.out, given.compiled)
    else:
        run_cases(given.part, given.out)


if __name__ == "__main__":
    main()
