"""Fashion-MNIST by class, sized to show clear garments after half an hour on two CPU cores."""

from jaxdiff.config import Config, Data, Diffusion, Optimizer, Run, Sampling, Train, UNet

config = Config(
    data=Data(name="fashion_mnist"),
    # 4x4 pixels enter as one: 7x7 maps, which two cores take at full speed with wide layers
    model=UNet(channels=(128,), patch_size=4, layers_per_block=1, attention_levels=(), scale_shift=True),
    diffusion=Diffusion(schedule="cosine", prediction="v"),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, decay="cosine", ema_decay=0.998),
    train=Train(steps=2600, batch_size=64),
    run=Run(log_every=50, checkpoint_every=650, sample_every=650),
    sampling=Sampling(solver="ddim", num_steps=50, guidance_scale=1.5),
)
