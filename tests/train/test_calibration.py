import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastadapt.train.calibration import HIGHEST, LOWEST, calibrate, fit_temperature


def drawn(images=400, classes=4, seed=0):
    """Logits, and labels drawn from their softmax: the temperature is about 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)
    return logits, labels.flatten().numpy()


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 12.0])
def test_temperature_minimizes_the_loss(scale):
    logits, labels = drawn()
    found = fit_temperature(logits * scale, labels)
    assert found == pytest.approx(scale, rel=0.15)

    def loss(temperature):
        z = logits.double() * scale / temperature
        return F.cross_entropy(z, torch.from_numpy(labels)).item()

    grid = found * np.linspace(0.9, 1.1, 201)
    assert loss(found) <= min(map(loss, grid)) + 1e-9


def test_it_is_one_positive_number_whatever_is_given():
    logits, labels = drawn()
    assert fit_temperature(logits * 1e-3, labels) == LOWEST
    assert fit_temperature(logits * 1e3, labels) == HIGHEST
    right, wrong = np.arange(3), np.array([1, 2, 0])
    assert LOWEST <= fit_temperature(5 * torch.eye(3), right) < 1
    assert fit_temperature(5 * torch.eye(3), wrong) > 1
    assert fit_temperature(torch.zeros(3, 3), right) == 1
    assert fit_temperature(logits * torch.nan, labels) == 1


def test_it_takes_logits_of_inference_mode():
    with torch.inference_mode():
        logits = drawn()[0].clone()
    assert fit_temperature(logits, drawn()[1]) == pytest.approx(1, rel=0.15)


def test_it_is_kept_at_1_where_validation_says_too_little():
    logits, labels = drawn()
    temperature, note = calibrate(logits * 3, labels)
    assert temperature == fit_temperature(logits * 3, labels) and note == ""
    for z, y, reason in (
        (logits[:19], labels[:19], "validation has 19 images, and 20 are needed"),
        (logits, logits.argmax(1).numpy(), "every validation image is right"),
        (logits * torch.nan, labels, "NaN or infinite"),
        (logits * 1e3, labels, "out of range (0.05 to 20)"),
    ):
        temperature, note = calibrate(z, y)
        assert temperature == 1 and reason in note
