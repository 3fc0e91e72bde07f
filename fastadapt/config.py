"""The settings of what is added to a backbone: adapter, and low-rank adapters inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Self

from fastadapt.errors import InputError
from fastadapt.patterns import check_patterns
from fastadapt.settings import Setting, Settings

Layout = Literal["tokens", "channels_first", "channels_last"]
MODEL = "Model"
# Names of attention projections across timm, open_clip and transformers, and what they compute.
PROJECTIONS = {
    "q": ("q", "q_proj", "query", "to_q", "wq"),
    "k": ("k", "k_proj", "key", "to_k", "wk"),
    "v": ("v", "v_proj", "value", "to_v", "wv"),
}
ATTENTION = ("qkv", "kv", *PROJECTIONS["q"], *PROJECTIONS["k"], *PROJECTIONS["v"])


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Which layers get a low-rank adapter, and of which rank.

    Source: LoRA (Hu et al. 2021); names as in PEFT's ``LoraConfig``; rsLoRA (Kalajdzievski 2023).
    """

    r: Annotated[
        int,
        Setting(
            "Rank of the low-rank adapters (LoRA) inside the backbone.",
            panel=MODEL,
            option="lora_rank",
            ge=1,
            limit=65_536,
        ),
    ] = 8
    alpha: Annotated[
        float,
        Setting(
            "Scale the low-rank update by alpha / rank.",
            panel=MODEL,
            option="lora_alpha",
            limit=1e9,
        ),
    ] = 16.0
    dropout: Annotated[float, Setting("Dropout on the input of the low-rank path.", ge=0, lt=1)] = (
        0.0
    )
    targets: Annotated[
        tuple[str, ...] | str,
        Setting(
            'Last parts of module names ("qkv", "attn.proj", "mlp.fc1"), or "all-linear"; by '
            "default the attention's q, k and v projections, fused or not."
        ),
    ] = ATTENTION
    parts: Annotated[
        str,
        Setting(
            "Which of the attention's q, k and v projections get a low-rank adapter, whether they "
            "are fused or separate.",
            panel=MODEL,
            option="lora_parts",
            expected="some of the letters q, k, v",
        ),
    ] = "qkv"
    rank_pattern: Annotated[
        dict[str, int],
        Setting(
            "Other ranks for some layers, by regular expression on the end of the name.",
            expected="regular expressions with a rank each",
        ),
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        dict[str, float],
        Setting(
            "Other values of alpha for some layers, by regular expression on the end of the name.",
            expected="regular expressions with a number each",
        ),
    ] = field(default_factory=dict)
    use_rslora: Annotated[bool, Setting("Scale by alpha / sqrt(rank) (rsLoRA).")] = False

    def check_together(self) -> None:
        """Refuse letters and patterns that mean nothing."""
        if not self.parts or set(self.parts) - set("qkv"):
            raise InputError(f"parts is {self.parts!r}; expected some of the letters q, k, v")
        for rank in self.rank_pattern.values():
            if not 1 <= rank <= 65_536:
                raise InputError(f"rank_pattern gives rank {rank}; expected at least 1")
        check_patterns([*self.rank_pattern, *self.alpha_pattern])


