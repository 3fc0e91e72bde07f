"""What a manifest may hold: the type and the range of every value, checked before any is used.

Schemas:

1. Float input, ``model.onnx`` alone.
2. uint8 input; artefacts, environment, speed.
3. ``content_sha256``, a hash over the manifest itself; ``tasks``, one for each output; golden
   samples as decoded images; ``limits`` that the user chose; licences.
4. Several tasks, with names: class names, decision, temperature and quality stand with each of
   ``tasks``, and ``labels`` is empty. Bundles of one model stay of schema 3.
5. A file that runs may be a folder (Core ML's), whose ``files`` name their place in it. Bundles
   without one stay of schema 3 or 4.

Keys that are not declared here are kept and not read, so that a later version can add some.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastadapt.errors import InputError

from ..artefact import FOLDERS
from ..settings import MOST_IMAGES
from ..tasks import MOST
from ..tasks import NAME as TASK_NAME

LARGEST_SIDE = 65536
LARGEST_IMAGE = 2**27  # pixels of a resized image before it is cropped

Text = Annotated[str, Field(max_length=10_000)]
FileName = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/\\\x00-\x1f]+$")]
FilePath = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\\\x00-\x1f]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
BatchSize = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Finite = Annotated[float, Field(ge=-1e308, le=1e308)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]


class Part(BaseModel):
    """Base of all parts: no conversions, no NaN, unknown keys kept."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )


class TensorEntry(Part):
    """An input or output of the graph."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    dtype: Annotated[str, Field(max_length=50)] = "float32"
    shape: Annotated[list[Size | Text], Field(max_length=8)] = []


class ModelEntry(Part):
    """The graph that every bundle has."""

    file: Literal["model.onnx"] = "model.onnx"
    opset: Annotated[int, Field(ge=1, le=1000)] = 20
    taken_by: dict[Text, Text] = {}
    inputs: Annotated[list[TensorEntry], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[TensorEntry], Field(max_length=16)] = []


class DecisionEntry(Part):
    """How probabilities become classes; the likeliest one in bundles that do not say."""

    criterion: Literal["none", "balanced_accuracy", "f1", "youden"] = "none"
    threshold: Share = 0.5
    abstain: Share = 0.0
    band: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    confidence: Share | None = None


class Calibration(Part):
    """What the model's logits were divided by: of an ensemble, each member's and their mean."""

    temperature: Temperature | Annotated[list[Temperature], Field(max_length=100_000)] = 1.0
    ensemble: Temperature = 1.0


class TaskEntry(Part):
    """What one output of the graph means."""

    output: Annotated[str, Field(max_length=200)]
    kind: Annotated[str, Field(max_length=50)]
    labels: Annotated[list[Text], Field(max_length=1_000_000)]
    name: Annotated[str, Field(pattern=f"^{TASK_NAME}$")] | None = None
    decision: DecisionEntry = DecisionEntry()
    calibration: Calibration = Calibration()
    quality: dict[str, Any] | None = None


class FileEntry(Part):
    """Size and hash of a file."""

    bytes: Annotated[int, Field(ge=0, le=2**50)]
    sha256: Sha256


class BatchEntry(Part):
    """The batch sizes of a file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    min: BatchSize
    opt: BatchSize
    max: BatchSize

    @model_validator(mode="after")
    def check_order(self) -> BatchEntry:
        """Refuse sizes that are not in order."""
        if not self.min <= self.opt <= self.max:
            raise ValueError("expected min ≤ opt ≤ max")
        return self


class Details(Part):
    """What depends on the kind of a file, as far as it is used."""

    batch: BatchEntry | None = None
    onnx: FileName | None = None
    taken_by: dict[Text, Text] = {}
    targets: Annotated[list[Text], Field(max_length=100)] = []
    workspace: Annotated[int, Field(ge=1, le=2**30)] | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False


