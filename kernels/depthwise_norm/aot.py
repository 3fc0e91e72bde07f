"""A depthwise convolution and the LayerNorm after it as one operator that compilers look into.

As :mod:`fastadapt.kernels.cluster_attention.aot`: what AOTInductor compiles holds the kernel.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, block
from .block_sizes import tile_for
from .triton_kernels import depthwise_norm_kernel

KERNELS = (depthwise_norm_kernel.__name__,)
# The rule for tiles asks no GPU for what was tuned there: what is compiled runs on others.
_ANY = Device(None, 132, 232_448, 0)


@triton_op("fastadapt::depthwise_layer_norm", mutates_args=())
def depthwise_layer_norm(
    x: Tensor, taps: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Convolve each channel with its 7 × 7 filter, and apply LayerNorm over the channels.

    For inference, there is no backward. Batches may be dynamic.

    Args:
        x: [B, H, W, C]; fp32, bf16 or fp16.
        taps: [49, C], the filters' in the order of rows.
        bias: [C], of the convolution.
        norm_weight, norm_bias: [C], of the norm.
        eps: added to the variance.

    Returns:
        [B, H, W, C] in x's dtype, contiguous.
    """
    batch, height, width, channels = x.shape
    x, taps, bias, norm_weight, norm_bias = (
        t.contiguous() for t in (x, taps, bias, norm_weight, norm_bias)
    )
    out = x.new_empty(batch, height, width, channels)
    tile = tile_for((1, height, width, channels), _ANY)
    across = ceil_div(ceil_div(width, tile.strip), tile.strips)
    wrap_triton(depthwise_norm_kernel)[(across * ceil_div(height, tile.rows), batch)](
        x,
        taps,
        bias,
        norm_weight,
        norm_bias,
        out,
        height,
        width,
        C=channels,
        BC=block(channels),
        STRIP=tile.strip,
        BN=tile.strips,
        ROWS=tile.rows,
        BIAS_MAP=False,
        EPS=eps,
        FACTOR=1.0,
        PDL=False,
        num_warps=tile.warps,
    )
    return out
