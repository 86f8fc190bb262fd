"""An autoencoder of Fashion-MNIST: 28x28 pixels in 7x7 latents of 4 channels, a quarter of the numbers."""

from jaxdiff.config import AutoencoderConfig, AutoencoderKL, Data, Optimizer, Reconstruction, Run, Train

config = AutoencoderConfig(
    data=Data(name="fashion_mnist"),
    # 4x4 pixels enter as one, as in fashion_mnist.py
    model=AutoencoderKL(latent_channels=4, channels=(128,), patch_size=4, layers_per_block=1, mid_attention=False),
    reconstruction=Reconstruction(error="l2", kl_weight=1e-3),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, decay="cosine", ema_decay=0.998),
    train=Train(steps=5600, batch_size=32),
    run=Run(log_every=100, checkpoint_every=1000, sample_every=1000),
)
