"""CLIP's text transformer (Radford et al. 2021), which Stable Diffusion reads with, as transformers' CLIPTextModel.

A parameter's path here is its path in a published checkpoint with ".<number>" written "_<number>" and "." written "/":
`text_model.encoder.layers.0.mlp.fc1.weight` is `text_model/encoder/layers_0/mlp/fc1/kernel`. Two things in files are
not parameters' names: what transformers 5 saves has no `text_model.`, and what transformers before 4.31 saved holds the
buffer `text_model.embeddings.position_ids`, which is 0, 1, 2, ... and is left out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.attention import attend

normal = nn.initializers.normal


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Approximate the GELU by x * sigmoid(1.702 x), as OpenAI trained CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": partial(nn.gelu, approximate=False)}


class TextOutput(NamedTuple):
    """What a text becomes: a vector for each token, after the final norm, and the one of its end token."""

    hidden: Float[Array, "B L D"]
    pooled: Float[Array, "B D"]


class TextEmbeddings(nn.Module):
    """An embedding of each token, plus one of each position."""

    vocab_size: int
    max_length: int
    dim: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L dim"]:
        """Embed."""
        embed = partial(nn.Embed, features=self.dim, dtype=self.dtype)
        positions = embed(self.max_length, embedding_init=normal(0.01), name="position_embedding")
        words = embed(self.vocab_size, embedding_init=normal(0.02), name="token_embedding")
        return words(tokens) + positions(jnp.arange(tokens.shape[1]))


class TextAttention(nn.Module):
    """Self-attention whose four dense layers all have a bias. depth: of the network, which the initial scale knows."""

    heads: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L L"]) -> Float[Array, "B L D"]:
        """Attend; mask is True where the token of the row may look at the token of the column."""
        dim = x.shape[-1]
        dense = lambda name, std=dim**-0.5: nn.Dense(dim, dtype=self.dtype, kernel_init=normal(std), name=name)  # noqa: E731
        attended = attend(dense("q_proj")(x), dense("k_proj")(x), dense("v_proj")(x), self.heads, mask)
        return dense("out_proj", (2 * dim * self.depth) ** -0.5)(attended)


class TextMLP(nn.Module):
    """Two dense layers around the activation."""

    dim: int
    depth: int
    activation: Callable[[Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Transform each position."""
        width = x.shape[-1]
        dense = lambda dim, name, std: nn.Dense(dim, dtype=self.dtype, kernel_init=normal(std), name=name)  # noqa: E731
        hidden = self.activation(dense(self.dim, "fc1", (2 * width) ** -0.5)(x))
        return dense(width, "fc2", (2 * width * self.depth) ** -0.5)(hidden)


class TextLayer(nn.Module):
    """Self-attention and MLP, each behind a layer norm and added."""

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L L"]) -> Float[Array, "B L D"]:
        """Transform a sequence."""
        x = x + self.attention(name="self_attn")(self.norm(name="layer_norm1")(x), mask)
        return x + self.mlp(name="mlp")(self.norm(name="layer_norm2")(x))


class TextEncoder(nn.Module):
    """The layers, one after the other."""

    depth: int
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B L L"]) -> Float[Array, "B L D"]:
        """Transform a sequence."""
        for i in range(self.depth):
            x = self.layer(name=f"layers_{i}")(x, mask)
        return x


class TextTransformer(nn.Module):
    """Embeddings, layers and the final norm: all that has parameters, under the name that checkpoints give it."""

    embeddings: Callable[..., nn.Module]
    encoder: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L L"]) -> Float[Array, "B L D"]:
        """Embed and transform."""
        x = self.encoder(name="encoder")(self.embeddings(name="embeddings")(tokens), mask)
        return self.norm(name="final_layer_norm")(x)


class CLIPTextModel(nn.Module):
    """A causal transformer over tokens: the text side of CLIP, and with its weights Stable Diffusion 1's text encoder.

    The defaults are those of openai/clip-vit-large-patch14. Fresh weights have the paper's initial scales.

    vocab_size: of the tokenizer. max_length: the longest sequence that has positions.
    hidden_size: width. intermediate_size: width within the MLP. num_layers, num_heads: how many.
    hidden_act: "quick_gelu" (OpenAI's) or "gelu" (OpenCLIP's, as in Stable Diffusion 2).
    eos_token_id: the end token, whose first place `pooled` is read at; the sequence's first token where there is none.
        2, which the configurations of published models hold by mistake, stands for the highest id in the sequence, as
        in transformers: the end token of CLIP's own vocabulary is its last.
    eps: of the layer norms.
    dtype: of the computation, float32 or bfloat16; parameters, softmax and the statistics of norms stay float32.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    hidden_act: str = "quick_gelu"
    eos_token_id: int = 49407
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None
    ) -> TextOutput:
        """Encode tokens, each of which sees itself and those before it, where the mask is True (1) or there is none.

        Stable Diffusion was trained without a mask: its U-Net knows what CLIP makes of the padding.

        Returns float32. Raises JaxdiffError where the sequence is longer than `max_length`, the mask is not of the
        tokens' shape, the width does not divide into heads, or there is no such activation.
        """
        self._check(tokens, mask)
        length = tokens.shape[1]
        visible = jnp.broadcast_to(jnp.tri(length, dtype=bool), (*tokens.shape, length))
        if mask is not None:
            visible = visible & mask.astype(bool)[:, None, :]

        norm = partial(nn.LayerNorm, epsilon=self.eps, dtype=self.dtype)
        activation = ACTIVATIONS[self.hidden_act]
        layer = partial(
            TextLayer,
            partial(TextAttention, self.num_heads, self.num_layers, self.dtype),
            partial(TextMLP, self.intermediate_size, self.num_layers, activation, self.dtype),
            norm,
        )
        embeddings = partial(TextEmbeddings, self.vocab_size, self.max_length, self.hidden_size, self.dtype)
        encoder = partial(TextEncoder, self.num_layers, layer)
        hidden = TextTransformer(embeddings, encoder, norm, name="text_model")(tokens, visible).astype(jnp.float32)

        end = jnp.argmax(tokens if self.eos_token_id == 2 else tokens == self.eos_token_id, axis=1)
        return TextOutput(hidden, hidden[jnp.arange(len(tokens)), end])

    def _check(self, tokens: Array, mask: Array | None) -> None:
        """Say in one sentence what can not fit, before a shape error deep inside does."""
        if tokens.ndim != 2 or tokens.shape[1] > self.max_length:
            raise JaxdiffError(
                f"This text model needs tokens [B, L] with L at most max_length {self.max_length}, and these are "
                f"{list(tokens.shape)}: encode them with a tokenizer of that max_length."
            )
        if mask is not None and mask.shape != tokens.shape:
            raise JaxdiffError(f"The mask must be {list(tokens.shape)} as the tokens are, not {list(mask.shape)}.")
        if self.hidden_size % self.num_heads:
            raise JaxdiffError(f"hidden_size {self.hidden_size} must divide into num_heads {self.num_heads} heads.")
        if self.hidden_act not in ACTIVATIONS:
            raise JaxdiffError(f'hidden_act must be one of {", ".join(ACTIVATIONS)}, not "{self.hidden_act}".')
