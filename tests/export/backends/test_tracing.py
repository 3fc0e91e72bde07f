import pytest
import torch
from torch import nn

from fastadapt.export.backends.tracing import dynamic_shapes, fold_constants


@pytest.mark.parametrize("count", [1, 2])
def test_every_input_has_the_dynamic_batch(count):
    class Model(nn.Module):
        def forward(self, images, *others):
            return images.sum((1, 2, 3)) + sum(x.sum(1) for x in others)

    example = (torch.rand(2, 3, 4, 4), torch.rand(2, 5))[:count]
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    shapes = dynamic_shapes(Model(), batch, count)
    program = torch.export.export(Model(), example, dynamic_shapes=shapes)
    assert program.module()(*(x[:1].repeat(7, *[1] * (x.dim() - 1)) for x in example)).shape == (7,)


def test_what_weights_alone_give_is_computed_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.rand(1, 4, 2, 2))
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            table = nn.functional.interpolate(self.table, (3, 3), mode="bicubic", antialias=True)
            return self.linear(x) + table.to(torch.float32).flatten(2).mean(2)

    model, x = Model().eval(), torch.rand(2, 4)
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    with torch.no_grad():
        folded = fold_constants(torch.export.export(model, (x,), dynamic_shapes=shapes))
        program = torch.export.export(folded, (x,), dynamic_shapes=shapes)
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert [name for name in calls if "sym" not in name and "assert" not in name] == [
            "aten.linear.default",
            "aten.add.Tensor",
        ]
        x = torch.rand(5, 4)
        torch.testing.assert_close(program.module()(x), model(x))
        plain = torch.export.export(model.linear, (x,))
    assert fold_constants(plain) is None
