"""An autoencoder at Stable Diffusion's shapes, 83,653,863 parameters, of a folder of images: for accelerators.

With the perceptual and the adversarial term of Rombach et al. (2022, appendix G); the two files of LPIPS are downloads,
see `jaxdiff.models.load_lpips`. --reconstruction.perceptual-weight 0 goes without them.
"""

from jaxdiff.config import AutoencoderConfig, AutoencoderKL, Data, Optimizer, Reconstruction, Run, Train

config = AutoencoderConfig(
    data=Data(name="folder", data_dir="data/images", image_size=256, channels=3, flip=True),
    model=AutoencoderKL(dtype="bfloat16"),
    reconstruction=Reconstruction(
        error="l1",
        kl_weight=1e-6,
        perceptual_weight=1.0,
        vgg16="data/vgg16-397923af.pth",
        lpips="data/lpips_vgg.pth",
        adversarial_weight=0.05,
        adversarial_start=50_000,
    ),
    optimizer=Optimizer(learning_rate=1e-4, warmup_steps=1000, b1=0.5, b2=0.9, ema_decay=0.9999),
    train=Train(steps=300_000, batch_size=64),
    run=Run(log_every=100, checkpoint_every=5000, sample_every=5000),
)
