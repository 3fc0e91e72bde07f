"""The benchmark protocol: what a benchmark declares, what it yields, what is stored of it.

A module in ``suites/`` declares one :class:`Benchmark`. Its ``run`` yields a :class:`Record` for
each shape (:func:`fastadapt.bench.operation.measure` makes them), or, where a benchmark has tables
of its own, :class:`Tables`: each time everything that there is so far. :class:`LeftOut` says why
something was not measured. The runner gathers what is yielded in a :class:`Result`, with the
:class:`Environment` that it was measured in; a result file holds one :class:`Results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 2
METRICS = {"gpu_us": "GPU time", "wall_us": "wall time", "peak_mib": "peak memory"}

Errors = dict[str, dict[str, float]]  # by name of a tensor, then by provider
Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Samples of a time: their median, first and last decile, in the unit of the samples."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """The distance from the first to the last decile."""
        return self.high - self.low

    @property
    def noisy(self) -> bool:
        """Whether the samples differ by more than their median: a ratio of it means nothing."""
        return self.width > self.median


def center(value: Spread | float) -> float:
    """Return the median of a spread; peak memory is one number."""
    return value.median if isinstance(value, Spread) else value


@dataclass
class Part:
    """One part of a record, as "forward": what each provider took for it.

    Attributes:
        flops: operations that the part needs at least; ``None`` where nobody counted.
        bytes: bytes that it must move at least.
        floor_us: the larger of both times, at the rates that this machine reaches.
        target_us: targets in µs on an H100: the first must be met, the second is the ambition.
        target_speedup: a factor, and the provider over which it is asked for.
        gpu_us: time on the GPU in µs, by provider.
        wall_us: time of an eager call in µs, launch to completion, by provider.
        peak_mib: peak memory on the GPU, by provider.
        failed: provider to the reason why it has no figures.
    """

    flops: float | None = None
    bytes: float | None = None
    floor_us: float | None = None
    target_us: tuple[float, ...] = ()
    target_speedup: tuple[float, str] | None = None
    gpu_us: dict[str, Spread] = field(default_factory=dict)
    wall_us: dict[str, Spread] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def values(self, metric: str) -> Mapping[str, Spread | float]:
        """Return the figures of a metric (a key of ``METRICS``) by provider."""
        metrics: dict[str, Mapping[str, Spread | float]] = {
            "gpu_us": self.gpu_us,
            "wall_us": self.wall_us,
            "peak_mib": self.peak_mib,
        }
        return metrics[metric]

    @property
    def times(self) -> dict[str, Spread]:
        """GPU times where there are any, else wall times."""
        return self.gpu_us or self.wall_us

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Part:
        """Read a part from a result file."""
        values = dict(data)
        for metric in ("gpu_us", "wall_us"):
            found = values.get(metric, {})
            values[metric] = {name: Spread(**spread) for name, spread in found.items()}
        values["target_us"] = tuple(values.get("target_us", ()))
        if values.get("target_speedup"):
            factor, provider = values["target_speedup"]
            values["target_speedup"] = float(factor), provider
        return cls(**values)


@dataclass
class Record:
    """One shape of a benchmark.

    Attributes:
        shape: the shape, as tables show it.
        dimensions: what the numbers in ``shape`` are.
        size: their product, for plots.
        errors: relative errors against higher precision.
        failed: provider to the reason why it has no figures.
        wrong: the errors that are too large; such a shape is not timed.
        parts: figures by part ("forward", "stage 1", …).
    """

    shape: str
    dimensions: str
    size: int
    errors: Errors = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: Errors = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Read a record from a result file."""
        parts = {name: Part.from_json(part) for name, part in data.get("parts", {}).items()}
        return cls(**{**data, "parts": parts})


@dataclass(frozen=True)
class LeftOut:
    """A benchmark, or a part of one, that was not measured.

    Attributes:
        reason: why, to be read after "left out, ".
    """

    reason: str


@dataclass
class Timeline:
    """One whole command, cut into phases.

    Attributes:
        job: what was done, the same for all providers.
        provider: who did it.
        start: "cold" for the first run on this machine, "warm" for the second.
        seconds: phase to seconds, in the order in which pictures stack them.
        total: seconds from the start of the process to its end.
        accuracy: of the trained model on the test split, where the command tells it.
    """

    job: str
    provider: str
    start: str
    seconds: dict[str, float]
    total: float
    accuracy: float | None = None


@dataclass
class Tables:
    """Tables of a benchmark that has its own, whole: what was yielded before is replaced.

    Attributes:
        tables: title to rows.
        title: the benchmark's; its declaration's if empty.
        notes: lines to stand below the tables.
        summary: the titles that documents show; ``None`` for all.
        wrong: what was wrong and not timed.
        left_out: what was not measured, and why.
        timelines: whole commands in phases, for pictures.
        about: how titles and lines of this part begin, where a benchmark can run in parts: what
            an earlier run of the same commit had of other parts stays.
        progress: what is new, for the terminal.
    """

    tables: dict[str, list[Row]]
    title: str = ""
    notes: list[str] = field(default_factory=list)
    summary: list[str] | None = None
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    about: tuple[str, ...] = ()
    progress: str = "tables"


