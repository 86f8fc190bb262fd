"""Attention: over pixels, from pixels to a context, and the transformer block that Stable Diffusion builds of both."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from jaxdiff.models.layers import Condition, GroupNorm


def attend(
    q: Float[Array, "B N D"],
    k: Float[Array, "B L D"],
    v: Float[Array, "B L D"],
    heads: int,
    mask: Bool[Array, "B L"] | Bool[Array, "B N L"] | None = None,
) -> Float[Array, "B N D"]:
    """Scaled dot-product attention over `heads` equal parts of D (Vaswani et al. 2017).

    mask: True where a key may be looked at, by all queries or by each; one that may look at none looks at all evenly.
    Batch and heads are merged into one axis: on CPU half the time of jax.nn.dot_product_attention.
    """
    return look_up(attention_weights(q, k, heads, mask), v, heads)


def attention_weights(
    q: Float[Array, "B N D"],
    k: Float[Array, "B L D"],
    heads: int,
    mask: Bool[Array, "B L"] | Bool[Array, "B N L"] | None = None,
) -> Float[Array, "BH N L"]:
    """How much each query looks at each key, of each head: float32, of sum 1 over the keys."""
    q, k = (rearrange(y, "b n (h d) -> (b h) n d", h=heads) for y in (q, k))
    logits = jnp.einsum("bnd,bld->bnl", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, None, :] if mask.ndim == 2 else mask
        logits = jnp.where(jnp.repeat(mask, heads, axis=0), logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits)


def look_up(weights: Float[Array, "BH N L"], v: Float[Array, "B L D"], heads: int) -> Float[Array, "B N D"]:
    """The mean of values under the weights of `attention_weights`."""
    v = rearrange(v, "b n (h d) -> (b h) n d", h=heads)
    return rearrange(jnp.einsum("bnl,bld->bnd", weights.astype(v.dtype), v), "(b h) n d -> b n (h d)", h=heads)


def resolve_heads(channels: int, num_heads: int | None, dim_head: int) -> int:
    """The number of heads: `num_heads`, or where it is None as many as make each `dim_head` wide, at least one."""
    return num_heads or max(channels // dim_head, 1)


class CrossAttention(nn.Module):
    """Attention from x to a context, or to x itself where none is given.

    Queries, keys and values have no bias and are heads x dim_head wide; the output has one and x's width.
    """

    heads: int = 8
    dim_head: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B L C"] | None = None,
        mask: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Attend; mask [B, L] is True where the context may be looked at.

        To a context, the weights [B, heads, N, L] go into the collection "attention", where that is mutable.
        """
        to_itself = context is None
        context = x if to_itself else context
        inner = self.heads * self.dim_head
        project = lambda name: nn.Dense(inner, use_bias=False, dtype=self.dtype, name=name)  # noqa: E731
        weights = attention_weights(project("to_q")(x), project("to_k")(context), self.heads, mask)
        attended = look_up(weights, project("to_v")(context), self.heads)
        if not to_itself:
            self.sow("attention", "weights", rearrange(weights, "(b h) n l -> b h n l", h=self.heads))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(attended)


class SpatialSelfAttention(nn.Module):
    """Residual self-attention over the pixels of [B, H, W, C], as in DDPM (diffusers' `Attention` in UNet2DModel)."""

    num_heads: int | None = None
    dim_head: int = 64
    num_groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], cond: Condition | None = None) -> Float[Array, "B H W C"]:
        """Attend and add; the condition is not looked at."""
        channels = x.shape[-1]
        heads = resolve_heads(channels, self.num_heads, self.dim_head)
        dense = lambda name, **options: nn.Dense(channels, dtype=self.dtype, name=name, **options)  # noqa: E731
        h = GroupNorm(self.num_groups, self.eps, self.dtype, name="group_norm")(x)
        h = rearrange(h, "b h w c -> b (h w) c")
        attended = attend(dense("to_q")(h), dense("to_k")(h), dense("to_v")(h), heads)
        return x + dense("to_out_0", kernel_init=nn.initializers.zeros)(attended).reshape(x.shape)


class GEGLU(nn.Module):
    """A dense layer gated by the GELU of another one (Shazeer 2020)."""

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N dim"]:
        """Project and gate."""
        hidden, gate = jnp.split(nn.Dense(2 * self.dim, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The transformer's second half: GEGLU to four times the width, and back."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Transform each position."""
        hidden = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each behind a layer norm and added."""

    heads: int
    dim_head: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B L C"] | None,
        mask: Bool[Array, "B L"] | None,
    ) -> Float[Array, "B N D"]:
        """Transform a sequence."""
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)  # noqa: E731
        attention = lambda name: CrossAttention(self.heads, self.dim_head, self.dtype, name=name)  # noqa: E731
        x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), context, mask)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of [B, H, W, C], as in Stable Diffusion (diffusers' Transformer2DModel)."""

    num_heads: int | None = None
    dim_head: int = 64
    depth: int = 1
    num_groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], cond: Condition) -> Float[Array, "B H W C"]:
        """Transform and add, with cross-attention to the condition's context."""
        channels = x.shape[-1]
        heads = resolve_heads(channels, self.num_heads, self.dim_head)
        h = GroupNorm(self.num_groups, 1e-6, self.dtype, name="norm")(x)
        h = nn.Dense(channels, dtype=self.dtype, name="proj_in")(rearrange(h, "b h w c -> b (h w) c"))
        for i in range(self.depth):
            block = TransformerBlock(heads, channels // heads, self.dtype, name=f"transformer_blocks_{i}")
            h = block(h, cond.context, cond.context_mask)
        h = nn.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj_out")(h)
        return x + h.reshape(x.shape)
