"""The course's own example: MNIST at 28x28, 1000 linear steps, the simple U-Net, the noise predicted, no classes."""

from jaxdiff.config import Config, Data, Diffusion, Optimizer, Run, Sampling, SimpleUNet, Train

config = Config(
    data=Data(name="mnist"),
    model=SimpleUNet(),
    diffusion=Diffusion(schedule="linear", timesteps=1000, prediction="eps", stratified=False),
    optimizer=Optimizer(learning_rate=1e-3, ema_decay=0.999),
    train=Train(steps=9400, batch_size=128),  # twenty epochs
    run=Run(log_every=50, checkpoint_every=470, sample_every=470),
    sampling=Sampling(solver="ddpm", num_steps=1000),
)
