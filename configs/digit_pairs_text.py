"""Text to image in pixels: two digits by a caption such as "a three left of an 8", on two CPU cores."""

from jaxdiff.config import Config, Data, Diffusion, Optimizer, Run, Sampling, Text, Train, UNet

config = Config(
    data=Data(name="digit_pairs"),
    # 4x4 pixels enter as one: a map of 4x4 places, each of which attends to the caption
    model=UNet(channels=(128,), patch_size=4, layers_per_block=1, attention_levels=(0,), num_heads=4, scale_shift=True),
    text=Text(tokenizer="bytes", max_length=48, hidden_size=128, intermediate_size=512, num_layers=2, num_heads=4),
    diffusion=Diffusion(schedule="cosine", prediction="v"),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=200, decay="cosine", ema_decay=0.998),
    train=Train(steps=4000, batch_size=64),
    run=Run(log_every=100, checkpoint_every=1000, sample_every=1000),
    sampling=Sampling(solver="unipc", num_steps=20, grid="logsnr", guidance_scale=3.0),
)
