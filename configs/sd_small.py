"""Text to image at Stable Diffusion 1.5's shapes, from scratch, of a folder of captioned images: for accelerators.

The U-Net (859,520,964 parameters) and the text transformer are the published ones, parameter for parameter; latents are
those of sd_vae.py. The folder holds captions.jsonl, or a .txt beside each image; the vocabulary is CLIP's. A text
transformer that another run trained stays as it is with --text.run.
"""

from jaxdiff.config import Config, Data, Diffusion, Latent, Optimizer, Run, Sampling, Text, Train, UNet

config = Config(
    data=Data(name="folder", data_dir="data/images", image_size=512, channels=3),
    latent=Latent(run="runs/sd_vae", cache=False),
    model=UNet(channels=(320, 640, 1280, 1280), attention_levels=(0, 1, 2), num_heads=8, dtype="bfloat16"),
    text=Text(
        tokenizer="clip",
        vocabulary="data/clip",
        max_length=77,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
    ),
    diffusion=Diffusion(schedule="scaled_linear", prediction="eps", condition_dropout=0.1),
    optimizer=Optimizer(name="adamw", learning_rate=1e-4, warmup_steps=10_000, ema_decay=0.9999),
    train=Train(steps=500_000, batch_size=256, accumulate=4),
    run=Run(log_every=100, checkpoint_every=5000, sample_every=10_000),
    sampling=Sampling(solver="dpmpp_2m", num_steps=25, guidance_scale=7.5, threshold="none"),
)
