"""Let mypy take the attributes of a module as what they are, not as `Tensor | Module`.

PyTorch declares that any attribute which a class does not declare itself is one or the other, so
that `model.blocks[0].attn.qkv` is an error at every step. Here it is `Any`, as in untyped Python.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

UNDECLARED = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


def attribute_type(context: AttributeContext) -> Type:
    """Return `Any` where the class says nothing but `Tensor | Module`."""
    found = get_proper_type(context.default_attr_type)
    if isinstance(found, UnionType):
        names = {str(get_proper_type(item)) for item in found.items}
        if names == UNDECLARED:
            return AnyType(TypeOfAny.explicit)
    return context.default_attr_type


class Modules(Plugin):
    """Look at every attribute that a class takes from `__getattr__`."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """Return the function that decides an attribute's type."""
        return attribute_type


def plugin(version: str) -> type[Plugin]:
    """Return the plugin, for mypy of any version."""
    return Modules
