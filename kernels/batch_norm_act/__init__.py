"""Batch norm in training, with the activation that follows it, of images with the channels last.

reference.py       the formulation in plain PyTorch
op.py              the public function, autograd, the choice of the backend
launches.py        which kernels run, on which tiles
triton_kernels.py  statistics, normalization, and the sums and the gradient of the backward
"""
