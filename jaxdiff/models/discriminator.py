"""The discriminator that an autoencoder's images may be trained against (Rombach et al. 2022)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.layers import GroupNorm


class PatchDiscriminator(nn.Module):
    """Images [B, H, W, C] to logits [B, h, w], one for each of many overlapping patches: is it real?

    The 4x4 convolutions of Isola et al. 2017 (section 6.1.2) as Rombach et al. 2022 use them (`NLayerDiscriminator`,
    whose submodule `main.2` is `main_2` here), with one change: groups of channels are normalised in place of the
    batch (Wu & He 2018). So an image's logits depend on that image alone: not on what else is in its batch or on how
    a batch is split over devices, not on whether real and drawn images go in together; and there are no running
    statistics to carry along. h = H // 2**num_layers - 2; at the defaults a logit's convolutions see 70 pixels a side,
    and all it knows of the others is what they add to the norms' statistics.

        logits = model.apply(params, images)

    channels: of the first convolution; they double with each further one, up to eight times as many.
    num_layers: convolutions that halve the size; two that do not come after them.
    negative_slope: of the leaky rectifiers.
    num_groups: of the norms; it divides twice `channels`.
    dtype: of the computation, float32 or bfloat16; parameters, the statistics of norms and the logits stay float32.
    """

    channels: int = 64
    num_layers: int = 3
    negative_slope: float = 0.2
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        """Judge.

        Raises JaxdiffError where images are too small to leave a single logit, or widths do not divide into groups.
        """
        smallest = 3 * 2**self.num_layers
        if min(x.shape[1:3]) < smallest:
            raise JaxdiffError(
                f"A PatchDiscriminator with num_layers {self.num_layers} needs images of at least "
                f"{smallest}x{smallest}, and these are {x.shape[1]}x{x.shape[2]}: give it fewer num_layers."
            )

        place = 0  # in the reference's sequence, which counts activations too
        for i in range(self.num_layers + 1):
            width = self.channels * min(2**i, 8)
            x = self._conv(width, stride=2 if i < self.num_layers else 1, name=f"main_{place}")(x)
            if i > 0:  # not the first: Radford et al. 2016 found training unstable with a norm on what enters
                x = GroupNorm(self.num_groups, dtype=self.dtype, name=f"main_{place + 1}")(x)
                place += 1
            x = nn.leaky_relu(x, self.negative_slope)
            place += 2
        return self._conv(1, stride=1, name=f"main_{place}")(x)[..., 0].astype(jnp.float32)

    def _conv(self, channels: int, *, stride: int, name: str) -> nn.Conv:
        """A 4x4 convolution padded by one pixel on each side, drawn as Isola et al. 2017 do."""
        init = nn.initializers.normal(0.02)
        return nn.Conv(channels, (4, 4), stride, ((1, 1), (1, 1)), dtype=self.dtype, kernel_init=init, name=name)
