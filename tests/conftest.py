"""Eight simulated CPU devices for every test, so that meshes are real."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
