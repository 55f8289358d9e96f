"""ONNX Runtime on its CPU provider: one graph per row, its optimiser on."""

import math
import os

import common

try:
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
except Exception as error:
    common.missing("onnxruntime", error)


class Graph:
    """A graph under construction; every operand but the first input is a constant."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def op(self, kind, *inputs, domain="", **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], domain=domain, **attributes))
        return name


def silu(g, x):
    return g.op("Mul", x, g.op("Sigmoid", x))


def rms(g, x, w):
    return g.op("RMSNormalization", x, w, axis=-1, epsilon=1e-5)


def build(g, row, others):
    kind, x = row[0], "x"
    c = [g.constant(array) for array in others]
    if kind == "softmax":
        return g.op("Softmax", x, axis=-1)
    if kind == "softmax_mid":
        return g.op("Softmax", x, axis=1)
    if kind == "rms_norm":
        return rms(g, x, c[0])
    if kind == "residual_rms":
        return rms(g, g.op("Add", x, c[0]), c[1])
    if kind == "layer_norm":
        return g.op("LayerNormalization", x, *c, axis=-1, epsilon=1e-5)
    if kind == "gelu":
        return g.op("Gelu", x, approximate="tanh")
    if kind == "gelu_erf":
        return g.op("Gelu", x)
    if kind == "bias_gelu_erf":
        return g.op("Gelu", g.op("Add", x, c[0]))
    if kind == "silu":
        return silu(g, x)
    if kind == "swiglu":
        return g.op("Mul", silu(g, x), c[0])
    if kind in ("exp", "tanh"):
        return g.op(kind.capitalize(), x)
    if kind == "add":
        return g.op("Add", x, c[0])
    if kind == "chain5":
        inner = g.op("Add", g.op("Mul", silu(g, x), x), x)
        return g.op("Tanh", g.op("Add", g.op("Mul", inner, g.constant(2.0)), g.constant(1.0)))
    if kind == "lora":
        return g.op("Mul", g.op("MatMul", g.op("MatMul", x, c[0]), c[1]), g.constant(2.0))
    if kind == "linear":
        return g.op("Gemm", x, c[0], transB=1)
    if kind == "attention":
        scores = g.op("MatMul", x, g.constant(np.swapaxes(others[0], -1, -2)))
        scaled = g.op("Mul", scores, g.constant(1 / math.sqrt(row[1][-1])))
        return g.op("MatMul", g.op("Softmax", scaled, axis=-1), c[1])
    return None


def make(row, ring, others):
    g = Graph()
    out = build(g, row, others)
    if out is None:
        return None
    shape = list(ring[0].shape)
    graph = helper.make_graph(
        g.nodes,
        "row",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda i: session.run(None, {"x": ring[i]})


common.run("onnxruntime", make, common.arguments())
