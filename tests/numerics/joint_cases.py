"""Members of joint forms with correlated inputs, and convolution written out."""

from dataclasses import replace

import numpy as np

from onnxcomp.numerics.joint_svd import JOINT_FORMS, Member
from onnxcomp.numerics.moments import MomentsBuilder

SHAPE = (5, 4, 3, 3)
THREE = [SHAPE] * 3
PLAIN = [name for name, form in JOINT_FORMS.items() if form.shares in ("first", "last")]
BOTH = [name for name, form in JOINT_FORMS.items() if form.shares == "both"]


def members(seed, shapes, *, data=True, spread=1.0):
    """Kernels with something in common, each with the moments of inputs of its own."""
    rng = np.random.default_rng(seed)
    found = []
    for shape in shapes:
        m, d = shape[0], int(np.prod(shape[1:]))
        base = np.random.default_rng(99).normal(size=(2, *shape))
        W = np.tensordot(rng.normal(size=2), base, 1) + rng.normal(size=shape)
        x = rng.normal(size=(20 * d, d)) @ (rng.normal(size=(d, d)) * np.geomspace(1, 0.05, d))
        builder = MomentsBuilder(d, m)
        builder.add(x * rng.uniform(1, spread), x @ W.reshape(m, d).T)
        found.append(Member(W, builder.finish() if data else None))
    return found


def ranks(name, rank):
    """Ranks of a form that count `rank` inner channels."""
    shares = JOINT_FORMS[name].shares
    return {"both": (rank - rank // 2, rank // 2), "outer": (rank, rank)}.get(shares, (rank,))


def build(name, found, rank, **options):
    return JOINT_FORMS[name].build(found, ranks(name, rank), **options)


def alone(found):
    return [replace(member, metric=None) for member in found]


def blocks(name, kernel):
    """W as (u, m v): the matrices that the paper stacks."""
    m, c, kh, kw = kernel.shape
    u = {"spatial": c * kh, "output_basis": c * kh * kw, "input_basis": c}
    W = kernel.reshape(m, u[JOINT_FORMS[name].base], -1)
    return W.transpose(1, 0, 2).reshape(W.shape[1], -1)


def weighted(joint_errors, found):
    return float(joint_errors @ [member.weight for member in found])


def convolve(x, kernel, *, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1)):
    """ONNX Conv of x (c, h, w) without bias; pads are top, left, bottom, right."""
    m, _, kh, kw = kernel.shape
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (top, bottom), (left, right)))
    (sh, sw), (dh, dw) = strides, dilations
    h = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
    w = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    out = np.zeros((m, h, w))
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (h - 1) + 1, sh)
            part = x[:, rows, j * dw : j * dw + sw * (w - 1) + 1 : sw]
            out += np.einsum("mc,chw->mhw", kernel[:, :, i, j], part)
    return out


def chain_settings(name, strides, pads, dilations):
    """Strides, pads and dilations of each convolution of a chain."""
    (sh, sw), (top, left, bottom, right), (dh, dw) = strides, pads, dilations
    whole = {"strides": strides, "pads": pads, "dilations": dilations}
    base = JOINT_FORMS[name].base
    if base == "spatial":
        first = {"strides": (sh, 1), "pads": (top, 0, bottom, 0), "dilations": (dh, 1)}
        return first, {"strides": (1, sw), "pads": (0, left, 0, right), "dilations": (1, dw)}
    return {
        "output_basis": (whole, {}),
        "input_basis": ({}, whole),
        "tucker2": ({}, whole, {}),
    }[base]
