"""ONNX Runtime's own operators for a transformer on a GPU: what would each pass over memory, fused.

On a GPU a transformer's products are a third of its time in ONNX Runtime; the rest are passes over
the tokens. With the operators of its contrib domain there are fewer of them:

    bytes → ... → Conv → tokens             MatMul of patches, [B·N, p·p·3] × [p·p·3, C]
    MatMul, Add → q, k, v → attention       Attention: bias and heads in one pass
    MatMul, Add → Gelu                      MatMul → BiasGelu
    MatMul, Add → Mul by a layer scale      MatMul, Add: the scale is in weights and bias
    MatMul, Add → Add → LayerNormalization  MatMul → SkipLayerNormalization: bias, sum and norm

The patches' weights take over the normalisation of the bytes, W / (255 σ), and their bias its
mean. On a CPU the same operators are slower than the plain ones, so that files for CPUs have fused
attention alone (:mod:`export.backends.fused_attention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

DOMAIN = "com.microsoft"


def fuse_for_gpu(model: Any) -> None:
    """Exchange what ONNX Runtime computes in one operator on a GPU; leave everything else.

    Args:
        model: an ``onnx_ir.Model`` in fp16 whose attention is ``MultiHeadAttention``; changed in
            place.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    for fuse in (_attention, _bias_gelu, _layer_scale, _skip_layer_norm, _patches):
        for number, node in enumerate(list(graph)):
            fuse(_At(graph, node, f"{fuse.__name__}{number}"))
        RemoveUnusedNodesPass()(model)
    model.opset_imports.setdefault(DOMAIN, 1)
    graph.sort()


class _At:
    """A node of a graph, what leads to it, and what may take its place."""

    def __init__(self, graph: Any, node: Any, name: str):
        self.graph, self.node, self.name = graph, node, name
        self._count: Iterator[int] = itertools.count()

    def is_a(self, operator: str, domain: str = "") -> bool:
        """Tell whether the node is such an operator."""
        return _is_a(self.node, operator, domain)

    def add(
        self,
        operator: str,
        inputs: list[Any],
        domain: str = "",
        *,
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """Put an operator before the node; return it."""
        import onnx_ir

        name = f"{self.name}_{next(self._count)}"
        made = onnx_ir.node(
            operator, inputs, attributes, domain=domain, num_outputs=outputs, name=name
        )
        for index, value in enumerate(made.outputs):
            value.name = f"{made.name}_{index}"
        self.graph.insert_before(self.node, made)
        return made

    def constant(self, array: np.ndarray) -> Any:
        """Add weights; return their value."""
        import onnx_ir

        name = f"{self.name}_constant{next(self._count)}"
        tensor = onnx_ir.tensor(array, name=name)
        kind, shape = onnx_ir.TensorType(tensor.dtype), onnx_ir.Shape(array.shape)
        value = onnx_ir.Value(name=name, const_value=tensor, type=kind, shape=shape)
        self.graph.register_initializer(value)
        return value

    def replace(self, old: Any, new: Any) -> None:
        """Let what reads one value read another, of the same type."""
        new.type, new.shape = old.type, old.shape
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)


def _attention(at: _At) -> None:
    """Take bias, heads and attention of q, k and v together."""
    if not at.is_a("MultiHeadAttention", DOMAIN) or len(at.node.inputs) != 3:
        return
    sources = [_source_of_heads(value, place) for place, value in enumerate(at.node.inputs)]
    bias = sources[0]
    if bias is None or any(source is not bias for source in sources):
        return
    found = _biased_product(bias)
    heads = at.node.attributes["num_heads"].as_int()
    if found is None or (width := found[1].shape[1]) % (3 * heads):
        return
    scale = at.node.attributes.get("scale")
    more = {} if scale is None else {"scale": scale.as_float()}
    product, _, constant = found
    made = at.add("Attention", [*product.inputs, constant], DOMAIN, num_heads=heads, **more)
    at.replace(at.node.outputs[0], made.outputs[0])
    # The exporter's graph gives the tokens their shape once more, which they have by now.
    tokens = made.outputs[0]
    while len(uses := list(tokens.uses())) == 1 and _is_a(uses[0][0], "Reshape"):
        tokens = uses[0][0].outputs[0]
    for user, index in uses:
        if _is_a(user, "MatMul") and index == 0 and _rows(user) == width // 3:
            user.replace_input_with(0, made.outputs[0])


def _source_of_heads(value: Any, place: int) -> Any | None:
    """Return what q (0), k (1) or v (2) is taken from, [B, N, 3·C]; ``None`` for another way."""
    nodes = _chain(value, ("Reshape", "Transpose", "Squeeze", "Slice", "Transpose", "Reshape"))
    if nodes is None:
        return None
    first, cut, order, shape = nodes[1], nodes[3], nodes[4], _array(nodes[5].inputs[1])
    if _perm(first) != [0, 2, 1, 3] or _perm(order) != [2, 0, 3, 1, 4]:
        return None
    starts, axes = (_array(cut.inputs[index]) for index in (1, 3))
    if starts is None or axes is None or starts.tolist() != [place] or axes.tolist() != [0]:
        return None
    fits = shape is not None and shape.size == 5 and shape[2] == 3
    return nodes[5].inputs[0] if fits else None


def _bias_gelu(at: _At) -> None:
    if not at.is_a("Gelu"):
        return
    how = at.node.attributes.get("approximate")
    found = _biased_product(at.node.inputs[0])
    if found is not None and (how is None or how.as_string() == "none"):
        product, _, bias = found
        made = at.add("BiasGelu", [product.outputs[0], bias], DOMAIN)
        at.replace(at.node.outputs[0], made.outputs[0])


