"""The mathematics of denoising diffusion probabilistic models. Needs torch, numpy, safetensors."""

from diffusion.model import CheckpointError, Model, ModelConfig, load, save
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
    "linear_schedule",
    "load",
    "sample",
    "save",
]
