"""What the peers' scripts share: the rows' shapes, inputs and the clock."""

import argparse
import json
import statistics
import sys
import time

import numpy as np

RING = 8
SMALL, LARGE = (4, 16, 1024), (8, 128, 4096)

# name: (kind, arguments); the formulas stand in each script
ROWS = {
    "softmax/4x16x1024": ("softmax", SMALL),
    "softmax/8x128x4096": ("softmax", LARGE),
    "softmax-mid/4x16x1024": ("softmax_mid", SMALL),
    "rms_norm/4x16x1024": ("rms_norm", SMALL),
    "rms_norm/8x128x4096": ("rms_norm", LARGE),
    "layer_norm/4x16x1024": ("layer_norm", SMALL),
    "layer_norm/8x128x4096": ("layer_norm", LARGE),
    "gelu/4x16x1024": ("gelu", SMALL),
    "gelu_erf/4x16x1024": ("gelu_erf", SMALL),
    "silu/4x16x1024": ("silu", SMALL),
    "exp/4x16x1024": ("exp", SMALL),
    "tanh/4x16x1024": ("tanh", SMALL),
    "chain5/4x16x1024": ("chain5", SMALL),
    "chain5/8x128x4096": ("chain5", LARGE),
    "residual_rms/4x16x1024": ("residual_rms", SMALL),
    "bias_gelu_erf/4x16x1024": ("bias_gelu_erf", SMALL),
    "swiglu/4x16x1024": ("swiglu", SMALL),
    "overhead/add-1280": ("add", (1280,)),
    "train/lora-step/4x64x512-r8": ("lora_step", (4, 64, 512), 8),
    "train/cross-entropy/2x16x512": ("cross_entropy", (2 * 16, 512)),
    "train/smollm2-lora/4x128": ("decoder_step", (4, 128)),
}
for width, rank, count in [
    (512, 8, 1), (2048, 8, 1), (512, 8, 64), (512, 8, 512), (512, 4, 1), (512, 16, 1), (512, 64, 1),
    (512, 4, 64), (512, 16, 64), (512, 64, 64),
]:
    ROWS[f"lora/{width}-r{rank}/{count}"] = ("lora", (count, width), rank)
for count in (1, 4, 32, 128):
    ROWS[f"linear/{count}x1024x4096"] = ("linear", (count, 1024), 4096)
for count in (1, 4):
    ROWS[f"linear-bf16/{count}x1024x4096"] = ("linear_bf16", (count, 1024), 4096)
ROWS["attention/12x512x64"] = ("attention", (1, 12, 512, 64), 512)
ROWS["attention-decode/12x4096x64"] = ("attention", (1, 12, 1, 64), 4096)


def operands(row):
    """The ring of inputs and the other operands of a row, as float32 arrays."""
    rng = np.random.default_rng(7)
    kind, shape, *rest = row
    if kind == "decoder_step":  # tokens, and one more: what follows the last
        return [rng.integers(0, 49152, (shape[0], shape[1] + 1)) for _ in range(RING)], []
    normal = lambda *dims: rng.standard_normal(dims, dtype=np.float32)
    ring = [normal(*shape) for _ in range(RING)]
    last = shape[-1]
    if kind in ("rms_norm", "bias_gelu_erf"):
        return ring, [normal(last)]
    if kind == "layer_norm":
        return ring, [normal(last), normal(last)]
    if kind == "residual_rms":
        return ring, [normal(*shape), normal(last)]
    if kind in ("swiglu", "add"):
        return ring, [normal(*shape)]
    if kind == "cross_entropy":
        return ring, [np.arange(shape[0]) * 37 % last]
    if kind == "lora_step":
        return ring, [0.05 * normal(last, rest[0]), 0.05 * normal(rest[0], last)]
    if kind == "lora":
        return ring, [normal(last, rest[0]), normal(rest[0], last)]
    if kind in ("linear", "linear_bf16"):
        return ring, [normal(rest[0], last)]
    if kind == "attention":
        batch, heads, _, d = shape
        return ring, [normal(batch, heads, rest[0], d), normal(batch, heads, rest[0], d)]
    return ring, []


def median_us(call, quick):
    """Microseconds per call of `call(i)`, which works on input i of the ring and returns when the result is there."""
    for i in range(RING):
        call(i)
    calls, i = 1, 0
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            call(i % RING)
            i += 1
        if time.perf_counter() - start >= 0.002 or calls >= 1 << 16:
            break
        calls *= 2
    samples, begin = [], time.perf_counter()
    while len(samples) < 7 or time.perf_counter() - begin < (0.15 if quick else 1.25):
        start = time.perf_counter()
        for _ in range(calls):
            call(i % RING)
            i += 1
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    return statistics.median(samples)


def show(peer, name, us):
    print(json.dumps({"peer": peer, "name": name, "us": us}), flush=True)


def missing(peer, why):
    """Says that a framework is not there, and ends."""
    print(json.dumps({"peer": peer, "missing": str(why)}), flush=True)
    sys.exit(0)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--filter", default="")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def run(peer, make, args):
    """Times every row that `make(row, ring, others)` has a call for; it returns None for one that the framework lacks."""
    for name, row in ROWS.items():
        if args.filter not in name:
            continue
        ring, others = operands(row)
        try:
            call = make(row, ring, others)
            if call is not None:
                show(peer, name, median_us(call, args.quick))
        except Exception as error:  # a framework without the op, or without a compiler: the row is left out, and said
            print(f"{peer} {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
