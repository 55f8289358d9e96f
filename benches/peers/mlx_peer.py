"""MLX on its CPU stream, compiled."""

import math

import common

try:
    import mlx.core as mx
    import mlx.nn as nn
except Exception as error:
    common.missing("mlx", error)

mx.set_default_device(mx.cpu)

FORMULAS = {
    "softmax": lambda x: mx.softmax(x, axis=-1),
    "softmax_mid": lambda x: mx.softmax(x, axis=1),
    "rms_norm": lambda x, w: mx.fast.rms_norm(x, w, 1e-5),
    "layer_norm": lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5),
    "gelu": lambda x: 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "gelu_erf": nn.gelu,
    "silu": nn.silu,
    "exp": mx.exp,
    "tanh": mx.tanh,
    "chain5": lambda x: mx.tanh((nn.silu(x) * x + x) * 2 + 1),
    "residual_rms": lambda x, r, w: mx.fast.rms_norm(x + r, w, 1e-5),
    "bias_gelu_erf": lambda x, b: nn.gelu(x + b),
    "swiglu": lambda x, u: nn.silu(x) * u,
    "add": lambda x, y: x + y,
    "lora": lambda x, a, b: x @ a @ b * 2.0,
    "linear": lambda x, w: x @ w.T,
    "linear_bf16": lambda x, w: x @ w.T,
    "attention": lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1])),
}


def make(row, ring, others):
    if row[0] not in FORMULAS:
        return None
    dtype = mx.bfloat16 if row[0] == "linear_bf16" else mx.float32
    ring = [mx.array(x).astype(dtype) for x in ring]
    others = [mx.array(x).astype(dtype) for x in others]
    mx.eval(ring, others)
    f = mx.compile(FORMULAS[row[0]])
    return lambda i: mx.eval(f(ring[i], *others))


common.run("mlx", make, common.arguments())
