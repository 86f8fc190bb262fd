"""Stable Diffusion's anatomy on two CPU cores: Fashion-MNIST by captions, in fashion_mnist_vae.py's latent space."""

from jaxdiff.config import Config, Data, Diffusion, Latent, Optimizer, Run, Sampling, Text, Train, UNet

config = Config(
    data=Data(name="fashion_mnist"),
    latent=Latent(run="runs/fashion_mnist_vae"),
    model=UNet(channels=(128,), layers_per_block=1, attention_levels=(0,), num_heads=4, scale_shift=True),
    text=Text(tokenizer="bytes", max_length=48, hidden_size=128, intermediate_size=512, num_layers=2, num_heads=4),
    diffusion=Diffusion(schedule="cosine", prediction="v"),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, decay="cosine", ema_decay=0.999),
    train=Train(steps=7500, batch_size=32),
    run=Run(log_every=50, checkpoint_every=1500, sample_every=1500),
    sampling=Sampling(solver="unipc", num_steps=20, grid="logsnr", guidance_scale=3.0, threshold="none"),
)
