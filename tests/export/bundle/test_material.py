from pathlib import Path
from types import SimpleNamespace

from fastadapt.export.bundle.material import Material
from fastadapt.export.bundle.samples import Sample, Samples


def test_the_first_images_that_calibrate_are_of_all_classes():
    """Tables and folders list class by class, and of long ones the first images are taken."""
    training = tuple(Sample(Path(f"{n:03}.png"), "ab"[n >= 50]) for n in range(100))
    validation = (Sample(Path("v.png"), "b"),)
    material = SimpleNamespace(
        trained=SimpleNamespace(labels=("a", "b"), preprocess=None, tasks=()),
        samples=Samples(validation, "a split", training, validation),
        given=SimpleNamespace(graph_input=None),
    )
    images = Material.quantization_images(material)
    first = [int(path.stem) for path in images.calibration[:20]]
    assert sum(n >= 50 for n in first) == 10
    assert first != sorted(first)
    assert sorted(images.calibration) == [sample.path for sample in training]
    assert images.targets.tolist() == [1]
