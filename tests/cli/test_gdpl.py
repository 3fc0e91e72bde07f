import json

import pytest

from tests.helpers.gdpl_models import make_colours, save_source

NAMES = ("annual_crop", "forest", "harbour", "industrial_area", "river")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("gdpl") / "clip")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "colours", NAMES)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "other", ("desert", "sea"), count=3)


def options(source, data, out):
    return (
        *("gdpl", data, "--out", out, "--clip", source.clip),
        *("--domain-encoder", source.domain_encoder, "--domain-size", 32),
        *("--domain-weights", source.domain_weights, "--prompt-depth", 2, "--low-rank", 2),
        *("--shots", 2, "--epochs", 1),
    )


def test_trains_and_prints_the_table(command, source, data, other_data, tmp_path):
    args = (*options(source, data, tmp_path / "run"), "--grad-checkpointing")
    code, out, err = command(*args, "--seeds", "1,2", "--eval-data", other_data)
    assert code == 0, err
    assert "harmonic" in out and "mean of 2" in out
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    # The paper's, not the adapter's.
    assert (settings["lr"], settings["optimizer"], settings["batch_size"]) == (0.0035, "sgd", 4)
    assert (settings["shots"], settings["epochs"], settings["rank_depth"]) == (2, 1, 2)
    assert settings["domain_weights"] == source.domain_weights


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--rank", 8), 2, "--rank"),
        (("--seeds", "1;2"), 1, "--seeds is '1;2'; expected numbers"),
        (("--optimizer", "adam"), 2, "--optimizer"),
        (("--domain-features", "f.safetensors"), 1, "leave out --domain-encoder"),
        (("--prompts", 0), 1, "--prompts is 0; expected at least 1"),
        (("--shots", -1), 1, "--shots is -1; expected 0 or more"),
    ],
)
def test_options_that_do_not_fit(command, source, data, tmp_path, more, status, says):
    code, _, err = command(*options(source, data, tmp_path / "run"), *more)
    assert code == status and says in err
    assert not (tmp_path / "run").exists()


def test_what_it_needs(command, data, tmp_path):
    out = ("--out", tmp_path / "run")
    assert "needs --clip NAME" in command("gdpl", data, *out)[2]
    code, _, err = command("gdpl", data, *out, "--clip", "ViT-B-16")
    assert code == 1 and "needs --domain-encoder NAME" in err and "--domain-features FILE" in err
