from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import ParameterError
from onnxcomp.numerics import joint_stacks
from onnxcomp.numerics.factorization import compose
from onnxcomp.numerics.joint_svd import JOINT_FORMS, errors
from onnxcomp.numerics.svd import output_basis_errors
from tests.numerics.joint_cases import (
    BOTH,
    PLAIN,
    SHAPE,
    THREE,
    alone,
    blocks,
    build,
    chain_settings,
    convolve,
    members,
    ranks,
)


def full(name, found):
    """Ranks at which nothing is lost."""
    m, c = found[0].kernel.shape[:2]
    if JOINT_FORMS[name].shares == "outer":
        return c, m
    u, w = blocks(name, found[0].kernel).shape
    top = {"first": min(u, len(found) * w), "last": min(w, len(found) * u)}
    shares = JOINT_FORMS[name].shares
    return (top["last"], 1) if shares == "both" else (top[shares],)


# ---------------------------------------------------------------------- from the weights alone


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(PLAIN),
    st.integers(0, 10**6),
    st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 3)] * 2),
    st.integers(1, 4),
    st.integers(1, 60),
)
def test_errors_are_the_tail_of_the_stack(name, seed, shape, count, rank):
    found = members(seed, [shape] * count, data=False)
    shares = JOINT_FORMS[name].shares
    stack = np.concatenate(
        [blocks(name, m.kernel) for m in found], 1 if shares == "first" else 0
    )
    values = np.linalg.svd(stack, compute_uv=False)
    rank = min(rank, len(values))
    lost = errors(JOINT_FORMS[name].build(found, (rank,)), found).sum()
    assert lost == pytest.approx(np.square(values[rank:]).sum(), abs=1e-9 * values @ values)


@pytest.mark.parametrize("name", PLAIN)
def test_the_other_stack_has_another_tail(name):
    found = members(0, THREE, data=False)
    wrong = 0 if JOINT_FORMS[name].shares == "first" else 1
    stack = np.concatenate([blocks(name, m.kernel) for m in found], wrong)
    tail = np.square(np.linalg.svd(stack, compute_uv=False)[2:]).sum()
    assert abs(errors(build(name, found, 2), found).sum() - tail) > 1e-3 * tail


