"""CIFAR-10 as in the DDPM paper, 35.7 million parameters, without classes: for a GPU or a TPU.

Ho et al. 2020, appendix B. The network is google/ddpm-cifar10-32's, parameter for parameter.
"""

from jaxdiff.config import Config, Data, Diffusion, Optimizer, Run, Sampling, Train, UNet

config = Config(
    data=Data(name="cifar10", flip=True),
    model=UNet(
        channels=(128, 256, 256, 256),
        layers_per_block=2,
        attention_levels=(1,),  # 16x16
        num_heads=1,
        dropout=0.1,
        eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        class_conditional=False,
    ),
    diffusion=Diffusion(schedule="linear", timesteps=1000, prediction="eps", stratified=False),
    optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5000, clip_norm=1.0, ema_decay=0.9999),
    train=Train(steps=800_000, batch_size=128),
    run=Run(log_every=100, checkpoint_every=5000, sample_every=10_000, eval_images=2048),
    sampling=Sampling(solver="ddpm_large", num_steps=1000),
)