class ParityEntry(Part):
    """A comparison."""

    stage: Text
    batch: Annotated[int, Field(ge=0, le=2**40)]
    samples: Annotated[int, Field(ge=0, le=2**40)]
    error: Finite | None = None
    cosine: Finite | None = None
    top1: Share | None = None
    near_ties: Annotated[int, Field(ge=0)] | None = None
    spread: Finite | None = None
    problems: list[Text] = []
    limit: Finite = 0.0


class ArtefactEntry(Part):
    """A file that runs."""

    kind: Literal[
        "onnx",
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
        "aotinductor",
        "fastadapt",
        "executorch",
        "litert",
        "coreml",
    ]
    path: FileName | None
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"]
    status: Literal["verified", "unverified", "refused", "failed"]
    reason: Text = ""
    parity: Annotated[list[ParityEntry], Field(max_length=1000)] = []
    speed: dict[Text, dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Finite]] = {}
    files: Annotated[list[FilePath], Field(max_length=100)] = []
    details: Details = Details()

    @model_validator(mode="after")
    def check_precision(self) -> ArtefactEntry:
        """Refuse wider limits for the graph that all others are compared with."""
        if self.path == "model.onnx" and (self.kind, self.precision) != ("onnx", "fp32"):
            raise ValueError("model.onnx is an ONNX file in fp32")
        return self

    @model_validator(mode="after")
    def check_files(self) -> ArtefactEntry:
        """Demand names of a folder's files, and of all others plain names."""
        folder = self.kind in FOLDERS and self.path is not None
        if folder and not self.files:
            raise ValueError(f"{self.path!r} is a folder, and no file in it is named")
        for name in self.files:
            if name.startswith(f"{self.path}/") != folder or ("/" in name) != folder:
                kind = f"in {self.path!r}" if folder else "without folders"
                raise ValueError(f"{name!r} does not match the pattern of a name {kind}")
        return self


class MeasuredRow(Part):
    """How fast a file runs on a machine."""

    machine: Annotated[str, Field(max_length=500)]
    runtime: Annotated[str, Field(max_length=200)]
    file: FileName
    sha256: Sha256
    batch: BatchSize
    images_per_second: Annotated[float, Field(ge=0, le=1e12)]


class Rows(Part):
    """What lies beside the manifest: rows of machines that the bundle came to."""

    rows: Annotated[list[MeasuredRow], Field(max_length=100_000)]


class Limits(Part):
    """Limits that the user chose; parity's own stand in the code."""

    int8_budget: Share | None = None
    fp8_budget: Share | None = None


class Golden(Part):
    """The golden samples."""

    samples: Annotated[int, Field(ge=0, le=100_000)] = 0
    origin: Text = ""
    images: Annotated[list[FilePath], Field(max_length=100_000)] = []


class PreprocessingEntry(Part):
    """The sizes and shares from which something is allocated; the rest Preprocess checks."""

    input_size: Annotated[list[Size], Field(min_length=3, max_length=3)]
    crop_pct: Annotated[float, Field(ge=0.01, le=1)] = 0.875
    mean: Annotated[list[Finite], Field(min_length=3, max_length=3)] = [0.0, 0.0, 0.0]
    std: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=3, max_length=3)
    ] = [1.0, 1.0, 1.0]
    input: Literal["uint8", "float"] = "float"
    normalization_in_graph: bool = True
    resize_in_graph: bool = False
    tiles: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_size(self) -> PreprocessingEntry:
        """Refuse images that resizing makes too large for any memory."""
        _, height, width = self.input_size
        if (height / self.crop_pct) * (width / self.crop_pct) > LARGEST_IMAGE:
            raise ValueError("input_size over crop_pct is too large an image")
        return self


class Environment(Part):
    """The machine that made the bundle."""

    versions: dict[Text, Text] = {}
    devices: list[Text] = []


