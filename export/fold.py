"""Folding: what was learned becomes ordinary layers, on a copy, checked layer by layer.

- Low-rank adapters are merged: ``W + scaling · B @ A`` in fp64, rounded once.
- GDPL's coupled low-rank updates are merged into the attention of both branches, likewise.
- GDPL's prompt networks become two linear layers (``FoldedPromptLearner``).
- Quaternion layers become nn.Linear. In Hamilton form the weights are copies with signs, bit for
  bit; in rotation form they are computed in fp64 and rounded once.
- Cluster attention becomes :class:`FoldedClusterAttention`: ordinary operators, the constants
  computed beforehand. Its mixing depends on the input, so it cannot vanish.
- Dropouts are switched off, and a timm backbone's classifier, which the adapter replaces, goes.

LayerNorms stay whole. The last one's weights could move into the head, exactly; but a LayerNorm is
one fused operator with or without weights, and ``forward_features`` would no longer be the same.
Nor is up-projection worth merging into the transforms ([K, R, R] to [K, R, C]): it saves about 1 %
of the adapter's work and triples the weights that every call reads.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

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

from .folded_layers import FoldedClusterAttention, GroupedLinear, probe_input

# Largest error of a folded layer, of the largest value of its output. Both layers are evaluated in
# fp64, so this is the rounding of the folded weights alone: some 1e-7 in fp32. The bounds leave
# room for cancellation, and none for a wrong factor or a transposed block.
ERROR_BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class FoldedLayer:
    """One row of the report.

    Attributes:
        name: of the layer in the model.
        kind: its class.
        folded: what became of it.
        weight_change: relative Frobenius norm of the merged update; ``None`` where nothing is
            added to a weight.
        error: largest difference to the unfolded layer over the largest value of its output.
        bound: the error from which folding is refused.
        probe: what the error was measured on: ``"example"`` (the layer's activations) or
            ``"noise"`` (no example given, or the layer's weight is used without calling it).
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
        layers: one row each, in the model's order.
        dropped: names of modules that inference does not use.
    """

    layers: tuple[FoldedLayer, ...]
    dropped: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        return max((layer.error for layer in self.layers), default=0.0)

    @property
    def summary(self) -> str:
        """One line: how many layers of which kind, and the largest error."""
        if not self.layers:
            return "no layers to fold"
        kinds = Counter(row.kind for row in self.layers)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{counted}; largest error {self.max_error:.1e}"

    def to_dict(self) -> dict[str, Any]:
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
    """A folded copy: ordinary layers only, in evaluation mode, without gradients.

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
    """:func:`fold`, and what it did.

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
    changes: dict[str, tuple[nn.Module, str, float | None]] = {}
    swaps: dict[nn.Module, nn.Module] = {}
    for name, layer in folded.named_modules():
        rule = next((rule for kind, rule in RULES.items() if isinstance(layer, kind)), None)
        if rule is None or any(name.startswith(f"{done}.") for done in changes if done):
            continue
        _check_finite(layer, name, "its weights")
        new, description, weight_change = rule(layer)
        new.requires_grad_(False).eval()
        _check_finite(new, name, f"folded to {_dtype(new)}, its weights")
        changes[name] = (new, description, weight_change)
        swaps[layer] = new
    for parent in list(folded.modules()):
        for key, child in list(parent._modules.items()):  # named_children() hides repeated ones
            if child in swaps:
                setattr(parent, key, swaps[child])
    folded = swaps.get(folded, folded)
    _check_finite(folded, "", "its weights")

    layers = {name: new for name, (new, _, _) in changes.items()}
    inputs = {} if example is None else _activations(folded, example, layers)
    for name, (new, description, weight_change) in changes.items():
        probe = "example" if inputs.get(name) else "noise"
        activations = inputs.get(name) or [probe_input(originals[name])]
        rows.append(
            _row(name, originals[name], new, description, weight_change, probe, activations)
        )
    return folded, FoldReport(tuple(rows), tuple(dropped))


def _row(
    name: str,
    layer: nn.Module,
    new: nn.Module,
    description: str,
    weight_change: float | None,
    probe: str,
    inputs: list[Tensor],
) -> FoldedLayer:
    """A layer's row of the report. Raises InputError if folding changed what the layer does."""
    kind, bound = type(layer).__name__, ERROR_BOUNDS[_dtype(new)]
    errors = [layer_error(layer, new, x) for x in inputs]
    error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if not error <= bound:
        raise InputError(
            f"{name or 'the model'} ({kind}) was folded to {description}, which differs from it by "
            f"{error:.1e} of its output's scale; at most {bound:.0e} is rounding. Nothing was "
            "folded: please report this layer."
        )
    return FoldedLayer(name, kind, description, weight_change, error, bound, probe)


def layer_error(layer: nn.Module, folded: nn.Module, x: Tensor) -> float:
    """Largest difference of two layers over the largest value of the first one's output.

    Both are evaluated in fp64 on the CPU, so that what is measured is the folding: neither the
    arithmetic of a dtype, nor TF32, nor the kernels.
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
    """GDPL's low-rank updates belong to two branches at once, so that no layer holds them."""
    return merge_low_rank(module) if isinstance(module, GDPLModel) else []


def _merged_row(part: MergedProjection) -> FoldedLayer:
    _check_finite(part.after, part.name, "its merged weights")
    rank = len(part.before.a)
    description = f"Linear {_size(part.after)}, rank {rank} merged"
    noise = [probe_input(part.before)]
    return _row(part.name, part.before, part.after, description, part.weight_change, "noise", noise)


def _fold_prompt_learner(layer: DomainPromptLearner) -> tuple[nn.Module, str, None]:
    folded = FoldedPromptLearner(layer)
    widths = (layer.feature_dim, folded.linear2.in_features, folded.linear2.out_features)
    return folded, f"2 Linear {'→'.join(map(str, widths))}, constants", None


def _fold_lora(layer: LoRALinear) -> tuple[nn.Module, str, float]:
    weight = layer.base.weight
    delta = layer.delta(torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    change = (delta.norm() / weight.double().norm().clamp_min(tiny)).item()
    # The wrapped layer itself stays, so that a subclass of nn.Linear is still one.
    layer.base.weight = nn.Parameter((weight.double() + delta).to(weight.dtype))
    ranks = "+".join(str(s.r) for s in layer.slices)
    return layer.base, f"Linear {_size(layer)}, rank {ranks} merged", change


def _fold_quaternion(layer: QuaternionLinear) -> tuple[nn.Module, str, None]:
    dtype = layer.r_weight.dtype
    # In Hamilton form the entries are copies, so that fp64 and back changes nothing.
    matrix = copy.deepcopy(layer).double().dense_matrix().to(dtype)
    weight = matrix.transpose(-1, -2).contiguous()
    size = f"{weight.shape[-1]}→{layer.out_features}"
    if layer.groups is not None:
        return GroupedLinear(weight, layer.bias), f"{layer.groups} Linear {size}", None
    linear = nn.Linear(weight.shape[1], layer.out_features, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = layer.bias
    return linear, f"Linear {size}", None


def _fold_cluster_attention(layer: ClusterAttention) -> tuple[nn.Module, str, None]:
    k, width = layer.transforms.shape[:2]
    return FoldedClusterAttention(layer), f"{k} transforms {width}×{width}", None


# A rule takes a layer of the copy and gives what replaces it, that in words, and the weight change.
RULES: dict[type[nn.Module], Callable[[Any], tuple[nn.Module, str, float | None]]] = {
    LoRALinear: _fold_lora,
    QuaternionLinear: _fold_quaternion,
    ClusterAttention: _fold_cluster_attention,
    DomainPromptLearner: _fold_prompt_learner,
}


def _drop_unused(folded: nn.Module) -> list[str]:
    """Removes what inference does not use; returns the names of the modules that went."""
    for module in folded.modules():
        # Set to zero, not taken out: attention layers read the value.
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    dropped = []
    for name, module in list(folded.named_modules()):
        if not isinstance(module, AdaptedModel) or not hasattr(module.backbone, "get_classifier"):
            continue
        # Any other feature function may call the classifier.
        if module.feature_fn is not backbones.forward_features:
            continue
        before = _with_weights(module.backbone)
        module.backbone.reset_classifier(0)
        after = _with_weights(module.backbone)
        prefix = f"{name}.backbone." if name else "backbone."
        dropped += [prefix + key for key in before if key not in after]
    return dropped


def _with_weights(module: nn.Module) -> list[str]:
    """Names of the modules that hold parameters of their own."""
    return [key for key, m in module.named_modules() if any(True for _ in m.parameters(False))]


def _activations(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], layers: dict[str, nn.Module]
) -> dict[str, list[Tensor]]:
    """What reaches the layers when the model runs on an example; nothing, if one is not called."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str):
        # A copy: what follows may write to it.
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
