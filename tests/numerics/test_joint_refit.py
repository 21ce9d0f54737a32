from dataclasses import replace

import numpy as np
import pytest

from onnxcomp.errors import ParameterError
from onnxcomp.numerics import least_squares
from onnxcomp.numerics.factorization import squared_error
from onnxcomp.numerics.joint_svd import JOINT_FORMS, refit
from onnxcomp.numerics.moments import Moments
from tests.numerics.joint_cases import (
    PLAIN,
    SHAPE,
    THREE,
    build,
    members,
)


def design(joint, private, index):
    """The dense kernels of unit changes of a member's private parts."""
    parts = [p for p in private if p is not None]
    units = []
    for k, part in enumerate(parts):
        for j in range(part.size):
            unit = np.zeros(part.size)
            unit[j] = 1.0
            changed = [np.zeros_like(p) for p in parts]
            changed[k] = unit.reshape(part.shape)
            stack = iter(changed)
            own = tuple(None if p is None else next(stack) for p in private)
            units.append(replace(joint, private=(own,)).dense(0).reshape(-1))
    return np.stack(units)


@pytest.mark.parametrize("name", JOINT_FORMS)
@pytest.mark.parametrize(("data", "limit"), [(True, 1500), (True, 0), (False, 1500)])
def test_refit_is_the_least_squares_of_all_private_parts(monkeypatch, name, data, limit):
    monkeypatch.setattr(least_squares, "DIRECT_LIMIT", limit)
    found = members(17, THREE)
    joint = build(name, found, 3)
    other = members(18, [SHAPE])[0]
    metric = other.metric if data else None
    private = refit(joint, joint.private[1], other.kernel, metric)
    moved = replace(joint, private=(private,))
    got = squared_error(other.kernel, moved.dense(0), metric)
    root = np.linalg.cholesky(metric.xx) if data else np.eye(36)
    seen = (design(joint, private, 0).reshape(-1, 5, 36) @ root).reshape(-1, 180)
    target = (other.kernel.reshape(5, 36) @ root).reshape(-1)
    left = target - np.linalg.lstsq(seen.T, target, rcond=None)[0] @ seen
    assert got == pytest.approx(left @ left, rel=1e-5)
    before = squared_error(other.kernel, joint.dense(1), metric)
    assert got < 0.9 * before
    rng = np.random.default_rng(0)
    for _ in range(10):
        bent = tuple(
            None if p is None else p + 1e-2 * rng.normal(size=p.shape) for p in private
        )
        worse = squared_error(other.kernel, replace(joint, private=(bent,)).dense(0), metric)
        assert worse > got


@pytest.mark.parametrize("name", JOINT_FORMS)
@pytest.mark.parametrize("data", [True, False])
def test_refit_reproduces_what_can_be_represented(name, data):
    found = members(19, THREE, data=data)
    joint = build(name, found, 3)
    target = joint.dense(2)
    private = refit(joint, joint.private[0], target, found[2].metric)
    moved = replace(joint, private=(private,)).dense(0)
    np.testing.assert_allclose(moved, target, atol=1e-5)
    assert np.abs(joint.dense(0) - target).max() > 0.1
    nothing = refit(joint, (None,) * len(joint.shared), target, found[2].metric)
    np.testing.assert_allclose(replace(joint, private=(nothing,)).dense(0), target, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("data", [True, False])
def test_refit_at_fewer_channels(name, data):
    found = members(20, THREE)
    joint = build(name, found, 3)
    shape = (3, *SHAPE[1:]) if JOINT_FORMS[name].shares == "first" else (5, 2, 3, 3)
    small = members(21, [shape])[0]
    metric = small.metric if data else None
    private = refit(joint, joint.private[0], small.kernel, metric)
    wanted = JOINT_FORMS[name].private_shapes(shape, (3,))
    assert [None if p is None else p.shape for p in private] == list(wanted)
    got = squared_error(small.kernel, replace(joint, private=(private,)).dense(0), metric)
    again = refit(joint, private, small.kernel, metric)
    same = squared_error(small.kernel, replace(joint, private=(again,)).dense(0), metric)
    assert got == pytest.approx(same, rel=1e-6)
    for factor in (0.98, 1.02):
        bent = tuple(None if p is None else factor * p for p in private)
        worse = squared_error(small.kernel, replace(joint, private=(bent,)).dense(0), metric)
        assert worse > got
    wide = (6, *SHAPE[1:]) if JOINT_FORMS[name].shares == "last" else (5, 3, 3, 3)
    with pytest.raises(ParameterError, match="fits the common part"):
        refit(joint, joint.private[0], members(22, [wide])[0].kernel, None)


@pytest.mark.parametrize("name", JOINT_FORMS)
def test_refit_keeps_what_the_data_does_not_show(name):
    found = members(23, THREE)
    joint = build(name, found, 3)
    silent = Moments(
        9, np.zeros(36), np.zeros(5), np.zeros((36, 36)), np.zeros((5, 36)), np.ones(5)
    )
    private = refit(joint, joint.private[0], joint.dense(0), silent)
    for old, new in zip(joint.private[0], private, strict=True):
        assert (old is None) == (new is None)
        assert old is None or np.abs(old - new).max() < 1e-9
