"""The mathematics of denoising diffusion probabilistic models. Needs torch, numpy, safetensors;
`to_pil` and `film` need Pillow."""

from diffusion.checkpoint import load, save
from diffusion.checks import ImagesError
from diffusion.encoding import decode, encode
from diffusion.files import CheckpointError
from diffusion.likelihood import Likelihood, likelihood
from diffusion.model import Model, ModelConfig
from diffusion.pictures import film, to_pil
from diffusion.restoring import restore
from diffusion.sampling import sample
from diffusion.schedule import Schedule, ScheduleConfig, cosine_schedule, linear_schedule
from diffusion.unet import UNet
from diffusion.unet_config import UNetConfig

__all__ = [
    "CheckpointError",
    "ImagesError",
    "Likelihood",
    "Model",
    "ModelConfig",
    "Schedule",
    "ScheduleConfig",
    "UNet",
    "UNetConfig",
    "cosine_schedule",
    "decode",
    "encode",
    "film",
    "likelihood",
    "linear_schedule",
    "load",
    "restore",
    "sample",
    "save",
    "to_pil",
]
