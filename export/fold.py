"""Folding: what was learned becomes ordinary layers, on a copy, checked layer by layer.

- Low-rank adapters are merged: ``W + scaling · B @ A`` in fp64, rounded once.
- GDPL's coupled low-rank updates are merged into the attention of both branches, likewise.
- GDPL's prompt networks become two linear layers (``FoldedPromptLearner``).
- Quaternion layers become nn.Linear. In Hamilton form the weights are copies with signs, bit for
  bit; in rotation form they are computed in fp64 and rounded once.
- Cluster attention becomes :class:`FoldedClusterAttention`: ordinary operators, the constants
  computed beforehand. Its mixing depends on the input, so it cannot vanish.
- A head's temperature divides its weights, in fp64 and rounded once.
- Dropouts are switched off, and a timm backbone's classifier, which the adapter replaces, is
  dropped.

LayerNorms stay. The last one's weights could be merged into the head exactly; but a LayerNorm is
one fused operator with or without weights, and ``forward_features`` would no longer be the same.
Nor is up-projection worth merging into the transforms ([K, R, R] to [K, R, C]): it saves about 1 %
of the adapter's work and triples the weights that every call reads.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from fastadapt import backbones
from fastadapt.adapted_model import AdaptedModel
from fastadapt.errors import InputError
from fastadapt.gdpl.fold import FoldedPromptLearner, MergedProjection, merge_low_rank
from fastadapt.gdpl.model import GDPLModel
from fastadapt.gdpl.prompts import DomainPromptLearner
from fastadapt.layers import ClusterAttention, LoRALinear, QuaternionLinear
from fastadapt.layers.calibrated_linear import CalibratedLinear
from fastadapt.pyramid import PYRAMIDS

from .folded_layers import FoldedClusterAttention, GroupedLinear, probe_input

# Largest error of a folded layer, of the largest value of its output. Both layers are evaluated in
# fp64, so this is the rounding of the folded weights alone: some 1e-7 in fp32. The bounds allow for
# cancellation, and not for a wrong factor or a transposed block.
ERROR_BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class FoldedLayer:
    """One folded layer in the report.

    Attributes:
        name: of the layer in the model.
        kind: name of its class.
        folded: describes what replaced it.
        weight_change: relative Frobenius norm of the merged update; ``None`` where nothing is
            added to a weight.
        error: largest difference to the unfolded layer, over the largest value of its output.
        bound: the error from which folding is refused.
        probe: the input that the error was measured on: ``"example"`` (the layer's activations)
            or ``"noise"`` (no example given, or the layer's weight is used without calling it).
    """

    name: str
    kind: str
    folded: str
    weight_change: float | None
    error: float
    bound: float
    probe: str


@dataclass(frozen=True)
class FoldReport:
    """What folding did to every layer.

    Attributes:
        layers: in the model's order.
        dropped: names of modules that inference does not use.
    """

    layers: tuple[FoldedLayer, ...]
    dropped: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        """The largest error of all layers; 0 if none was folded."""
        return max((layer.error for layer in self.layers), default=0.0)

    @property
    def summary(self) -> str:
        """One line: the number of layers of each kind, and the largest error."""
        if not self.layers:
            return "no layers to fold"
        kinds = Counter(row.kind for row in self.layers)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{counted}; largest error {self.max_error:.1e}"

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest records."""
        return {"layers": [asdict(row) for row in self.layers], "dropped": list(self.dropped)}

    def __rich__(self) -> Table:
        table = Table(title=self.summary, title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("layer", "kind", "folded into"):
            table.add_column(column)
        for column in ("weight change", "error", "measured on"):
            table.add_column(column, justify="right")
        for row in self.layers:
            change = "–" if row.weight_change is None else f"{row.weight_change:.1e}"
            table.add_row(row.name, row.kind, row.folded, change, f"{row.error:.1e}", row.probe)
        for name in self.dropped:
            table.add_row(name, "unused", "dropped", "–", "–", "–")
        return table


def fold(model: nn.Module) -> nn.Module:
    """Fold a copy of a model: ordinary layers only, in evaluation mode, without gradients.

    Args:
        model: any module that holds this library's layers, usually an
            :class:`fastadapt.AdaptedModel` or a :class:`fastadapt.gdpl.GDPLModel`. It is not
            changed.

    Returns:
        A module of the same class, device and dtype, whose outputs are the same up to rounding.

    Raises:
        InputError: a weight holds NaN or infinity, or a folded layer does not do what the unfolded
            one does; the layer is named.
    """
    return fold_with_report(model)[0]


@torch.no_grad()
def fold_with_report(
    model: nn.Module, example: Tensor | tuple[Tensor, ...] | None = None
) -> tuple[nn.Module, FoldReport]:
    """Fold a copy of a model as :func:`fold` does, and report on every layer.

    Args:
        model: as for :func:`fold`.
        example: an input of the model (normalised images [B, C, H, W], say; two are enough), or
            all its inputs. Every layer's error is then measured on the activations that reach it.

    Returns:
        The folded copy and a :class:`FoldReport`.

    Raises:
        InputError: as for :func:`fold`.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    folded = copy.deepcopy(model).requires_grad_(False).eval()
    dropped = _drop_unused(folded)
    originals = dict(model.named_modules())
    rows = [_merged_row(part) for m in folded.modules() for part in _merge_coupled(m)]

    # Every layer is folded and validated before the first one is swapped.
    changes: dict[str, Folding] = {}
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in folded.named_modules():
        rule = next((rule for kind, rule in RULES.items() if isinstance(layer, kind)), None)
        if rule is None or any(name.startswith(f"{done}.") for done in changes if done):
            continue
        _check_finite(layer, name, "its weights")
        change = changes[name] = rule(layer)
        change.layer.requires_grad_(False).eval()
        _check_finite(change.layer, name, f"folded to {_dtype(change.layer)}, its weights")
        swaps[layer] = change.layer
    # Modules that occur more than once are swapped under each of their names.
    for name, layer in list(folded.named_modules(remove_duplicate=False)):
        if name and layer in swaps:
            folded.set_submodule(name, swaps[layer])
    folded = swaps.get(folded, folded)
    _check_finite(folded, "", "its weights")

    layers = {name: change.layer for name, change in changes.items()}
    inputs = {} if example is None else _activations(folded, example, layers)
    for name, change in changes.items():
        reached = inputs.get(name)
        activations = reached or [probe_input(originals[name])]
        row = _compare_layers(name, originals[name], change, activations)
        rows.append(replace(row, probe="example" if reached else "noise"))
    return folded, FoldReport(tuple(rows), tuple(dropped))


class Folding(NamedTuple):
    """What replaces a layer.

    Attributes:
        layer: the ordinary layer.
        description: of it, for the report.
        weight_change: as in :class:`FoldedLayer`.
    """

    layer: nn.Module
    description: str
    weight_change: float | None = None


def _compare_layers(
    name: str, layer: nn.Module, change: Folding, inputs: list[Tensor]
) -> FoldedLayer:
    """Compare a layer with what replaces it; raise InputError if they differ."""
    new, description, weight_change = change
    kind, bound = type(layer).__name__, ERROR_BOUNDS[_dtype(new)]
    errors = [layer_error(layer, new, x) for x in inputs]
    error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if not error <= bound:
        raise InputError(
            f"{name or 'the model'} ({kind}) was folded to {description}, which differs from it by "
            f"{error:.1e} of its output's scale; at most {bound:.0e} is rounding. Nothing was "
            "folded: please report this layer."
        )
    return FoldedLayer(name, kind, description, weight_change, error, bound, probe="noise")


def layer_error(layer: nn.Module, folded: nn.Module, x: Tensor) -> float:
    """Return the largest difference of two layers' outputs over the first one's largest value.

    Both are evaluated in fp64 on the CPU, so that the folding is measured: neither the arithmetic
    of a dtype, nor TF32, nor the kernels.
    """
    x = x.detach().cpu().double()
    truth = _flat(copy.deepcopy(layer).cpu().double().eval()(x))
    error = (_flat(copy.deepcopy(folded).cpu().double()(x)) - truth).abs().max().item()
    scale = truth.abs().max().item()
    return error / scale if scale > 0 else error


def _flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    parts = (output,) if isinstance(output, Tensor) else output
    return torch.cat([part.flatten() for part in parts])


def _merge_coupled(module: nn.Module) -> list[MergedProjection]:
    """Merge GDPL's low-rank updates, which no layer holds: they belong to two branches at once."""
    return merge_low_rank(module) if isinstance(module, GDPLModel) else []


def _merged_row(part: MergedProjection) -> FoldedLayer:
    _check_finite(part.after, part.name, "its merged weights")
    rank = len(part.before.a)
    description = f"Linear {_size(part.after)}, rank {rank} merged"
    change = Folding(part.after, description, part.weight_change)
    return _compare_layers(part.name, part.before, change, [probe_input(part.before)])


def _fold_prompt_learner(layer: DomainPromptLearner) -> Folding:
    folded = FoldedPromptLearner(layer)
    widths = (layer.feature_dim, folded.linear2.in_features, folded.linear2.out_features)
    return Folding(folded, f"2 Linear {'→'.join(map(str, widths))}, constants")


def _fold_lora(layer: LoRALinear) -> Folding:
    weight = layer.base.weight
    delta = layer.delta(torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    change = (delta.norm() / weight.double().norm().clamp_min(tiny)).item()
    # The wrapped layer itself stays, so that a subclass of nn.Linear is still one.
    layer.base.weight = nn.Parameter((weight.double() + delta).to(weight.dtype))
    ranks = "+".join(str(s.r) for s in layer.slices)
    return Folding(layer.base, f"Linear {_size(layer)}, rank {ranks} merged", change)


def _fold_quaternion(layer: QuaternionLinear) -> Folding:
    dtype = layer.r_weight.dtype
    # In Hamilton form the entries are copies, so that fp64 and back changes nothing.
    matrix = copy.deepcopy(layer).double().dense_matrix().to(dtype)
    weight = matrix.transpose(-1, -2).contiguous()
    size = f"{weight.shape[-1]}→{layer.out_features}"
    if layer.groups is not None:
        return Folding(GroupedLinear(weight, layer.bias), f"{layer.groups} Linear {size}")
    linear = nn.Linear(weight.shape[1], layer.out_features, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", layer.bias)
    return Folding(linear, f"Linear {size}")


def _fold_cluster_attention(layer: ClusterAttention) -> Folding:
    k, width = layer.transforms.shape[:2]
    return Folding(FoldedClusterAttention(layer), f"{k} transforms {width}×{width}")


def _fold_calibrated(layer: CalibratedLinear) -> Folding:
    def divided(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter((tensor.double() / layer.temperature).to(tensor.dtype))

    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight = divided(layer.weight)
    linear.register_parameter("bias", None if layer.bias is None else divided(layer.bias))
    return Folding(linear, f"Linear {_size(layer)}, divided by {layer.temperature:.4g}")


# A rule takes a layer of the copy and returns what replaces it.
RULES: dict[type[nn.Module], Callable[[Any], Folding]] = {
    LoRALinear: _fold_lora,
    QuaternionLinear: _fold_quaternion,
    ClusterAttention: _fold_cluster_attention,
    DomainPromptLearner: _fold_prompt_learner,
    CalibratedLinear: _fold_calibrated,
}


def _drop_unused(folded: nn.Module) -> list[str]:
    """Remove modules that inference does not use, and return their names."""
    for module in folded.modules():
        # Set to zero, not removed: attention layers read the value.
        if isinstance(module, DROPOUTS):
            module.p = 0.0
    dropped = []
    for name, module in list(folded.named_modules()):
        if not isinstance(module, AdaptedModel) or not hasattr(module.backbone, "get_classifier"):
            continue
        # Any other feature function may call the classifier.
        if module.feature_fn not in (backbones.forward_features, *PYRAMIDS.values()):
            continue
        backbone: Any = module.backbone
        before = _with_weights(backbone)
        backbone.reset_classifier(0)
        after = _with_weights(backbone)
        prefix = f"{name}.backbone." if name else "backbone."
        dropped += [prefix + key for key in before if key not in after]
    return dropped


def _with_weights(module: nn.Module) -> list[str]:
    """Return the names of the modules that hold parameters of their own."""
    return [key for key, m in module.named_modules() if any(True for _ in m.parameters(False))]


def _activations(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], layers: dict[str, nn.Module]
) -> dict[str, list[Tensor]]:
    """Run the model on an example and return the inputs of the layers; none of one not called."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str):
        # A copy, since later operators may write to it.
        def hook(_, args, kwargs):
            inputs[name].append((*args, *kwargs.values())[0].detach().cpu().clone())

        return hook

    hooks = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        model(*((example,) if isinstance(example, Tensor) else example))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _check_finite(module: nn.Module, name: str, what: str) -> None:
    for key, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise InputError(
                f"{name or 'the model'}: {what} are not finite: {key} holds {bad} NaN or infinite "
                f"values out of {parameter.numel()}. Nothing was folded."
            )


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _size(layer: nn.Module) -> str:
    return f"{layer.in_features}→{layer.out_features}"
