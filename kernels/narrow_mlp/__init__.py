"""An MLP of few channels in one kernel: its hidden numbers never reach memory.

reference.py       the formulation in plain PyTorch
op.py              the public function, the choice of the backend
checks.py          shapes and dtypes that it takes
block_sizes.py     the rules for tiles and warps of a launch, and the variants to be timed
launches.py        the launch
triton_kernels.py  the kernel
"""
