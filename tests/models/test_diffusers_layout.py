"""The networks hold diffusers' weights under diffusers' names, and compute what diffusers computes."""

import json
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import Condition, UNet

FIXTURES = Path(__file__).parent.parent / "fixtures"


def path_here(name: str) -> tuple[str, ...]:
    """`down_blocks.0.conv.weight` -> (down_blocks_0, conv, weight): the renaming that unet.py promises."""
    return tuple(re.sub(r"\.(\d+)", r"_\1", name).split("."))


def kernel_here(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that take a PyTorch weight of this shape to a linen kernel."""
    return {2: (1, 0), 4: (2, 3, 1, 0)}[len(shape)]


def from_diffusers(state: dict[str, np.ndarray], wanted: dict) -> dict:
    """Rename, and lay out kernels: [out, in] to [in, out], and 1x1 convolutions to the dense layers that they are."""
    params = {}
    for name, weight in state.items():
        *path, leaf = path_here(name)
        if leaf == "weight":
            leaf = next(leaf for leaf in ("kernel", "scale", "embedding") if (*path, leaf) in wanted)
        if leaf == "kernel":
            weight = weight.transpose(kernel_here(weight.shape))
            weight = weight[0, 0] if weight.shape[:2] == (1, 1) and weight.ndim == 4 else weight
        params[*path, leaf] = weight
    return params


def network(config: dict) -> UNet:
    """Our UNet for a diffusers configuration."""
    conditional = config.get("cross_attention_dim") is not None
    channels = tuple(config["block_out_channels"])
    size = config.get("attention_head_dim")
    # in UNet2DConditionModel the entry named attention_head_dim has always been the number of heads
    heads = {"num_heads": size} if conditional else {"num_heads": None if size else 1, "dim_head": size or 64}
    return UNet(
        out_channels=config["out_channels"],
        channels=channels,
        layers_per_block=config["layers_per_block"],
        attention_levels=tuple(i for i, b in enumerate(config["down_block_types"]) if "Attn" in b),
        context_dim=config.get("cross_attention_dim"),
        num_class_embeds=config.get("num_class_embeds"),
        scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
        num_groups=config.get("norm_num_groups", 32),
        eps=config.get("norm_eps", 1e-5),
        flip_sin_to_cos=config.get("flip_sin_to_cos", True),
        freq_shift=config.get("freq_shift", 0),
        downsample_padding=config.get("downsample_padding", 1),
        **heads,
    )


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("unet2d_*.npz")), ids=lambda p: p.stem)
def test_output_equals_diffusers(path):
    reference = np.load(path)
    config = json.loads(str(reference["@config"]))
    model = network(config)
    x, t = nhwc(reference["@x"]), jnp.asarray(reference["@timesteps"], jnp.float32)
    optional = lambda name: jnp.asarray(reference[name]) if name in reference.files else None  # noqa: E731
    context = optional("@encoder_hidden_states")
    cond = Condition(
        optional("@class_labels"),
        None if context is None else context.astype(jnp.float32),
        optional("@encoder_attention_mask"),
    )
    wanted = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x, t, cond)["params"])
    given = from_diffusers({k: reference[k] for k in reference.files if not k.startswith("@")}, wanted)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}

    output = jax.jit(model.apply)({"params": flax.traverse_util.unflatten_dict(given)}, x, t, cond)

    expected = reference["@output"].transpose(0, 2, 3, 1)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(output, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["google/ddpm-cifar10-32", "stable-diffusion-v1-5"])
def test_published_networks_have_the_same_parameters(name):
    layout = json.loads((FIXTURES / "unet_layouts.json").read_text())[name]
    config = layout["config"]
    model = network(config)
    size, channels = config["sample_size"], config["in_channels"]
    width = config.get("cross_attention_dim")
    cond = Condition(context=None if width is None else jnp.zeros((1, 77, width)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, channels)), jnp.zeros(1), cond)
    wanted = flax.traverse_util.flatten_dict(shapes["params"])
    given = from_diffusers({k: np.empty(v, np.bool_) for k, v in layout["parameters"].items()}, wanted)
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
