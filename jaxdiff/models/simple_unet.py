"""The course's network: three levels down, three up, the time added inside every block."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.layers import Condition, GroupNorm, sinusoidal_embedding, upsample_nearest


class Block(nn.Module):
    """Two 3x3 convolutions with the time added between them."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B D"]) -> Float[Array, "B H W channels"]:
        """Convolve, add the time, convolve."""
        h = nn.relu(GroupNorm(8, name="norm1")(nn.Conv(self.channels, (3, 3), name="conv1")(x)))
        h = h + nn.relu(nn.Dense(self.channels, name="time")(time))[:, None, None, :]
        return nn.relu(GroupNorm(8, name="norm2")(nn.Conv(self.channels, (3, 3), name="conv2")(h)))


class SimpleUNet(nn.Module):
    """A small U-Net: 64-128-256 channels down, 256 at the bottom, 256-128-64 up, a 1x1 convolution out.

    It keeps the course's plan and mends what could not run or misled there:

    - Sizes. Halving 28 three times by flooring gives 3, and doubling that gives 12, which fits none of the skips
      (7, 14, 28). Here pooling rounds up (28-14-7-4) and each doubled map is cropped to its skip (8 to 7), so that
      any image size works, odd ones too.
    - Channels. The second block on the way up was built for 256 channels and given 384 (256 from below, 128 from the
      skip). Here every block takes the channels that it is given.
    - Norms. Batch norm saw batches that mix all noise levels while training and running averages while sampling,
      so that the sampler used another function than was trained. Group norm is the same in both.
    """

    out_channels: int = 1
    channels: tuple[int, ...] = (64, 128, 256)
    time_dim: int = 256

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        cond: Condition | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B H W out_channels"]:
        """Evaluate at times t; takes no condition (`cond` must be empty), and `train` changes nothing."""
        if cond is not None and any(part is not None for part in cond):
            raise ValueError("SimpleUNet takes no condition: use UNet.")
        time = nn.relu(nn.Dense(self.time_dim, name="time_1")(sinusoidal_embedding(t, self.time_dim)))
        time = nn.Dense(self.time_dim, name="time_2")(time)

        skips = []
        for i, channels in enumerate(self.channels):
            x = Block(channels, name=f"down_{i}")(x, time)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        x = Block(self.channels[-1], name="bottom")(x, time)
        for i, channels in reversed(list(enumerate(self.channels))):
            skip = skips.pop()
            x = upsample_nearest(x)[:, : skip.shape[1], : skip.shape[2]]
            x = Block(channels, name=f"up_{i}")(jnp.concatenate([x, skip], axis=-1), time)
        return nn.Dense(self.out_channels, name="out")(x)  # a dense layer over channels is the 1x1 convolution
