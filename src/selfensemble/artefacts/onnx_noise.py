"""Gaussian noise in ONNX operators, a function of a seed that every run is given.

`RandomNormalLike` takes its numbers from the runtime, which starts every session of a process with the same
ones: two sessions of a file, or two workers after a fork, would repeat each other, and noise that repeats is
no defense. Here a counter-based generator makes them (Salmon et al., Parallel Random Numbers: As Easy as 1,
2, 3, SC 2011). Word number i of layer k is a hash of i under two keys, which are a hash of k and the 128 bits
of the seed. Each word gives two normal numbers (Box & Muller, 1958): all of its bits are the radius, the low
16 the angle.

The hash multiplies and folds; its constants are those of Wellons' hash prospector. It multiplies in int32,
which wraps: older runtimes (onnxruntime 1.20) do not multiply uint32, and all cast between the two.
"""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

SEED = "seed"  # input of a graph, uint32 (4,)
NOISE = "RandomNormalLike"
_DOMAIN = "selfensemble"
_KEYS = f"{_DOMAIN}.keys"
# What else draws random numbers in a graph, from the runtime.
_RANDOM = {"RandomNormal", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", NOISE}

_MIX = """
<domain: "selfensemble", opset_import: ["" : 18]>
Mix (x) => (mixed) {
  first = Constant <value = int32 {569420461}> ()
  second = Constant <value = int32 {-749064809}> ()
  s16 = Constant <value = uint32 {16}> ()
  s15 = Constant <value = uint32 {15}> ()
  x16 = BitShift <direction = "RIGHT"> (x, s16)
  a = BitwiseXor (x, x16)
  a_signed = Cast <to = 6> (a)
  b_signed = Mul (a_signed, first)
  b = Cast <to = 12> (b_signed)
  b15 = BitShift <direction = "RIGHT"> (b, s15)
  c = BitwiseXor (b, b15)
  c_signed = Cast <to = 6> (c)
  d_signed = Mul (c_signed, second)
  d = Cast <to = 12> (d_signed)
  d15 = BitShift <direction = "RIGHT"> (d, s15)
  mixed = BitwiseXor (d, d15)
}
"""

# `start` is (2, layers), all different: for a seed each step is a permutation, and keys differ as well.
_MAKE_KEYS = """
<domain: "selfensemble", opset_import: ["" : 18, "selfensemble" : 1]>
Keys (seed, start) => (keys) {
  s0, s1, s2, s3 = Split <axis = 0, num_outputs = 4> (seed)
  a = BitwiseXor (start, s0)
  a_mixed = selfensemble.Mix (a)
  b = BitwiseXor (a_mixed, s1)
  b_mixed = selfensemble.Mix (b)
  c = BitwiseXor (b_mixed, s2)
  c_mixed = selfensemble.Mix (c)
  d = BitwiseXor (c_mixed, s3)
  d_mixed = selfensemble.Mix (d)
  last = selfensemble.Mix (d_mixed)
  keys = Cast <to = 6> (last)
}
"""

# 2 pi / 2^16 is the angle that a bit stands for; cosine and sine are cosines a quarter of a turn apart.
_DRAW = """
<domain: "selfensemble", opset_import: ["" : 18]>
Draw <scale: float> (like, keys, layer) => (noise) {
  zero = Constant <value = int32 {0}> ()
  one = Constant <value = int32 {1}> ()
  step = Constant <value = int32 {-1640531527}> ()
  first = Constant <value = int32 {569420461}> ()
  second = Constant <value = int32 {-749064809}> ()
  s16 = Constant <value = uint32 {16}> ()
  s15 = Constant <value = uint32 {15}> ()
  own = Gather <axis = 1> (keys, layer)
  key0, key1 = Split <axis = 0, num_outputs = 2> (own)
  size = Size (like)
  long_one = Constant <value = int64 {1}> ()
  long_two = Constant <value = int64 {2}> ()
  more = Add (size, long_one)
  half = Div (more, long_two)
  pairs = Cast <to = 6> (half)
  index = Range (zero, pairs, one)
  spread = Mul (index, step)
  a_signed = Add (spread, key0)
  a = Cast <to = 12> (a_signed)
  a16 = BitShift <direction = "RIGHT"> (a, s16)
  b = BitwiseXor (a, a16)
  b_signed = Cast <to = 6> (b)
  c_signed = Add (b_signed, key1)
  d_signed = Mul (c_signed, first)
  d = Cast <to = 12> (d_signed)
  d15 = BitShift <direction = "RIGHT"> (d, s15)
  e = BitwiseXor (d, d15)
  e_signed = Cast <to = 6> (e)
  f_signed = Mul (e_signed, second)
  f = Cast <to = 12> (f_signed)
  f15 = BitShift <direction = "RIGHT"> (f, s15)
  word = BitwiseXor (f, f15)
  middle = Constant <value = float {0.5}> ()
  unit = Constant <value = float {2.3283064365386963e-10}> ()
  word_float = Cast <to = 1> (word)
  word_middle = Add (word_float, middle)
  uniform = Mul (word_middle, unit)
  log = Log (uniform)
  minus_two = Constant <value = float {-2.0}> ()
  square = Mul (log, minus_two)
  length = Sqrt (square)
  level = Constant <value_float: float = @scale> ()
  radius = Mul (length, level)
  mask = Constant <value = uint32 {65535}> ()
  low = BitwiseAnd (word, mask)
  low_float = Cast <to = 1> (low)
  bit = Constant <value = float {9.587379924285257e-05}> ()
  angle = Mul (low_float, bit)
  quarter = Constant <value = float[2, 1] {0.0, -1.5707963267948966}> ()
  angles = Add (angle, quarter)
  cosines = Cos (angles)
  normal = Mul (cosines, radius)
  all = Constant <value = int64[1] {-1}> ()
  flat = Reshape (normal, all)
  start = Constant <value = int64[1] {0}> ()
  end = Reshape (size, all)
  cut = Slice (flat, start, end)
  shape = Shape (like)
  shaped = Reshape <allowzero = 1> (cut, shape)
  noise = CastLike (shaped, like)
}
"""


def seed_noise(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """`model` with an input `seed`, of which its `RandomNormalLike` are functions; without any, as it is.

    Args:
        model: opset 18 or later; it is changed.

    Raises:
        ValueError: something else in it draws random numbers.
    """
    from onnx import TensorProto, helper

    layers = [node for node in model.graph.node if _is_noise(node)]
    others = Counter(node.op_type for node in _nodes(model) if _is_random(node)) - Counter(
        [NOISE] * len(layers)
    )
    if others:
        raise ValueError(
            f"this network draws random numbers of its own ({', '.join(sorted(others))} in ONNX), which "
            "every new session of the file would repeat: draw them with GaussianNoise, or take them out"
        )
    if not layers:
        return model
    start = np.arange(1, 2 * len(layers) + 1, dtype=np.uint32).reshape(2, -1)
    nodes = [helper.make_node("Keys", [SEED, _constant(model, start)], [_KEYS], domain=_DOMAIN)]
    number = 0
    for node in model.graph.node:
        if _is_noise(node):
            inputs = [node.input[0], _KEYS, _constant(model, np.array(number))]
            scale = next((each.f for each in node.attribute if each.name == "scale"), 1.0)
            node = helper.make_node(
                "Draw", inputs, list(node.output), name=node.name, domain=_DOMAIN, scale=scale
            )
            number += 1
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(
        helper.make_tensor_value_info(SEED, TensorProto.UINT32, [4], "fresh random bits for every run")
    )
    return _flattened(model)


def _constant(model: "onnx.ModelProto", values: np.ndarray) -> str:
    """Name of a new constant of the graph."""
    from onnx import numpy_helper

    name = f"{_KEYS}.{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _flattened(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """With our functions written out in plain operators, which every runtime reads."""
    from onnx import helper, inliner, parser

    version = next(each.version for each in model.opset_import if each.domain == "")
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    for text in (_MIX, _MAKE_KEYS, _DRAW):
        function = parser.parse_function(text)
        for opset in function.opset_import:
            opset.version = version if opset.domain == "" else 1
        model.functions.append(function)
    flat = inliner.inline_local_functions(model)
    kept = [each for each in flat.opset_import if each.domain != _DOMAIN]
    del flat.opset_import[:]
    flat.opset_import.extend(kept)
    return flat


def _nodes(model: "onnx.ModelProto") -> Iterator["onnx.NodeProto"]:
    """All nodes, those of functions, branches and loops among them."""
    todo = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while todo:
        node = todo.pop()
        yield node
        todo += [inner for each in node.attribute for graph in (each.g, *each.graphs) for inner in graph.node]


def _is_noise(node: "onnx.NodeProto") -> bool:
    """Whether a node is what becomes of `GaussianNoise`: normal, of mean 0, in the dtype of its input."""
    usual = all(each.name == "scale" or (each.name == "mean" and each.f == 0) for each in node.attribute)
    return node.op_type == NOISE and node.domain == "" and usual


def _is_random(node: "onnx.NodeProto") -> bool:
    # Dropout draws in training mode alone, which is its third input.
    return node.op_type in _RANDOM or (node.op_type == "Dropout" and len(node.input) > 2)
