"""The config of diffusers' `UNet2DModel`, read and written.

Every field is honoured or refused by name; a field left out has diffusers' own default. Names that
start with an underscore are metadata.
"""

from __future__ import annotations

from typing import Any

from diffusion.diffusers.fields import Fields, is_integer, is_list
from diffusion.files import CheckpointError
from diffusion.unet_config import NetworkConfigError, UNetConfig

NETWORK_CLASS = "UNet2DModel"
# Names the version whose conventions are written, for diffusers' own migrations.
VERSION = {"_diffusers_version": "0.38.0"}

# Fields with one meaning that our network has; the first value is diffusers' default.
_NETWORK_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_type": ("conv",),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv",),
}
_DOWN = {False: "DownBlock2D", True: "AttnDownBlock2D"}
_UP = {False: "UpBlock2D", True: "AttnUpBlock2D"}
# What diffusers' EMAModel adds to the config of a network whose weights it averaged.
_OF_AVERAGING = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
_THEIR_FIELDS = {
    "image_size": "sample_size",
    "channels": "block_out_channels",
    "res_blocks": "layers_per_block",
    "groups": "norm_num_groups",
    "head_dim": "attention_head_dim",
}


def read_network(raw: dict[str, Any], where: str, *, null_class: bool = False) -> UNetConfig:
    """Our form of a `UNet2DModel` config. null_class: its last label means "no label"."""
    if raw.get("_class_name") != NETWORK_CLASS:
        raise Fields(raw, where).refuse("_class_name", raw.get("_class_name"), NETWORK_CLASS)
    fields = Fields(raw, where)
    fields.ignore(_OF_AVERAGING)
    fields.fixed(_NETWORK_FIXED)
    channels = fields.take(
        "block_out_channels",
        (224, 448, 672, 896),
        lambda v: is_list(v, is_integer),
        "a list of widths",
    )
    attention = _read_attention(fields, len(channels))
    groups = fields.integer("norm_num_groups", 32)
    fields.choice("attn_norm_num_groups", (None, groups), None)
    fields.choice("time_embedding_dim", (None, 4 * channels[0]), None)
    fields.integer("num_train_timesteps", None, optional=True)  # of learned time embeddings only
    in_channels = fields.integer("in_channels", 3)
    out_channels = fields.choice("out_channels", (in_channels, 2 * in_channels), 3)
    labels = _read_labels(fields, null_class)
    values = {
        "image_size": _read_side(fields),
        "in_channels": in_channels,
        "channels": channels,
        "attention": attention,
        "res_blocks": fields.integer("layers_per_block", 2),
        "groups": groups,
        "norm_eps": fields.number("norm_eps", 1e-5),
        "head_dim": fields.integer("attention_head_dim", 8, optional=True),
        "downsample_padding": fields.choice("downsample_padding", (0, 1), 1),
        "cos_first": fields.flag("flip_sin_to_cos", True),
        "freq_shift": fields.number("freq_shift", 0),
        "dropout": fields.number("dropout", 0.0),
        "num_classes": labels - null_class,
        "null_class": null_class,
        "learned_variance": out_channels == 2 * in_channels,
    }
    fields.done()
    try:
        return UNetConfig(**values)
    except NetworkConfigError as error:
        name, _, rest = str(error).partition(" = ")
        raise CheckpointError(f"{where}: {_THEIR_FIELDS.get(name, name)} = {rest}") from error


def _read_labels(fields: Fields, null_class: bool) -> int:
    """Rows of the label embedding; 0 without one."""
    if null_class:
        ok, allowed = (lambda v: is_integer(v) and v >= 2), "2 or more, as the last means no label"
        return int(fields.take("num_class_embeds", None, ok, allowed))
    return int(fields.integer("num_class_embeds", None, optional=True) or 0)


def _read_side(fields: Fields) -> int:
    """sample_size: an integer, or two equal ones."""

    def ok(value: Any) -> bool:
        return is_integer(value) or (
            is_list(value, is_integer) and len(value) == 2 and value[0] == value[1]
        )

    size = fields.take("sample_size", None, ok, "one side (images are square)")
    return int(size if is_integer(size) else size[0])


def _read_attention(fields: Fields, levels: int) -> tuple[bool, ...]:
    """One flag a level, finest first; the way up must mirror the way down."""
    down = fields.take(
        "down_block_types",
        ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        lambda v: is_list(v, lambda kind: kind in _DOWN.values()) and len(v) == levels,
        f"a list of {levels}, each {_DOWN[False]} or {_DOWN[True]}",
    )
    attention = tuple(kind == _DOWN[True] for kind in down)
    mirrored = [_UP[flag] for flag in reversed(attention)]
    default = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    fields.take(
        "up_block_types",
        default,
        lambda v: is_list(v, lambda _: True) and list(v) == mirrored,
        f"{mirrored}, which mirrors down_block_types",
    )
    return attention


def write_network(network: UNetConfig) -> dict[str, Any]:
    """Inverse of `read_network`."""
    labels = network.num_classes + network.null_class
    return {
        "_class_name": NETWORK_CLASS,
        **VERSION,
        **{name: allowed[0] for name, allowed in _NETWORK_FIXED.items()},
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": list(network.channels),
        "down_block_types": [_DOWN[flag] for flag in network.attention],
        "up_block_types": [_UP[flag] for flag in reversed(network.attention)],
        "layers_per_block": network.res_blocks,
        "norm_num_groups": network.groups,
        "norm_eps": network.norm_eps,
        "attention_head_dim": network.head_dim,
        "downsample_padding": network.downsample_padding,
        "flip_sin_to_cos": network.cos_first,
        "freq_shift": network.freq_shift,
        "dropout": network.dropout,
        "num_class_embeds": labels or None,
    }
