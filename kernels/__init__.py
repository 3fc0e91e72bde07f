"""The operations, one file each: reference, kernels, autograd, registered operator, function."""

from fastadapt.kernels.cluster_attention import (
    center_attention,
    cluster_attention,
    cluster_attention_reference,
)
from fastadapt.kernels.dispatch import BackendError
from fastadapt.kernels.quaternion_linear import (
    quaternion_linear,
    quaternion_linear_reference,
    quaternion_matrix,
)

__all__ = [
    "BackendError",
    "center_attention",
    "cluster_attention",
    "cluster_attention_reference",
    "quaternion_linear",
    "quaternion_linear_reference",
    "quaternion_matrix",
]
