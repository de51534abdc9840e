"""The mathematics of denoising diffusion probabilistic models. Needs torch, numpy, safetensors."""

from diffusion.checkpoint import load, save
from diffusion.encoding import decode, encode
from diffusion.files import CheckpointError
from diffusion.model import Model, ModelConfig
from diffusion.restoring import restore
from diffusion.sampling import sample
from diffusion.schedule import Schedule, ScheduleConfig, cosine_schedule, linear_schedule
from diffusion.unet import UNet, UNetConfig

__all__ = [
    "CheckpointError",
    "Model",
    "ModelConfig",
    "Schedule",
    "ScheduleConfig",
    "UNet",
    "UNetConfig",
    "cosine_schedule",
    "decode",
    "encode",
    "linear_schedule",
    "load",
    "restore",
    "sample",
    "save",
]
