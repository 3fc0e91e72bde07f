import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.train.trials import Features, Trial, pooled, score_of, without_backbone

CLASSES = ("one", "two")
CPU = torch.device("cpu")
ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=0.5)
QUICK = TrainConfig(epochs=12, lr=2e-2, batch_size=8)


@pytest.fixture
def features():
    """Two classes that differ in one channel; the second view is noisier."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    values = rng.normal(0, 0.3, (2, 40, 4, 8)).astype(np.float16)
    values[..., 2] += 3 * labels[None, :, None]
    values[1] += rng.normal(0, 0.2, values[1].shape)
    return Features(values, labels, CLASSES, CPU)


def test_a_trial_learns_and_every_run_begins_anew(features):
    trial = Trial(features, QUICK, ADAPT)
    train, held_out = np.arange(30), np.arange(30, 40)
    first = trial.run(train, held_out, seed=3)
    assert score_of(first, features.labels[held_out], CLASSES, "accuracy") == 1.0
    other = trial.run(train, held_out, seed=4)
    assert not torch.equal(first, other)
    # Neither parameters nor the optimizer's moments of an earlier run are left.
    assert torch.equal(trial.run(train, held_out, seed=3), first)
    assert torch.equal(Trial(features, QUICK, ADAPT).run(train, held_out, seed=3), first)
    # Tensors give what arrays do.
    tensors = Features(torch.from_numpy(features.values), features.labels, CLASSES, CPU)
    assert torch.equal(Trial(tensors, QUICK, ADAPT).run(train, held_out, seed=3), first)
    views = Trial(features, TrainConfig(**{**vars(QUICK), "augment": "flips", "views": 2}), ADAPT)
    assert not torch.equal(views.run(train, held_out, seed=3), first)


def test_steps_are_captured_once_for_all_folds(features, stand_in):
    trial = Trial(features, TrainConfig(epochs=8, lr=1e-2, batch_size=8), ADAPT)
    eager = TrainConfig(epochs=8, lr=1e-2, batch_size=8, cuda_graph="off")
    plain = Trial(features, eager, ADAPT)
    for seed in (1, 2):
        rows = np.arange(32), np.arange(32, 40)
        assert torch.equal(trial.run(*rows, seed=seed), plain.run(*rows, seed=seed))


def test_a_loss_that_is_not_finite_ends_the_trial(features):
    bad = Features(np.full_like(features.values, np.nan), features.labels, CLASSES, CPU)
    with pytest.raises(InputError, match="the loss is nan at step 1"):
        Trial(bad, QUICK, ADAPT).run(np.arange(30), np.arange(30, 40), seed=0)
    with pytest.raises(InputError, match="leave LoRA out"):
        without_backbone(features.spec, fa.AdaptConfig(lora=fa.LoRAConfig()), 2)


def test_scores_are_better_when_larger():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), np.array([0, 1, 1])
    assert score_of(logits, labels, CLASSES, "accuracy") == pytest.approx(2 / 3)
    assert score_of(logits, labels, CLASSES, "macro_f1") == pytest.approx(2 / 3)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    assert score_of(logits, labels, CLASSES, "loss") == pytest.approx(-loss)


def test_positions_are_pooled_as_neighbours():
    x = torch.arange(2 * 36 * 3, dtype=torch.float32).view(2, 36, 3)
    found = pooled(x.numpy().astype(np.float16), (6, 6), 9)
    assert found.shape == (2, 9, 3) and found.dtype == torch.float32
    expected = x.view(2, 3, 2, 3, 2, 3).mean((2, 4)).view(2, 9, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pooled(x, (), 10), expected)  # tokens of a square
    assert torch.equal(pooled(x, (6, 6), 36), x)
    torch.testing.assert_close(pooled(x[:, :35], (), 7), x[:, :35].view(2, 7, 5, 3).mean(2))
    assert pooled(x, (6, 6), 1).shape == (2, 1, 3)
    assert pooled(x[:, :24], (2, 3, 4), 8).shape == (2, 8, 3)  # a volume
