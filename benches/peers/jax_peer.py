"""JAX, jit, on the CPU."""

import math

import common

try:
    import jax
    import jax.numpy as jnp
except Exception as error:
    common.missing("jax", error)

jax.config.update("jax_platforms", "cpu")


def rms(x, w):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w


def layer(x, w, b):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-5) * w + b


def attention(q, k, v):
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, -1), v)


FORMULAS = {
    "softmax": lambda x: jax.nn.softmax(x, -1),
    "softmax_mid": lambda x: jax.nn.softmax(x, 1),
    "rms_norm": rms,
    "layer_norm": layer,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "exp": jnp.exp,
    "tanh": jnp.tanh,
    "chain5": lambda x: jnp.tanh((jax.nn.silu(x) * x + x) * 2 + 1),
    "residual_rms": lambda x, r, w: rms(x + r, w),
    "bias_gelu_erf": lambda x, b: jax.nn.gelu(x + b, approximate=False),
    "swiglu": lambda x, u: jax.nn.silu(x) * u,
    "add": lambda x, y: x + y,
    "lora": lambda x, a, b: x @ a @ b * 2.0,
    "linear": lambda x, w: x @ w.T,
    "linear_bf16": lambda x, w: x @ w.T,
    "attention": attention,
}


def make(row, ring, others):
    if row[0] not in FORMULAS:
        return None
    dtype = jnp.bfloat16 if row[0] == "linear_bf16" else jnp.float32
    ring = [jnp.asarray(x, dtype) for x in ring]
    others = [jnp.asarray(x, dtype) for x in others]
    f = jax.jit(FORMULAS[row[0]])
    return lambda i: f(ring[i], *others).block_until_ready()


common.run("jax", make, common.arguments())
