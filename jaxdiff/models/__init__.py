"""Networks in Flax linen: F(x, t, cond) and no more; nothing here knows of diffusion."""

from jaxdiff.models.attention import CrossAttention
from jaxdiff.models.autoencoder import AutoencoderKL, DiagonalGaussian
from jaxdiff.models.clip_text import CLIPTextModel, TextOutput
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.layers import Condition, sinusoidal_embedding
from jaxdiff.models.lpips import LPIPS, load_lpips
from jaxdiff.models.simple_unet import SimpleUNet
from jaxdiff.models.unet import UNet

__all__ = [
    "LPIPS",
    "AutoencoderKL",
    "CLIPTextModel",
    "Condition",
    "CrossAttention",
    "DiagonalGaussian",
    "PatchDiscriminator",
    "SimpleUNet",
    "TextOutput",
    "UNet",
    "load_lpips",
    "sinusoidal_embedding",
]
