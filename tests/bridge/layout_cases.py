"""One-node graphs: shapes, layout, resizing."""

from collections.abc import Iterator
from itertools import product

import numpy as np
from onnx import numpy_helper

from tests.bridge.op_graphs import Case, Fixed, fixed, floats, ints, scalar, uniform

_IMAGE = floats(2, 4, 6, 5)
_EMPTY = Fixed(np.zeros(0, np.float32))


def shapes() -> Iterator[Case]:
    x = _IMAGE
    yield Case("Shape", (x,))
    yield Case("Shape", (x,), {"start": 1, "end": -1}, opset=15)
    yield Case("Size", (x,))
    yield Case("Reshape", (x, ints(0, -1, 5)))
    yield Case("Reshape", (x, ints(2, 3, 40)), {"allowzero": 1}, note="allowzero")
    for opset in (9, 13, 21):
        yield Case("Flatten", (x,), {"axis": 2}, opset=opset)
    yield Case("Flatten", (x,), {"axis": -1}, opset=11, note="from behind")
    yield Case("Flatten", (x,), {"axis": 0}, note="of all")
    yield Case("Transpose", (x,), {"perm": [0, 2, 3, 1]})
    yield Case("Transpose", (x,), note="reversed")
    one = floats(1, 3, 1, 4)
    yield Case("Squeeze", (one,), {"axes": [0, 2]}, opset=11)
    yield Case("Squeeze", (one, ints(-2)), opset=13)
    yield Case("Squeeze", (one,), opset=13, note="all")
    yield Case("Unsqueeze", (x,), {"axes": [0, 3]}, opset=11)
    yield Case("Unsqueeze", (x, ints(-1, 1)), opset=13)
    yield Case("Concat", (x, fixed(2, 4, 1, 5)), {"axis": 2})
    yield Case("Concat", (x, x), {"axis": -3}, note="from behind")
    yield Case("Expand", (floats(4, 1, 5), ints(2, 1, 3, 1)))
    yield Case("Expand", (floats(2, 4, 5), ints(4, 1)), note="of lower rank")
    yield Case("Tile", (floats(2, 3), ints(2, 3)))
    deep = floats(2, 8, 3, 5)
    yield Case("DepthToSpace", (deep,), {"blocksize": 2})
    yield Case("DepthToSpace", (deep,), {"blocksize": 2, "mode": "CRD"}, note="CRD")
    yield Case("SpaceToDepth", (floats(2, 3, 4, 6),), {"blocksize": 2})
    filling = numpy_helper.from_array(np.array([2.5], np.float32))
    yield Case("ConstantOfShape", (np.array([2, 3], np.int64),), {"value": filling})
    yield Case("ConstantOfShape", (np.array([2, 3], np.int64),), note="zeros")
    limits = (np.array(v, np.int64) for v in (2, 11, 3))
    yield Case("Range", tuple(limits))
    yield Case("Trilu", (floats(2, 4, 4),), {"upper": 0})
    yield Case("Trilu", (floats(4, 5), scalar(1, np.int64)), note="above")
    hot = (np.array([[0, 2], [-1, 1]], np.int64), scalar(3, np.int64))
    values = Fixed(np.array([-1.0, 2.0], np.float32))
    yield Case("OneHot", (*hot, values))
    yield Case("OneHot", (*hot, values), {"axis": 1}, note="axis 1")
    yield Case("NonZero", (x > 0,))


