"""Fuse the operations of a frozen backbone, which needs no gradients.

``frozen_blocks`` runs transformer and ConvNeXt blocks fused in half precision on a GPU,
``batch_norm`` merges batch norms into convolutions for a CPU.
"""
