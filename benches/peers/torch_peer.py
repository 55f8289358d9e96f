"""PyTorch, eager and compiled; steps of training too, of a decoder by transformers and PEFT."""

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


def optimizer(parameters):
    """AdamW at a rate so small that the parameters stay where they are."""
    return torch.optim.AdamW(parameters, lr=1e-12, weight_decay=0.01)


def lora_step(ring, others, compiled):
    """Forward, backward and AdamW of the mean square of a low-rank product."""
    a, b = (torch.from_numpy(x).requires_grad_() for x in others)
    ring, steps = [torch.from_numpy(x) for x in ring], optimizer([a, b])
    loss = lambda x: (x @ a @ b * 2.0).square().mean()
    loss = torch.compile(loss) if compiled else loss

    def call(i):
        with torch.enable_grad():
            loss(ring[i]).backward()
        steps.step()
        steps.zero_grad()

    return call


def cross_entropy(ring, others, compiled):
    """Forward and backward, with respect to the logits."""
    ring, targets = [torch.from_numpy(x).requires_grad_() for x in ring], torch.from_numpy(others[0])
    loss = torch.compile(F.cross_entropy) if compiled else F.cross_entropy

    def call(i):
        with torch.enable_grad():
            loss(ring[i], targets).backward()
        ring[i].grad = None

    return call


def decoder_step(ring, _, compiled):
    """SmolLM2's shapes with random weights, which cost the same; rank 8 on q and v, the loss of all positions. Not compiled: minutes."""
    if compiled:
        return None
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    steps = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    ring = [torch.from_numpy(x) for x in ring]

    def call(i):
        with torch.enable_grad():
            logits = model(input_ids=ring[i][:, :-1], use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), ring[i][:, 1:].flatten()).backward()
        steps.step()
        steps.zero_grad()

    return call


STEPS = {"lora_step": lora_step, "cross_entropy": cross_entropy, "decoder_step": decoder_step}


def maker(compiled):
    def make(row, ring, others):
        if row[0] in STEPS:
            return STEPS[row[0]](ring, others, compiled)
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
