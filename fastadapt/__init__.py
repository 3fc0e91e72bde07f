"""fastadapt: fused layers that adapt frozen vision models, and an exporter that ships them."""

from fastadapt import kernels

__all__ = ["kernels"]
__version__ = "0.1.0"
