"""The operations, one file each: reference, kernels, autograd, registered operator, function."""

from fastadapt.kernels.cluster_attention import (
    center_attention,
    cluster_attention,
    cluster_attention_reference,
)
from fastadapt.kernels.dispatch import BackendError
from fastadapt.kernels.layer_norm import layer_norm, layer_norm_reference
from fastadapt.kernels.layer_norm_mean import layer_norm_mean, layer_norm_mean_reference
from fastadapt.kernels.layer_norm_twice import layer_norm_twice, layer_norm_twice_reference
from fastadapt.kernels.quaternion_linear import (
    quaternion_linear,
    quaternion_linear_reference,
    quaternion_matrix,
)
from fastadapt.kernels.residual_mlp import residual_mlp, residual_mlp_reference

__all__ = [
    "BackendError",
    "center_attention",
    "cluster_attention",
    "cluster_attention_reference",
    "layer_norm",
    "layer_norm_mean",
    "layer_norm_mean_reference",
    "layer_norm_reference",
    "layer_norm_twice",
    "layer_norm_twice_reference",
    "quaternion_linear",
    "quaternion_linear_reference",
    "quaternion_matrix",
    "residual_mlp",
    "residual_mlp_reference",
]
