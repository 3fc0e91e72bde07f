"""Layers to be used in any PyTorch model: cluster attention, CLAdapter, quaternion, LoRA.

Each is an nn.Module around an operation of :mod:`fastadapt.kernels` or around PyTorch's own.
"""

from fastadapt.layers.cladapter import CLAdapter
from fastadapt.layers.cluster_attention import ClusterAttention
from fastadapt.layers.lora import LoRALinear
from fastadapt.layers.quaternion_linear import QuaternionLinear

__all__ = ["CLAdapter", "ClusterAttention", "LoRALinear", "QuaternionLinear"]
