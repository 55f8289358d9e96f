"""llama.cpp on SmolLM2's published 4-bit file, by way of xllamacpp's server object.

Its times are not of the same work as the f32 rows: it reads 4-bit weights.
"""

import json
import os

import common

try:
    import xllamacpp
except Exception as error:
    common.missing("llama.cpp", error)


def model_file():
    """The file that `cargo xtask fetch` brought, or the one that CANDLE_LAZY_GGUF names."""
    if "CANDLE_LAZY_GGUF" in os.environ:
        return os.environ["CANDLE_LAZY_GGUF"]
    cache = os.environ.get("CANDLE_LAZY_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "candle-lazy"
    )
    for folder, _, files in os.walk(cache):
        for name in files:
            if name.endswith(".gguf"):
                return os.path.join(folder, name)
    common.missing("llama.cpp", "no .gguf file: run `cargo xtask fetch` first, or set CANDLE_LAZY_GGUF")


args = common.arguments()
if any(args.filter in name for name in ("smollm2/prefill128", "smollm2/decode")):
    params = xllamacpp.CommonParams()
    params.model.path = model_file()
    params.n_ctx = 512
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.warmup = True
    params.verbosity = 0
    server = xllamacpp.Server(params)
    prompt = [2000 + (i * 104729 + i * i * 31) % 26000 for i in range(128)]
    timings = {"smollm2/prefill128": [], "smollm2/decode": []}
    for seed in range(3 if args.quick else 9):
        ids = [2000 + (t + seed * 7919) % 26000 for t in prompt]
        answer = server.handle_completions({"prompt": ids, "n_predict": 33, "cache_prompt": False, "temperature": 0})
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        times = answer.get("timings") or {}
        timings["smollm2/prefill128"].append(times["prompt_ms"] * 1e3)
        timings["smollm2/decode"].append(times["predicted_per_token_ms"] * 1e3)
    for name, values in timings.items():
        if args.filter in name:
            common.show("llama.cpp", name, sorted(values)[len(values) // 2])
