"""A linear layer with all that follows it in the product's epilogue, in half precision or e4m3.

reference.py  the formulation in plain PyTorch
op.py         the function, the choice of the backend
checks.py     shapes and dtypes that it takes
cublas.py     cuBLASLt's products, called directly
"""
