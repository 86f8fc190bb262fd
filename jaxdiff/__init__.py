"""jaxdiff: diffusion models in JAX and Flax, three tables around a network."""