@dataclass(frozen=True)
class AdaptConfig(Settings):
    """What is added to a backbone, and what the backbone does not say of itself."""

    adapter: Annotated[
        Literal["cladapter", "none"],
        Setting(
            "Put the cluster-attention adapter after the backbone, or none: the head alone, a "
            "linear probe.",
            panel=MODEL,
            expected="'cladapter' or 'none'",
        ),
    ] = "cladapter"
    depth: Annotated[int, Setting("Blocks of the adapter.", panel=MODEL, ge=1, limit=1_000)] = 1
    num_centers: Annotated[
        int,
        Setting(
            "Cluster centers of every block.", panel=MODEL, option="centers", ge=1, limit=65_536
        ),
    ] = 20
    rank: Annotated[
        int,
        Setting(
            "Width of the clusters' transforms, in channels (in tokens, with mode token).",
            panel=MODEL,
            ge=1,
            limit=65_536,
        ),
    ] = 256
    mlp_ratio: Annotated[
        float,
        Setting(
            "Hidden width of the adapter's MLP, as a multiple of the channels.",
            panel=MODEL,
            gt=0,
            limit=1_000,
        ),
    ] = 4.0
    mode: Annotated[
        Literal["channel", "token"],
        Setting("Let the transforms mix channels, as in the paper, or tokens.", panel=MODEL),
    ] = "channel"
    proj_drop: Annotated[
        float,
        Setting("Dropout on the output of the cluster attention.", panel=MODEL, ge=0, lt=1),
    ] = 0.0
    pool: Annotated[
        Literal["mean", "token"],
        Setting(
            "Without an adapter, classify the mean of the features, or the class token of "
            "backbones that have one.",
            panel=MODEL,
        ),
    ] = "mean"
    drop_path: Annotated[
        float,
        Setting(
            "Drop blocks of the backbone at random where it trains (stochastic depth): the last "
            "one with this probability, earlier ones less often.",
            panel=MODEL,
            ge=0,
            lt=1,
        ),
    ] = 0.0
    tta: Annotated[
        Literal["none", "flips", "dihedral"],
        Setting(
            "Average the logits of each image's flips (4 views) or of the square's symmetries (8) "
            "in evaluation, in run and bundle (test-time augmentation).",
            panel=MODEL,
        ),
    ] = "none"
    lora: Annotated[
        LoRAConfig | None, Setting("Low-rank adapters inside the backbone, too; none if None.")
    ] = None
    features: Annotated[
        str | Callable[..., Any] | None,
        Setting(
            "What of the backbone is adapted: its last map or tokens (last); the maps of all its "
            "resolutions side by side (pyramid), also with the deviations within their cells "
            "(pyramid-deviations); the pyramid, of backbones that have one (auto); the result of "
            "a method of this name or, in Python, of a function of (backbone, images).",
            panel=MODEL,
            metavar="last|pyramid|pyramid-deviations|auto|METHOD",
            kind=str,
            shown_default="last",
            expected="'last', 'pyramid', 'pyramid-deviations', 'auto', a method's name or a "
            "function",
        ),
    ] = None
    layout: Annotated[
        Layout | None,
        Setting("Layout of the features; found by itself where their shape tells it."),
    ] = None
    num_prefix_tokens: Annotated[
        int | None,
        Setting(
            "Class and register tokens to drop before the patches; found by itself for timm and "
            "open_clip.",
            ge=0,
            limit=65_536,
        ),
    ] = None
    input_size: Annotated[
        tuple[int, ...] | None,
        Setting(
            "[C, H, W] or [C, D, H, W] of the images, in pixels; the backbone's own if None.",
            expected="(C, H, W) or (C, D, H, W)",
        ),
    ] = None

    def check_together(self) -> None:
        """Refuse sizes that no image has, and a class token before an adapter of patches."""
        if self.pool == "token" and self.adapter != "none":
            raise InputError(
                "pool is 'token', but the adapter works on the patches: give `adapter='none'`"
            )
        size = self.input_size
        if size is not None and not (
            len(size) in (3, 4) and all(1 <= length <= 65_536 for length in size)
        ):
            raise InputError(f"input_size is {size}; expected (C, H, W) or (C, D, H, W)")

    @classmethod
    def paper(cls, mode: Literal["cla", "linear", "full"] = "cla", **changes: Any) -> Self:
        """Return the settings of CLAdapter's code for what trains; the adapter's are the defaults.

        Args:
            mode: as for :meth:`fastadapt.train.TrainConfig.paper`.
            **changes: other values of some settings.
        """
        values = {} if mode == "cla" else {"adapter": "none", "pool": "token"}
        return cls(**(values | changes))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for JSON.

        A ``features`` function is left out and must be given again on loading.
        """
        lora = None if self.lora is None else asdict(self.lora)
        features = self.features if isinstance(self.features, str) else None
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return {**plain, "lora": lora, "features": features}

    @classmethod
    def from_dict(cls, values: Any, where: str = "the adapter's configuration") -> Self:
        """Make the settings from what a file holds; see :meth:`Settings.from_dict`."""
        if isinstance(values, dict) and values.get("lora") is not None:
            lora = LoRAConfig.from_dict(values["lora"], f"{where}, lora")
            values = {**values, "lora": lora}
        return super().from_dict(values, where)
