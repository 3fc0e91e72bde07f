"""The operations, a folder each, and what they share in ``common/``.

The same file names mean the same in every folder: ``reference`` plain PyTorch, ``op`` the public
function with its autograd, ``checks`` what it takes, ``block_sizes`` the rules for tiles,
``launches*`` which kernels run, ``triton_*`` and ``hopper_*`` the kernels.

An operation's function and its folder share a name. The functions are bound here, so that
``fastadapt.kernels.layer_norm`` is the function, whatever was imported before.
"""

from .batch_norm_act.op import batch_norm_act
from .batch_norm_act.reference import batch_norm_act_reference
from .cluster_attention.op import cluster_attention
from .cluster_attention.reference import center_attention, cluster_attention_reference
from .common.dispatch import BackendError
from .depthwise_conv.op import depthwise_conv2d
from .depthwise_conv.reference import depthwise_conv2d_reference
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
    "batch_norm_act",
    "batch_norm_act_reference",
    "center_attention",
    "cluster_attention",
    "cluster_attention_reference",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
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
