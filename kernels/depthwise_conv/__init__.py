"""Depthwise convolution of images with the channels last.

reference.py       the formulation in plain PyTorch
op.py              the public function, autograd, the choice of the backend
triton_kernels.py  forward, gradient of the input, gradient of the weight
"""
