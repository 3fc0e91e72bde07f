import torch

from fastadapt.train.average import WeightAverage


def test_the_average_follows_its_equation_and_lends_itself_to_the_model():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 12):
        with torch.no_grad():
            model.weight += step
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    own, place = model.weight.detach().clone(), model.weight.data_ptr()
    assert set(average.tensors()) == {"weight"}
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
        assert model.weight.data_ptr() == place  # a captured step keeps its addresses
    assert torch.equal(model.weight, own)
    again = WeightAverage(model, 0.5, average.tensors())
    torch.testing.assert_close(again.tensors(), average.tensors(), rtol=0, atol=0)
