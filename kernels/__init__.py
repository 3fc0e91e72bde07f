"""The operations, one file each: reference, kernels, autograd, registered operator, function."""

from .cluster_attention.op import cluster_attention
from .cluster_attention.reference import center_attention, cluster_attention_reference
from .common.dispatch import BackendError
from .layer_norm.op import layer_norm
from .layer_norm.op_mean import layer_norm_mean
from .layer_norm.op_twice import layer_norm_twice
from .layer_norm.reference import (
    layer_norm_mean_reference,
    layer_norm_reference,
    layer_norm_twice_reference,
)
from .quaternion_linear.op import quaternion_linear
from .quaternion_linear.reference import quaternion_linear_reference, quaternion_matrix
from .residual_mlp.op import residual_mlp
from .residual_mlp.reference import residual_mlp_reference

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
