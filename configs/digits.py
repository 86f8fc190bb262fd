"""The default: scikit-learn's handwritten digits, 8x8, drawn by class after a few minutes on two CPU cores."""

from jaxdiff.config import Config, Data, Diffusion, Optimizer, Run, Sampling, Train, UNet

config = Config(
    data=Data(name="digits"),
    # 2x2 pixels enter as one: wide layers on 4x4 maps keep two cores busier than narrow ones on 8x8
    model=UNet(channels=(128,), patch_size=2, layers_per_block=1, attention_levels=(), scale_shift=True),
    diffusion=Diffusion(schedule="cosine", prediction="v"),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100, decay="cosine", ema_decay=0.995),
    train=Train(steps=600, batch_size=64),
    run=Run(log_every=50, checkpoint_every=300, sample_every=300),
    sampling=Sampling(solver="ddim", num_steps=50, guidance_scale=2.0),
)
