"""Mix the images of a training batch, or their cached features: mixup and cutmix.

    (1) mixup:  x = λ x_i + (1 − λ) x_j,                   λ ~ Beta(α, α)
    (2) cutmix: x = x_i with a rectangle of x_j,           λ: the share of x_i that is left
    (3) target: λ of the class of i, 1 − λ of that of j

j is the image before i in the batch, whose order is random. λ is one number for the batch. Cached
features can only be mixed as in (1): the frozen backbone is not computed again, so that what is
mixed is its output (manifold mixup at the last layer), not its input.

Sources: mixup (Zhang et al. 2017), cutmix (Yun et al. 2019), manifold mixup (Verma et al. 2018);
torchvision's ``MixUp`` and ``CutMix``, which draw from PyTorch's generator of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_mix(mixup: float, cutmix: float, num_classes: int, images: bool) -> Mix | None:
    """Return a function that mixes a batch, or None where nothing is mixed.

    Args:
        mixup: α of (1); 0 for none.
        cutmix: α of (2); 0 for none. Where both are given, one of them is drawn for each batch.
        num_classes: of the labels.
        images: whether inputs are images; features are mixed by (1) only.

    Returns:
        ``mix(inputs, labels)``: inputs [B, …] of the same dtype, and the shares of the classes
        [B, num_classes] fp32. Nothing waits for a GPU.
    """
    if not (mixup or (cutmix and images)):
        return None
    from torchvision.transforms import v2

    chosen: list[Callable[..., tuple[Tensor, Tensor]]] = []
    if mixup:
        chosen.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix and images:
        chosen.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def mix(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        which = int(torch.randint(len(chosen), ())) if len(chosen) > 1 else 0
        # torchvision wants four dimensions; tokens [B, N, C] have three.
        shaped = inputs if inputs.dim() == 4 else inputs.flatten(1)[:, None, None]
        mixed, shares = chosen[which](shaped, labels)
        return mixed.reshape(inputs.shape), shares

    return mix
