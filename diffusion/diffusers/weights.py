"""Names of the U-Net's weights here and in diffusers' `UNet2DModel`.

One tensor differs: q, k and v of an attention are one fused matrix here, three there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from diffusion.files import CheckpointError

# Applied in this order to one of our names.
_RENAMES = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"^time([12])\.", r"time_embedding.linear_\1."),
        (r"^label\.", "class_embedding."),
        (r"^norm_out\.", "conv_norm_out."),
        (r"^mid1\.", "mid_block.resnets.0."),
        (r"^mid_attn\.", "mid_block.attentions.0."),
        (r"^mid2\.", "mid_block.resnets.1."),
        (r"^(down|up)sample\.(\d+)\.", r"\1_blocks.\2.\1samplers.0."),
        (r"^(down|up)\.(\d+)\.res\.", r"\1_blocks.\2.resnets."),
        (r"^(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
        (r"(resnets\.\d+)\.emb\.", r"\1.time_emb_proj."),
        (r"(resnets\.\d+)\.shortcut\.", r"\1.conv_shortcut."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
    )
)
# Attention weights in the first public checkpoints, which diffusers renames as well.
_OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def their_names(name: str) -> list[str]:
    """The tensor or tensors that hold our `name`; three, joined along dimension 0, for qkv."""
    for pattern, theirs in _RENAMES:
        name = pattern.sub(theirs, name)
    if ".qkv." in name:
        return [name.replace(".qkv.", f".to_{part}.") for part in "qkv"]
    return [name]


def to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their names."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        theirs = their_names(name)
        # Cloned, because a safetensors file takes no tensors that share memory.
        out.update(zip(theirs, (part.clone() for part in tensor.chunk(len(theirs))), strict=True))
    return out


def from_theirs(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Their state dict under our `names`.

    Raises CheckpointError for a tensor that is missing or not expected.
    """
    left: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if _modern(name) in left:
            raise CheckpointError(f"weights: {name} is there twice, with a prefix and without")
        left[_modern(name)] = tensor
    out: dict[str, Tensor] = {}
    for name in names:
        theirs = their_names(name)
        missing = [part for part in theirs if part not in left]
        if missing:
            raise CheckpointError(f"weights do not fit the network: {missing[0]} is missing")
        out[name] = torch.cat([left.pop(part) for part in theirs])
    if left:
        raise CheckpointError(f"weights do not fit the network: {min(left)} is not part of it")
    return out


def _modern(name: str) -> str:
    # A model wrapped by torch.compile or for several processes when it was saved.
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name
