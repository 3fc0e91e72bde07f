"""What a bundle says of how good its model is."""

from fastadapt.export.bundle import report
from fastadapt.export.bundle.quality import quality_of


def test_a_refit_is_named_and_its_validation_figures_are_of_the_model_before_it():
    scores = {"images": 20, "accuracy": 0.9}
    results = {"val": scores, "refit": {"images": 60}}
    found = quality_of(results)
    assert found["refit"] == 60 and found["split"] == "val"
    text = report._quality({"quality": found})
    assert "trained again on 60 images" in text and "the model before that" in text
    found = quality_of({**results, "test": scores})
    text = report._quality({"quality": found})
    assert "trained again on 60 images" in text and "the model before that" not in text
    assert "refit" not in quality_of({"val": scores})
