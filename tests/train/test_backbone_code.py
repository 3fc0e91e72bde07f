"""Features of a backbone of one's own are those of its code, too, and not only of its weights."""

import gc
from functools import partial

from torch import nn

import fastadapt as fa
from fastadapt.train.backbone_code import describe_code


def make_net(act, scale=1, negate=False):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.scale = nn.Conv2d(3, 8, 4, 4), act, scale

        if negate:

            def forward(self, x):
                return -self.scale * self.act(self.conv(x))

        else:

            def forward(self, x):
                return self.scale * self.act(self.conv(x))

    return Net()


def scaled(factor):
    def features(module, x):
        return factor * module(x)

    return features


def halved(depth):
    def features(module, x):
        def step(x, left):
            return step(x / 2, left - 1) if left else module(x)

        return again(x, depth, step)

    def again(x, left, step):
        return again(x, left - 2, step) if left > 1 else step(x, left)

    return features


def described(net, features=None):
    config = fa.AdaptConfig(
        "none", input_size=(3, 8, 8), layout="channels_first", features=features
    )
    return describe_code(fa.adapt(net, config, 2))


def test_code_is_told_apart_and_not_its_copies():
    nets = [
        partial(make_net, nn.ReLU()),
        partial(make_net, nn.Tanh()),
        partial(make_net, nn.ReLU(), 2),
        partial(make_net, nn.ReLU(), 1, True),
    ]
    found = [described(net()) for net in nets]
    assert [described(net()) for net in nets] == found
    for factor in (1, 2):  # the first is gone before the second is made, perhaps in its place
        found.append(described(nets[0](), scaled(factor)))
        gc.collect()
    assert described(nets[0](), scaled(2)) == found[-1]
    found.append(described(nets[0](), partial(lambda factor, module, x: module(x), 3)))
    found += [described(nets[0](), halved(depth)) for depth in (2, 3)]
    for one in found:
        assert found.count(one) == 1


def test_a_named_backbone_is_described_by_its_name_and_weights():
    model = fa.adapt("test_vit", fa.AdaptConfig("none"), 2, pretrained=False)
    assert describe_code(model) == []
