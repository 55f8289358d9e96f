"""PyTorch, eager and compiled."""

import os

import common

try:
    import torch
    import torch.nn.functional as F
except Exception as error:
    common.missing("torch", error)

torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.set_grad_enabled(False)


def formula(row):
    kind, shape = row[0], row[1]
    last = shape[-1]
    return {
        "softmax": lambda x: torch.softmax(x, -1),
        "softmax_mid": lambda x: torch.softmax(x, 1),
        "rms_norm": lambda x, w: F.rms_norm(x, (last,), w, 1e-5),
        "layer_norm": lambda x, w, b: F.layer_norm(x, (last,), w, b, 1e-5),
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_erf": lambda x: F.gelu(x),
        "silu": lambda x: F.silu(x),
        "exp": torch.exp,
        "tanh": torch.tanh,
        "chain5": lambda x: torch.tanh((F.silu(x) * x + x) * 2 + 1),
        "residual_rms": lambda x, r, w: F.rms_norm(x + r, (last,), w, 1e-5),
        "bias_gelu_erf": lambda x, b: F.gelu(x + b),
        "swiglu": lambda x, u: F.silu(x) * u,
        "add": lambda x, y: x + y,
        "lora": lambda x, a, b: x @ a @ b * 2.0,
        "linear": lambda x, w: F.linear(x, w),
        "linear_bf16": lambda x, w: F.linear(x, w),
        "attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    }[kind]


def maker(compiled):
    def make(row, ring, others):
        dtype = torch.bfloat16 if row[0] == "linear_bf16" else torch.float32
        ring = [torch.from_numpy(x).to(dtype) for x in ring]
        others = [torch.from_numpy(x).to(dtype) for x in others]
        f = formula(row)
        if compiled:
            f = torch.compile(f)
        return lambda i: f(ring[i], *others)

    return make


args = common.arguments()
common.run("torch", maker(False), args)
common.run("torch.compile", maker(True), args)
