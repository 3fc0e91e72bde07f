"""The layers that a user drops into a model."""

from fastadapt.layers.cladapter import CLAdapter
from fastadapt.layers.cluster_attention import ClusterAttention
from fastadapt.layers.lora import LoRALinear
from fastadapt.layers.quaternion_linear import QuaternionLinear

__all__ = ["CLAdapter", "ClusterAttention", "LoRALinear", "QuaternionLinear"]