@pytest.mark.parametrize("name", JOINT_FORMS)
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("data", "tolerance"), [(True, 1e-6), (False, 1e-12)])
def test_full_rank_is_the_dense_convolution(name, size, data, tolerance):
    found = members(1, [(4, 3, size, size)] * 2, data=data)
    joint = JOINT_FORMS[name].build(found, full(name, found))
    x = np.random.default_rng(0).normal(size=(3, 13, 12))
    for strides, pads, dilations in (
        ((1, 1), (size // 2,) * 4, (1, 1)),
        ((2, 2), (0, 1, 1, 0), (1, 1)),
        ((2, 1), (1, 2, 0, 3), (1, 2)),
        ((1, 3), (2, 0, 1, 1), (2, 1)),
    ):
        options = {"strides": strides, "pads": pads, "dilations": dilations}
        for i, member in enumerate(found):
            np.testing.assert_allclose(joint.dense(i), member.kernel, rtol=0, atol=tolerance)
            want, y = convolve(x, member.kernel, **options), x
            parts = chain_settings(name, *options.values())
            for kernel, part in zip(joint.chain(i), parts, strict=True):
                y = convolve(y, kernel, **part)
            np.testing.assert_allclose(
                y, want, rtol=0, atol=tolerance * max(1, np.abs(want).max())
            )


@pytest.mark.parametrize("name", JOINT_FORMS)
def test_a_rank_less_than_full_is_not_the_dense_convolution(name):
    found = members(1, [(4, 3, 3, 3)] * 2, data=False)
    top = full(name, found)
    joint = JOINT_FORMS[name].build(
        found, (*top[:-1], top[-1] - 1) if len(top) == 1 else (2, 1)
    )
    assert all(np.abs(joint.dense(i) - m.kernel).max() > 1e-3 for i, m in enumerate(found))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("order", ["last", "first"])
def test_both_never_loses_more_by_another_round(name, order):
    found = members(2, [(6, 8, 3, 3)] * 3, data=False)
    losses = [
        errors(JOINT_FORMS[name].build(found, (2, 2), rounds=n, order=order), found).sum()
        for n in range(1, 8)
    ]
    assert (np.diff(losses) <= 1e-12 * losses[0]).all()
    assert losses[-1] < 0.999 * losses[0]
    base = JOINT_FORMS[name].base
    parts = [
        errors(build(f"{base}_{side}", found, 2), found).sum() for side in ("first", "last")
    ]
    assert losses[0] <= max(parts)
    assert losses[-1] < min(parts)


def test_the_order_decides_what_comes_first():
    found = members(3, THREE, data=False)
    one = {
        order: JOINT_FORMS["spatial_both"].build(
            found, (2, 3), rounds=1, order=order, split="first"
        )
        for order in ("last", "first")
    }
    right = JOINT_FORMS["spatial_last"].build(found, (2,), split="first").shared[1]
    left = JOINT_FORMS["spatial_first"].build(found, (3,), split="first").shared[0]
    np.testing.assert_allclose(np.abs(one["last"].shared[1]), np.abs(right), atol=1e-9)
    np.testing.assert_allclose(np.abs(one["first"].shared[0]), np.abs(left), atol=1e-9)
    assert not np.allclose(np.abs(one["first"].shared[1]), np.abs(right), atol=1e-2)
    assert not np.allclose(np.abs(one["last"].shared[0]), np.abs(left), atol=1e-2)


def paper(matrices, right, left, rounds):
    """Algorithm 3 of the paper, word for word."""
    U = [np.zeros_like(M) for M in matrices]  # the part with U in common
    for _ in range(rounds):
        rest = [M - part for M, part in zip(matrices, U, strict=True)]
        V = np.linalg.svd(np.concatenate(rest), full_matrices=False)[2][:right]
        parts = [R @ V.T @ V for R in rest]
        rest = [M - part for M, part in zip(matrices, parts, strict=True)]
        basis = np.linalg.svd(np.concatenate(rest, axis=1))[0][:, :left]
        U = [basis @ basis.T @ R for R in rest]
    return [part + other for part, other in zip(parts, U, strict=True)]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("rounds", "same"), [(1, True), (30, True), (29, False)])
def test_both_is_the_papers_algorithm(monkeypatch, name, rounds, same):
    monkeypatch.setattr(joint_stacks, "_WARM", np.inf)
    found = members(4, THREE, data=False)
    joint = JOINT_FORMS[name].build(found, (1, 2), rounds=rounds if same else None)
    wanted = paper([blocks(name, m.kernel) for m in found], 1, 2, rounds)
    gaps = [np.abs(blocks(name, joint.dense(i)) - w).max() for i, w in enumerate(wanted)]
    assert (max(gaps) < 1e-8) == same


@pytest.mark.parametrize("name", BOTH)
def test_warm_starts_lose_no_more(monkeypatch, name):
    found = members(
        5, [(12, 12, 3, 3)] * 3, data=False
    )  # in stacks as wide as 9 times the rank
    warm = errors(JOINT_FORMS[name].build(found, (1, 1)), found).sum()
    monkeypatch.setattr(joint_stacks, "_WARM", np.inf)
    exact = errors(JOINT_FORMS[name].build(found, (1, 1)), found).sum()
    assert warm == pytest.approx(exact, rel=1e-4)
    assert errors(build(name, found, 4), found).sum() < 0.99 * exact


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("data", [True, False])
def test_both_with_one_part_is_that_part(name, data):
    found, form = members(6, THREE, data=data), JOINT_FORMS[name]
    for pair, side in (((2, 0), "last"), ((0, 2), "first")):
        joint, want = form.build(found, pair), build(f"{form.base}_{side}", found, 2)
        for i in range(3):
            np.testing.assert_allclose(joint.dense(i), want.dense(i), atol=1e-9)
        assert [p is None for p in joint.shared] == [p is None for p in want.shared]
        other = build(f"{form.base}_{'last' if side == 'first' else 'first'}", found, 2)
        assert np.abs(joint.dense(0) - other.dense(0)).max() > 1e-2


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("data", [True, False])
def test_one_chain_is_the_sum_of_both_parts(name, data):
    joint = JOINT_FORMS[name].build(members(7, THREE, data=data), (2, 3))
    B, A = joint.shared
    for i, (F, L) in enumerate(joint.private):
        np.testing.assert_allclose(
            joint.dense(i), compose((F, A)) + compose((B, L)), atol=1e-12
        )
        assert np.abs(joint.dense(i) - compose((F, A))).max() > 0.1


@pytest.mark.parametrize("name", PLAIN)
def test_the_papers_split_puts_the_singular_values_into_the_first(name):
    found = members(8, THREE, data=False)
    joint = build(name, found, 3, split="first")
    first = JOINT_FORMS[name].shares == "first"
    stack = np.concatenate([blocks(name, m.kernel) for m in found], 1 if first else 0)
    values = np.linalg.svd(stack, compute_uv=False)[:3]
    fronts = [joint.shared[0]] if first else [own[0] for own in joint.private]
    energy = np.sum([np.square(f).sum(axis=(1, 2, 3)) for f in fronts], axis=0)
    np.testing.assert_allclose(np.sqrt(energy), values, rtol=1e-8)
    even = build(name, found, 3)
    assert not np.allclose(even.chain(0)[0], joint.chain(0)[0], rtol=1e-2)
    np.testing.assert_allclose(even.dense(0), joint.dense(0), atol=1e-10)


@pytest.mark.parametrize("data", [True, False])
def test_narrower_members_join_on_the_last_side(data):
    for name, shapes in (
        ("spatial_last", [(5, 4, 3, 3), (5, 2, 3, 3), (5, 4, 1, 3)]),
        ("output_basis_last", [(5, 4, 3, 3), (5, 2, 1, 1)]),
        ("input_basis_last", [(5, 4, 3, 3), (5, 2, 3, 3)]),
    ):
        found = members(25, shapes, data=data)
        joint = build(name, found, 3)
        assert [joint.dense(i).shape for i in range(len(shapes))] == shapes
        for i, shape in enumerate(shapes):
            kinds = JOINT_FORMS[name].shared_shapes, JOINT_FORMS[name].private_shapes
            for parts, kind in zip((joint.shared, joint.private[i]), kinds, strict=True):
                found_shapes = [None if p is None else p.shape for p in parts]
                assert found_shapes == list(kind(shape, (3,)))
        stack = np.concatenate([blocks(name, m.kernel) for m in alone(found)])
        if not data:
            tail = np.square(np.linalg.svd(stack, compute_uv=False)[3:]).sum()
            assert errors(joint, found).sum() == pytest.approx(tail, rel=1e-9)


def test_kernels_of_several_sizes_share_the_outer_two_of_three():
    found = members(26, [(5, 4, 3, 3), (5, 4, 1, 1), (5, 4, 5, 5)])
    joint = build("tucker2_outer", found, 4)
    assert [joint.dense(i).shape for i in range(3)] == [m.kernel.shape for m in found]
    assert errors(joint, found).sum() < errors(build("tucker2_outer", found, 3), found).sum()


def test_forms_tell_shapes_and_where_they_apply():
    assert [n for n, f in JOINT_FORMS.items() if f.applies((8, 8, 1, 1))] == [
        f"output_basis_{side}" for side in ("first", "last", "both")
    ]
    assert not JOINT_FORMS["spatial_both"].applies((8, 8, 3, 1))
    assert JOINT_FORMS["spatial_first"].max_rank((4, 6, 3, 3)) == 12
    found = members(28, THREE)
    for name, form in JOINT_FORMS.items():
        joint = build(name, found, 3)
        size = ranks(name, 3)
        pairs = (
            (form.shared_shapes(SHAPE, size), joint.shared),
            (
                form.private_shapes(SHAPE, size),
                joint.private[1],
            ),
        )
        for wanted, parts in pairs:
            assert [None if p is None else p.shape for p in parts] == list(wanted), name
        assert joint.form == name
    exact = output_basis_errors(found[0].kernel, found[0].metric)
    (lost,) = errors(build("output_basis_first", found[:1], 3), found[:1])
    assert lost == pytest.approx(exact[3], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("spatial_first", {"shapes": [SHAPE, (5, 3, 3, 3)]}, r"members\[1\].*c = 4"),
        ("spatial_last", {"shapes": [SHAPE, (4, 4, 3, 3)]}, r"members\[1\].*m = 5"),
        ("spatial_last", {"shapes": [SHAPE, (5, 4, 3, 1)]}, "kw = 3"),
        ("input_basis_last", {"shapes": [SHAPE, (5, 4, 1, 3)]}, "kh = 3"),
        ("output_basis_both", {"shapes": [SHAPE, (6, 4, 3, 3)]}, "m = 5"),
        ("tucker2_outer", {"shapes": [SHAPE, (5, 2, 3, 3)]}, "c = 4"),
        ("spatial_first", {"ranks": (13,)}, "1 to 12"),
        ("spatial_first", {"ranks": (0,)}, "1 to 12"),
        ("spatial_last", {"ranks": (2, 2)}, "1 to 15"),
        ("spatial_both", {"ranks": (0, 0)}, "not all 0"),
        ("spatial_both", {"ranks": (2,)}, "0 to 15, 0 to 12"),
        ("tucker2_outer", {"ranks": (5, 5)}, "1 to 4, 1 to 5"),
        ("spatial_first", {"split": "last"}, "even, first"),
        ("spatial_both", {"order": "both"}, "first, last"),
        ("spatial_first", {"rounds": -1}, "at least 0"),
        ("spatial_first", {"shapes": []}, "at least one member"),
    ],
)
def test_what_does_not_fit_is_named(name, change, message):
    found = members(29, change.pop("shapes", THREE))
    size = change.pop("ranks", ranks(name, 2))
    with pytest.raises(ParameterError, match=message):
        JOINT_FORMS[name].build(found, size, **change)


def test_unusable_members_are_named():
    found = members(30, THREE)
    for bad, message in (
        (replace(found[1], metric=None), r"members\[1\].metric.*all members or for none"),
        (replace(found[1], weight=0.0), r"members\[1\].weight.*above 0"),
        (replace(found[1], kernel=found[1].kernel[0]), r"members\[1\].kernel"),
        (replace(found[1], metric=members(1, [(5, 2, 3, 3)])[0].metric), "over 36 inputs"),
    ):
        with pytest.raises(ParameterError, match=message):
            build("spatial_first", [found[0], bad], 2)
    with pytest.raises(ParameterError, match="at least 1"):
        build("spatial_both", alone(found), 2, rounds=0)
