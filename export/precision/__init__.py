"""Lower precisions of a folded model.

- ``half``: fp16 and bf16, with layers in fp32 where they need it.
- ``int8``: an ONNX file quantised on the user's images, if it is accurate and faster.
- ``fp8``: linear layers in e4m3 for AOTInductor, if that is accurate and faster.
"""