def slices() -> Iterator[Case]:
    x = _IMAGE
    yield Case("Slice", (x,), {"starts": [1, -3], "ends": [9, -1], "axes": [1, 2]}, opset=9)
    yield Case("Slice", (x, ints(1, 0), ints(2**62, -1), ints(-1, 1), ints(2, 1)))
    yield Case("Slice", (x, ints(1), ints(2)), note="no axes")
    yield Case("Slice", (x, ints(-1), ints(-(2**62)), ints(2), ints(-2)), note="backwards")
    yield Case("Slice", (x, ints(4), ints(1), ints(2), ints(-1)), note="backwards, part")
    yield Case("Slice", (x, ints(9), ints(-5), ints(2), ints(-2)), note="backwards, beyond")
    for opset, split in ((11, {"split": [1, 3]}), (13, {})):
        sizes = () if split else (ints(1, 3),)
        yield Case("Split", (x, *sizes), {"axis": 1} | split, opset=opset, outputs=2)
    yield Case("Split", (x,), {"axis": 1}, outputs=2, note="equal")
    three = {"axis": 3, "num_outputs": 3}
    yield Case("Split", (x,), three, opset=18, outputs=3)
    for index in (0, -1):
        yield Case("Gather", (x, scalar(index, np.int64)), {"axis": 1}, note=f"at {index}")
    yield Case("Gather", (x, ints(2, -1)), {"axis": 2}, note="several")
    table = Fixed(np.array([[0, 1], [-1, 2]], np.int64))
    yield Case(
        "Gather", (fixed(5, 3), np.array([[0, 4], [-2, 2]], np.int64)), note="embedding"
    )
    yield Case("Gather", (x, table), {"axis": 1}, note="table")
    picks = np.array([[0, -1, 1], [2, 2, 0]], np.int64)
    yield Case("GatherElements", (floats(3, 3), picks))
    yield Case("GatherND", (x, np.array([[0, 1], [1, -2]], np.int64)))
    batched = np.array([[[1, 2]], [[3, 0]]], np.int64)
    yield Case("GatherND", (x, batched), {"batch_dims": 1}, note="batch_dims")
    places = np.array([[1], [3]], np.int64)
    yield Case("ScatterND", (floats(4, 3), places, floats(2, 3, seed=1)))
    adding = (floats(4, 3), np.array([[1], [1]], np.int64), floats(2, 3, seed=1))
    yield Case("ScatterND", adding, {"reduction": "add"}, note="add")
    updates = (np.array([[1, -1]], np.int64), floats(1, 2, seed=1))
    yield Case("Scatter", (floats(3, 5), *updates), {"axis": 1}, opset=10)
    yield Case("ScatterElements", (floats(3, 5), *updates), {"axis": 1})
    yield Case("ScatterElements", (floats(3, 5), *updates), {"reduction": "add"}, opset=18)


def pads() -> Iterator[Case]:
    x, amounts = _IMAGE, [0, 1, 2, 0, 0, 0, 1, 3]
    for opset in (9, 11, 13, 18):
        if opset < 11:
            given, attrs = (), {"pads": amounts, "value": 0.5}
        else:
            given, attrs = (ints(*amounts), scalar(0.5)), {}
        yield Case("Pad", (x, *given), attrs, opset=opset)
    yield Case("Pad", (x, ints(0, 0, -1, 1, 0, 0, 0, -2)), note="cuts")
    for mode in ("edge", "reflect"):
        yield Case("Pad", (x, ints(0, 0, 2, 3, 0, 0, 1, 2)), {"mode": mode}, note=mode)
    yield Case("Pad", (x, ints(0, 0, 2, 3, 0, 0, 1, 2)), {"mode": "wrap"}, opset=19)
    axes = (ints(1, 2, 0, 1), scalar(-1.0), ints(-1, 1))
    yield Case("Pad", (x, *axes), opset=18, note="axes")


def resizes() -> Iterator[Case]:
    x = floats(1, 2, 5, 6)
    up = Fixed(np.array([1, 1, 2, 3], np.float32))
    for opset in (7, 9):
        given = (up,) if opset == 9 else ()
        for mode in ("nearest", "linear"):
            attrs = {"mode": mode} | ({} if given else {"scales": [1.0, 1.0, 2.0, 3.0]})
            yield Case("Upsample", (x, *given), attrs, opset=opset, note=mode)
    part = Fixed(np.array([1, 1, 0.6, 1.7], np.float32))
    for mode, scales in product(("nearest", "linear"), (up, part)):
        note = f"{mode} {scales.array[2]:.1f}"
        yield Case("Resize", (x, scales), {"mode": mode}, opset=10, note=note)
    ways = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    for mode, way, scales in product(("nearest", "linear", "cubic"), ways, (up, part)):
        attrs = {"mode": mode, "coordinate_transformation_mode": way}
        note = f"{mode} {way} {scales.array[2]:.1f}"
        yield Case("Resize", (x, _EMPTY, scales), attrs, opset=13, note=note)
    rounding = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    for nearest, way in product(rounding, ("half_pixel", "asymmetric")):
        attrs = {"nearest_mode": nearest, "coordinate_transformation_mode": way}
        note = f"{nearest} {way}"
        yield Case("Resize", (x, None, part), attrs, opset=19, note=note)
    for size, out in ((3, 5), (7, 13), (13, 25)):  # the product is below `out` in double
        x, scales = floats(1, 2, size, 4), np.array([1, 1, out / size, 1], np.float32)
        for mode in ("nearest", "linear"):
            note = f"{mode} {size} to {out}"
            yield Case("Resize", (x, None, Fixed(scales)), {"mode": mode}, note=note)
            yield Case("Upsample", (x, Fixed(scales)), {"mode": mode}, opset=9, note=note)
    yield from _sized_resizes(floats(1, 2, 5, 6))


