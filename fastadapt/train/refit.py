"""Go back to a model's weights from before training, to train again on more images.

1. The run trains on the training images; validation chooses the epoch, and judges.
2. What this model gives for validation and test images is kept: the *held-out* figures.
3. The model trains again from its initial weights, on training and validation images together, for
   as many epochs. No image is left to choose an epoch by: the last one is kept.

AutoML tools know the third step as ``refit_full``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import trained_state
from fastadapt.train.config import TrainConfig


@dataclass(frozen=True)
class InitialWeights:
    """The weights of a model before training, on the CPU.

    Attributes:
        tensors: that training is going to change, by name.
        backbone_trained: what a checkpoint will hold of the backbone, as the model says it.
    """

    tensors: dict[str, Tensor]
    backbone_trained: bool

    @classmethod
    def of(cls, model: AdaptedModel, config: TrainConfig) -> Self:
        """Copy them.

        Args:
            model: before its first step.
            config: how it is going to be trained.
        """
        whole = config.full or config.stages == 2
        tensors = model.state_dict() if whole else trained_state(model)
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(copies, model.backbone_trained)

    def restore(self, model: AdaptedModel) -> None:
        """Give the model its initial weights back, in place, with its backbone frozen again."""
        model.load_state_dict(self.tensors, strict=False)
        model.backbone_trained = self.backbone_trained
        model.freeze()