Outcome = Record | Tables | LeftOut


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as its module in ``suites/`` declares it.

    Attributes:
        title: the heading of its tables.
        notes: what a reader of the tables must know.
        run: with ``quick`` (fewer shapes), yields what it measures.
        needs_gpu: whether it runs on a CUDA GPU alone.
        slow: whether it takes minutes even with few shapes: then ``--quick`` leaves it out unless
            it is named.
    """

    title: str
    notes: str
    run: Callable[[bool], Iterator[Outcome]]
    needs_gpu: bool = False
    slow: bool = False


@dataclass
class Environment:
    """Where and with what a benchmark was measured.

    Attributes:
        date: in UTC, ISO 8601.
        command: what the user typed.
        commit: of the repository, with ``-dirty`` where it held changes.
        gpu: the GPU's name; ``None`` on a CPU.
        dtype: the dtype of the operations.
        copy_rate: TB/s that a large copy reads and writes.
        product_rate: TFLOP/s of a large matrix product.
        versions: package to version.
        machine: driver, clocks, CUDA version, threads: whatever the machine tells.
    """

    date: str
    command: str
    commit: str | None
    gpu: str | None
    dtype: str
    copy_rate: float
    product_rate: float
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The machine's name for titles."""
        return self.gpu or "CPU"

    def same_code(self, other: Environment) -> bool:
        """Whether both are the same clean commit with the same versions on the same machine."""
        if self.commit is None or self.commit.endswith("-dirty"):
            return False
        keys = ("gpu", "commit", "versions")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def to_json(self) -> dict[str, Any]:
        """Return the environment as a result file holds it, rates under names with units."""
        return {_RATES.get(k, k): v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Environment:
        """Read an environment of this schema or of schema 1."""
        values = {_ATTRIBUTES.get(key, key): value for key, value in data.items()}
        known = {f.name for f in dataclasses.fields(cls)}
        machine = dict(values.pop("machine", {}))
        machine |= {key: value for key, value in values.items() if key not in known}
        return cls(**{k: v for k, v in values.items() if k in known}, machine=machine)


_RATES = {"copy_rate": "copy, TB/s", "product_rate": "matrix product, TFLOP/s"}
_ATTRIBUTES = {name: attribute for attribute, name in _RATES.items()}


@dataclass
class Result:
    """A benchmark's newest results, as a result file holds them.

    Attributes:
        environment: where it was measured; ``None`` for what was left out.
        title, notes: of the benchmark.
        records: its shapes.
        tables, summary, timelines: see :class:`Tables`.
        wrong: shapes or parts that were wrong and not timed.
        left_out: what was not measured, and why.
        failed: the error that ended the benchmark.
    """

    environment: Environment | None = None
    title: str = ""
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    summary: list[str] | None = None
    timelines: list[Timeline] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: str | None = None

    @property
    def timed(self) -> list[Record]:
        """The records with figures."""
        return [record for record in self.records if record.parts]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], environment: Mapping[str, Any] | None) -> Result:
        """Read a benchmark's results; ``environment`` where they hold none (schema 1)."""
        values = dict(data)
        if "readme" in values:
            values["summary"] = values.pop("readme")
        where = values.pop("environment", environment)
        return cls(
            **{
                **values,
                "environment": None if where is None else Environment.from_json(where),
                "records": [Record.from_json(record) for record in values.get("records", [])],
                "timelines": [Timeline(**line) for line in values.get("timelines", [])],
            }
        )


@dataclass
class Results:
    """What a result file holds: the newest results of each benchmark on one machine.

    Attributes:
        gpu: the GPU's name; ``None`` on a CPU.
        benchmarks: by name, each with the environment that it was measured in.
    """

    gpu: str | None
    benchmarks: dict[str, Result] = field(default_factory=dict)

    @property
    def environments(self) -> list[Environment]:
        """The environments of the benchmarks, the newest first."""
        found = [r.environment for r in self.benchmarks.values() if r.environment is not None]
        return sorted(found, key=lambda environment: environment.date, reverse=True)

    def to_json(self) -> dict[str, Any]:
        """Return what a result file holds; empty fields are left out."""
        benchmarks = {}
        for name, result in self.benchmarks.items():
            found = _without_empty(
                dataclasses.asdict(dataclasses.replace(result, environment=None))
            )
            if result.environment is not None:
                found = {"environment": result.environment.to_json(), **found}
            benchmarks[name] = found
        return {"schema": SCHEMA, "gpu": self.gpu, "benchmarks": benchmarks}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """Read a result file's content.

        Files of schema 1 (one environment for all benchmarks) stay readable: git history has them.

        Raises:
            ValueError: it is something else, or of a later schema.
            KeyError, TypeError, AttributeError: it is something else.
        """
        if data.get("schema") not in (1, SCHEMA):
            raise ValueError(f"schema {data.get('schema')!r}; expected 1 or {SCHEMA}")
        environment = data.get("environment")
        benchmarks = {
            name: Result.from_json(result, environment)
            for name, result in data["benchmarks"].items()
        }
        return cls(data["gpu"] if environment is None else environment["gpu"], benchmarks)


def _without_empty(value: Any) -> Any:
    """Drop ``None`` and empty containers from dataclasses made into dictionaries."""
    if isinstance(value, dict):
        cleaned = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item not in (None, {}, [], (), "")}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_empty(item) for item in value]
    return value