def _sized_resizes(x) -> Iterator[Case]:
    sizes = ints(1, 2, 7, 4)
    for opset in (11, 13, 18, 19):
        roi = _EMPTY if opset < 13 else None
        scales = _EMPTY if opset < 13 else None
        for mode in ("nearest", "linear", "cubic"):
            note = f"{mode} to sizes"
            given = (x, roi, scales, sizes)
            yield Case("Resize", given, {"mode": mode}, opset=opset, note=note)
    for mode in ("linear", "cubic"):
        attrs = {"mode": mode, "antialias": 1}
        small = (x, None, None, ints(1, 2, 3, 2))
        yield Case("Resize", small, attrs, opset=18, note=f"{mode} antialias")
    symmetric = {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}
    part = Fixed(np.array([1, 1, 0.7, 1.7], np.float32))
    yield Case("Resize", (x, None, part), symmetric, opset=19, note="symmetric")
    outside = {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}
    yield Case("Resize", (x, None, part), outside, opset=13, note="exclude_outside")
    crop = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}
    roi = Fixed(np.array([0, 0, 0.1, -0.2, 1, 1, 0.8, 1.1], np.float32))
    whole = crop | {"extrapolation_value": 9.0}
    yield Case("Resize", (x, roi, None, sizes), whole, opset=13, note="crop")
    tf = {"coordinate_transformation_mode": "tf_half_pixel_for_nn"}
    yield Case("Resize", (x, _EMPTY, part), tf, opset=11, note="tf_half_pixel_for_nn")
    for policy in ("not_larger", "not_smaller"):
        attrs = {"axes": [2, 3], "keep_aspect_ratio_policy": policy, "mode": "linear"}
        yield Case("Resize", (x, None, None, ints(7, 5)), attrs, opset=18, note=policy)
    tie = {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger", "mode": "linear"}
    given = (floats(1, 2, 22, 11), None, None, ints(15, 99))  # 11 * 15 / 22 is 7.5
    yield Case("Resize", given, tie, opset=18, note="half a pixel")
    last = floats(1, 5, 6, 2)
    channels_last = Fixed(np.array([1, 2, 3, 1], np.float32))
    yield Case("Resize", (last, None, channels_last), {"mode": "linear"}, note="channels last")
    one = {"mode": "linear"}
    yield Case(
        "Resize", (floats(1, 2, 5), None, Fixed(np.float32([1, 1, 2.5]))), one, note="1D"
    )


def grids() -> Iterator[Case]:
    x, grid = floats(1, 2, 5, 6), uniform(1, 4, 3, 2, low=-1.2, high=1.2)
    for mode, padding in product(("bilinear", "nearest"), ("zeros", "border", "reflection")):
        for aligned in (0, 1):
            attrs = {"mode": mode, "padding_mode": padding, "align_corners": aligned}
            note = f"{mode} {padding}{' aligned' * aligned}"
            yield Case("GridSample", (x, grid), attrs, opset=16, note=note)
    yield Case("GridSample", (x, grid), {"mode": "linear"}, opset=20)
    yield Case("GridSample", (x, grid), {"mode": "cubic"}, opset=20, note="cubic")


CASES = tuple(case for family in (shapes, slices, pads, resizes, grids) for case in family())