def _layer_scale(at: _At) -> None:
    """Multiply a layer's weights and bias by the scale after it."""
    if not at.is_a("Mul"):
        return
    for value, scale in (at.node.inputs, at.node.inputs[::-1]):
        found, factors = _biased_product(value), _array(scale)
        if found is None or factors is None or factors.size != found[1].shape[1]:
            continue
        product, weight, bias = found
        dtype, factors = weight.dtype.numpy(), factors.reshape(-1).astype(np.float64)
        scaled = [at.constant((_array(v) * factors).astype(dtype)) for v in (weight, bias)]
        y = at.add("MatMul", [product.inputs[0], scaled[0]]).outputs[0]
        at.replace(at.node.outputs[0], at.add("Add", [y, scaled[1]]).outputs[0])
        return


def _skip_layer_norm(at: _At) -> None:
    """Take a product's bias, the residual sum, which is read later as well, and LayerNorm."""
    if not at.is_a("LayerNormalization") or len(at.node.inputs) != 3:
        return
    total = at.node.inputs[0].producer()
    if total is None or not _is_a(total, "Add"):
        return
    for stream, branch in (total.inputs, total.inputs[::-1]):
        found = _biased_product(branch)
        if found is None or stream.is_initializer() or len(list(branch.uses())) > 1:
            continue
        product, _, bias = found
        made = at.add(
            "SkipLayerNormalization",
            [stream, product.outputs[0], *at.node.inputs[1:], bias],
            DOMAIN,
            epsilon=at.node.attributes["epsilon"].as_float(),
            outputs=4,
        )
        at.replace(at.node.outputs[0], made.outputs[0])
        at.replace(total.outputs[0], made.outputs[3])
        return


def _patches(at: _At) -> None:
    """Multiply the bytes of patches where a convolution would first lay out the image anew."""
    if not at.is_a("Transpose") or _perm(at.node) != [0, 2, 1]:
        return
    before = _chain(
        at.node.inputs[0], ("Reshape", "Conv", "Cast", "Div", "Sub", "Div", "Transpose", "Cast")
    )
    if before is None or _perm(before[6]) != [0, 3, 1, 2]:
        return
    convolution, images = before[1], before[7].inputs[0]
    constants = [_array(v) for v in convolution.inputs[1:]]
    constants += [_array(node.inputs[1]) for node in before[3:6]]
    if len(constants) != 5 or any(c is None for c in constants):
        return
    if images.dtype.numpy() != np.uint8 or not _is_patchwise(convolution, images):
        return
    weight, bias, std, mean, top = (c.astype(np.float64) for c in constants if c is not None)
    std, mean, top = (np.broadcast_to(c.reshape(-1), 3) for c in (std, mean, top))
    channels, _, patch, _ = weight.shape
    rows = (weight / (top * std)[:, None, None]).transpose(2, 3, 1, 0).reshape(-1, channels)
    moved = bias - (weight * (mean / std)[:, None, None]).sum((1, 2, 3))
    width, dtype = images.shape[2], convolution.inputs[1].dtype
    count = images.shape[1] // patch * (width // patch)
    shapes = ([-1, patch, width // patch, patch * 3], [-1, count, patch * patch * 3])
    first, last = (at.constant(np.array(shape, np.int64)) for shape in shapes)
    bytes_ = at.add("Reshape", [images, first]).outputs[0]
    bytes_ = at.add("Transpose", [bytes_], perm=[0, 2, 1, 3]).outputs[0]
    bytes_ = at.add("Reshape", [bytes_, last]).outputs[0]
    pixels = at.add("Cast", [bytes_], to=int(dtype)).outputs[0]
    rows, moved = (at.constant(array.astype(dtype.numpy())) for array in (rows, moved))
    product = at.add("MatMul", [pixels, rows]).outputs[0]
    at.replace(at.node.outputs[0], at.add("Add", [product, moved]).outputs[0])


def _is_patchwise(convolution: Any, images: Any) -> bool:
    """Tell whether a convolution's steps are as long as its kernel, and fill the image."""
    given = {name: attribute.value for name, attribute in convolution.attributes.items()}
    kernel = list(convolution.inputs[1].shape)[2:]
    return (
        kernel[0] == kernel[1]
        and list(given.get("strides", ())) == kernel
        and not any(given.get("pads", ()))
        and given.get("group", 1) == 1
        and set(given.get("dilations", (1,))) == {1}
        and all(isinstance(n, int) and n % kernel[0] == 0 for n in list(images.shape)[1:3])
    )


def _biased_product(value: Any) -> tuple[Any, Any, Any] | None:
    """Return product, weights and bias of x W + b with constants; ``None`` for another value."""
    node = value.producer()
    if node is None or not _is_a(node, "Add") or _array(node.inputs[1]) is None:
        return None
    product = node.inputs[0].producer()
    if product is None or not _is_a(product, "MatMul"):
        return None
    weight, bias = product.inputs[1], node.inputs[1]
    fits = weight.const_value is not None and len(weight.shape) == 2 and len(bias.shape) == 1
    return (product, weight, bias) if fits else None


def _chain(value: Any, operators: tuple[str, ...]) -> list[Any] | None:
    """Return the nodes that led to a value, the last first; ``None`` if they are others."""
    nodes = []
    for operator in operators:
        node = value.producer()
        if node is None or not _is_a(node, operator):
            return None
        nodes.append(node)
        value = node.inputs[0]
    return nodes


def _rows(product: Any) -> int | None:
    weight = _array(product.inputs[1])
    return None if weight is None else weight.shape[0]


def _is_a(node: Any, operator: str, domain: str = "") -> bool:
    return node.op_type == operator and node.domain == domain


def _perm(node: Any) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _array(value: Any) -> np.ndarray | None:
    """Return a constant's array; ``None`` for what is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()