class Manifest(Part):
    """A whole manifest, of the newest schema."""

    files: Annotated[dict[FilePath, FileEntry], Field(max_length=200_000)]
    format: Literal["fastadapt-bundle"]
    schema_: Annotated[int, Field(alias="schema", ge=1)]
    content_sha256: Sha256 | None = None
    accepted: bool
    problems: list[Text]
    model: ModelEntry
    labels: Annotated[list[Text], Field(max_length=1_000_000)]
    tasks: Annotated[list[TaskEntry], Field(max_length=MOST)] = []
    preprocessing: PreprocessingEntry
    decision: DecisionEntry = DecisionEntry()
    calibration: Calibration = Calibration()
    quality: dict[str, Any] | None = None
    golden: Golden = Golden()
    limits: Limits = Limits()
    environment: Environment = Environment()
    artefacts: Annotated[list[ArtefactEntry], Field(max_length=1000)]
    measured: Annotated[list[MeasuredRow], Field(max_length=100_000)] = []

    @model_validator(mode="after")
    def check_tensors(self) -> Manifest:
        """Demand dtype and shape of every input and output, which schema 1 did not have.

        Since schema 3 all that the graph can contradict is demanded.
        """
        if self.schema_ > 2 and {"opset", "outputs"} - self.model.model_fields_set:
            raise ValueError("'model' lacks its opset or outputs")
        if self.schema_ > 2 and not self.model.outputs:
            raise ValueError("'model' names no output")
        for entry in (*self.model.inputs, *self.model.outputs):
            if self.schema_ > 1 and {"dtype", "shape"} - entry.model_fields_set:
                raise ValueError(f"{entry.name!r} lacks its dtype or shape")
        return self

    @model_validator(mode="after")
    def check_folders(self) -> Manifest:
        """Refuse files that are folders before schema 5, which brought them."""
        folders = [a.path for a in self.artefacts if a.kind in FOLDERS and a.path is not None]
        if folders and self.schema_ < 5:
            raise ValueError(f"{folders[0]!r} is a folder, which schema 5 brought")
        return self

    @model_validator(mode="after")
    def check_tasks(self) -> Manifest:
        """Demand of several tasks that each output is one, by its name, and has classes."""
        names = [task.name for task in self.tasks if task.name is not None]
        if self.schema_ < 4 and names:
            raise ValueError("'tasks' have names, which schema 4 brought")
        if self.schema_ != 4 and not names:
            return self
        if len(names) < 2 or len(names) != len(self.tasks):
            raise ValueError("'tasks' holds fewer than two tasks with names, or one without")
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("two tasks have the same name")
        if names != [output.name for output in self.model.outputs]:
            raise ValueError("'tasks' are not the outputs of the graph, in order")
        for task in self.tasks:
            if task.output != task.name or task.kind != "classification" or not task.labels:
                raise ValueError(f"task {task.name!r} lacks classes, or names another output")
        if self.labels:
            raise ValueError("'labels' stand with each of 'tasks'")
        return self


def check_manifest(manifest: dict[str, Any], where: str) -> None:
    """Raise InputError naming the first value of a manifest that is missing or cannot be."""
    _check(Manifest, manifest, where, "Copy the bundle again.")


def check_rows(rows: Any, where: str) -> list[dict[str, Any]]:
    """Return rows of speeds; raise InputError naming the first value that cannot be."""
    remedy = "Delete it; fastadapt verify --measure writes it anew."
    _check(Rows, {"rows": rows}, where, remedy)
    return rows


def _check(kind: type[Part], values: dict[str, Any], where: str, remedy: str) -> None:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the manifest"
        if first["type"] == "missing":
            said = f"lacks the key {place!r}"
        else:
            said = f"{place!r} is {_shown(first['input'])}: {_lowered(first['msg'])}"
        raise InputError(f"{where}: {said}. {remedy}") from None


def _shown(value: Any) -> str:
    text = "an object" if isinstance(value, dict) else repr(value)
    text = "a list" if isinstance(value, list) else text
    return text if len(text) <= 60 else f"{text[:57]}…"


def _lowered(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
