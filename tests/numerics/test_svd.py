import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import DataError, ParameterError
from onnxcomp.numerics import least_squares, svd
from onnxcomp.numerics.factorization import (
    Factorization,
    compose,
    refit,
    squared_error,
)
from onnxcomp.numerics.moments import MomentsBuilder, RowMoments
from onnxcomp.numerics.svd import (
    FORMS,
    input_basis,
    output_basis,
    output_basis_errors,
    spatial,
    tucker2,
    tucker_ranks,
)

SHAPES = [(5, 4, 3, 3), (4, 6, 1, 1), (3, 5, 2, 3), (8, 2, 3, 1)]


def case(seed, shape, *, rows=None, live=None):
    """A kernel and the moments of correlated patches; `live` inputs vary, the rest is dead."""
    rng = np.random.default_rng(seed)
    m, d = shape[0], int(np.prod(shape[1:]))
    W = rng.normal(size=shape)
    mix = rng.normal(size=(d, d)) * np.geomspace(1, 0.05, d)
    x = rng.normal(size=(rows or 20 * d, d)) @ mix
    if live is not None:
        x[:, live:] = 0
    builder = MomentsBuilder(d, m)
    builder.add(x, x @ W.reshape(m, d).T)
    return W, builder.finish(), x


def convolve(x, kernel):
    """Valid cross-correlation of x (c, h, w), written out."""
    m, _, kh, kw = kernel.shape
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    out = np.zeros((m, h, w))
    for i in range(kh):
        for j in range(kw):
            out += np.einsum("mc,chw->mhw", kernel[:, :, i, j], x[:, i : i + h, j : j + w])
    return out


def built(name, W, metric):
    """All factorizations of one form, rank 1 to the largest."""
    return [
        FORMS[name].build(W, metric, r) for r in range(1, FORMS[name].max_rank(W.shape) + 1)
    ]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_chain_computes_its_dense_kernel(name, shape):
    W, metric, _ = case(0, shape)
    x = np.random.default_rng(1).normal(size=(shape[1], 7, 6))
    form = FORMS[name].build(W, metric, 2)
    y = x
    for kernel in form.kernels:
        y = convolve(y, kernel)
    want = convolve(x, form.dense())
    np.testing.assert_allclose(y, want, rtol=1e-9, atol=1e-9)
    assert tuple(k.shape for k in form.kernels) == FORMS[name].shapes(shape, 2)
    assert form.ranks == tuple(k.shape[0] for k in form.kernels[:-1])
    wrong = Factorization(name, (1.1 * form.kernels[0], *form.kernels[1:]))
    assert np.abs(convolve(x, wrong.dense()) - want).max() > 1e-3


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data", [True, False])
def test_error_curves_are_what_is_achieved(name, shape, data):
    W, metric, _ = case(2, shape)
    metric = metric if data else None
    errors = FORMS[name].errors(W, metric)
    total = squared_error(W, 0 * W, metric)
    achieved = np.array([squared_error(W, f.dense(), metric) for f in built(name, W, metric)])
    assert errors.shape == (FORMS[name].max_rank(shape) + 1,)
    assert errors[0] == pytest.approx(total, rel=1e-9)
    assert (np.diff(errors) <= 1e-9 * total).all()
    assert (achieved <= errors[1:] + 1e-8 * total).all()
    assert achieved[-1] <= 1e-8 * total
    exact = name in ("output_basis", "input_basis") or (name == "spatial" and not data)
    if exact:
        np.testing.assert_allclose(achieved, errors[1:], atol=1e-8 * total)
    if data and name == "output_basis":  # the curve of the wrong metric is another one
        wrong = FORMS[name].errors(W, None)
        assert np.abs(wrong / wrong[0] - errors / errors[0]).max() > 1e-2


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data", [True, False])
def test_a_curve_up_to_a_rank_is_the_beginning_of_the_whole(name, shape, data):
    W, metric, _ = case(2, shape)
    metric = metric if data else None
    whole = FORMS[name].errors(W, metric)
    for top in {1, len(whole) // 2, len(whole) - 1} - {0}:
        found = FORMS[name].errors(W, metric, top)
        assert found.shape == (top + 1,)
        np.testing.assert_allclose(found, whole[: top + 1], atol=1e-9 * whole[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_spatial_curve_is_exact_before_the_rounds(shape):
    W, metric, _ = case(3, shape)
    errors = FORMS["spatial"].errors(W, metric)
    for r in range(1, len(errors)):
        start = squared_error(W, spatial(W, metric, r, rounds=0).dense(), metric)
        final = squared_error(W, spatial(W, metric, r).dense(), metric)
        assert start == pytest.approx(errors[r], abs=1e-8 * errors[0])
        assert final <= start + 1e-10 * errors[0]


def test_rounds_pay_for_separable_forms():
    W, metric, _ = case(4, (6, 5, 3, 3))
    for form in (spatial, input_basis):
        losses = [
            squared_error(W, form(W, metric, 3, rounds=n).dense(), metric) for n in (0, 1, 4)
        ]
        assert losses[2] < losses[1] < losses[0]


def test_a_round_that_cannot_be_solved_is_not_taken(monkeypatch):
    """Along directions without samples a basis may grow until its moments are but noise."""
    W, metric, _ = case(4, (6, 5, 3, 3))
    wanted, solve, calls = spatial(W, metric, 3, rounds=1).dense(), svd.fit_last, []

    def fails_at_last(cross, gram, prior):
        calls.append(gram)
        if len(calls) == 3:
            raise DataError("second moments are not positive semidefinite")
        return solve(cross, gram, prior)

    monkeypatch.setattr(svd, "fit_last", fails_at_last)
    np.testing.assert_array_equal(spatial(W, metric, 3, rounds=9).dense(), wanted)
    assert len(calls) == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_alone_is_the_classical_svd(shape):
    W, _, _ = case(5, shape)
    m, c, kh, kw = shape
    unfoldings = {
        "output_basis": W.reshape(m, -1),
        "input_basis": W.transpose(0, 2, 3, 1).reshape(-1, c),
        "spatial": W.transpose(0, 3, 1, 2).reshape(m * kw, c * kh),
    }
    for name, unfolding in unfoldings.items():
        values = np.linalg.svd(unfolding, compute_uv=False)
        for rank, form in enumerate(built(name, W, None), 1):
            tail = np.square(values[rank:]).sum()
            assert squared_error(W, form.dense(), None) == pytest.approx(tail, abs=1e-9)
            first, second = form.kernels  # the even split is the square root of sigma
            np.testing.assert_allclose(
                np.square(first).sum(axis=(1, 2, 3)), values[:rank], rtol=1e-4, atol=1e-4
            )
            np.testing.assert_allclose(
                np.square(second).sum(axis=(0, 2, 3)), values[:rank], rtol=1e-4, atol=1e-4
            )


def test_weights_alone_tucker_is_sequential_svd():
    W, _, _ = case(6, (5, 4, 3, 3))
    q, p = 2, 3
    V = np.linalg.svd(W.transpose(1, 0, 2, 3).reshape(4, -1))[0][:, :q]
    inner = np.einsum("mcij,cq->mqij", W, V)
    U = np.linalg.svd(inner.reshape(5, -1))[0][:, :p]
    want = np.einsum("mp,np,nqij,cq->mcij", U, U, inner, V)
    np.testing.assert_allclose(tucker2(W, None, (q, p)).dense(), want, atol=1e-9)


def test_a_matrix_is_the_plain_whitened_svd():
    W, metric, _ = case(7, (6, 9, 1, 1))
    L = np.linalg.cholesky(metric.xx)
    U, s, V = np.linalg.svd(W[:, :, 0, 0] @ L, full_matrices=False)
    want = (U[:, :3] * s[:3]) @ V[:3] @ np.linalg.inv(L)
    np.testing.assert_allclose(output_basis(W, metric, 3).dense()[:, :, 0, 0], want, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_no_perturbation_of_the_last_factor_wins(name):
    W, metric, _ = case(8, (5, 4, 3, 3))
    form = FORMS[name].build(W, metric, 3)
    best = squared_error(W, form.dense(), metric)
    rng = np.random.default_rng(0)
    for _ in range(20):
        last = form.kernels[-1] + 1e-2 * rng.normal(size=form.kernels[-1].shape)
        other = compose((*form.kernels[:-1], last))
        assert squared_error(W, other, metric) > best


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_output_basis_beats_every_other_factorization(seed, rank):
    W, metric, _ = case(seed, (4, 3, 2, 2))
    best = squared_error(W, output_basis(W, metric, rank).dense(), metric)
    rng = np.random.default_rng(seed)
    for scale in (1e-3, 0.1, 1.0):
        form = output_basis(W, metric, rank)
        kernels = tuple(k + scale * rng.normal(size=k.shape) for k in form.kernels)
        fitted = refit(Factorization("output_basis", kernels), W, metric)
        assert squared_error(W, fitted.dense(), metric) >= best - 1e-9
    alone = output_basis(W, None, rank)
    assert squared_error(W, alone.dense(), metric) >= best - 1e-9


def test_the_metric_matters():
    W, metric, _ = case(9, (5, 4, 3, 3))
    for name, form in FORMS.items():
        aware = squared_error(W, form.build(W, metric, 2).dense(), metric)
        alone = squared_error(W, form.build(W, None, 2).dense(), metric)
        assert aware < 0.9 * alone, name


@pytest.mark.parametrize("name", FORMS)
def test_both_sides_of_an_inner_channel_carry_the_same_energy(name):
    W, metric, x = case(10, (5, 4, 3, 3))
    form = FORMS[name].build(W, metric, 3)
    for place in range(1, len(form.kernels)):
        front, back = compose(form.kernels[:place]), compose(form.kernels[place:])
        patches = x.reshape(len(x), 4, 3, 3)
        kh, kw = front.shape[2:]
        inner = [
            np.einsum("ncij,rcij->nr", patches[:, :, i : i + kh, j : j + kw], front).var(
                axis=0
            )
            for i in range(3 - kh + 1)
            for j in range(3 - kw + 1)
        ]
        behind = np.square(back).sum(axis=(0, 2, 3))
        np.testing.assert_allclose(np.mean(inner, axis=0), behind, rtol=1e-6)
        doubled = np.square(2 * back).sum(axis=(0, 2, 3))
        assert not np.allclose(np.mean(inner, axis=0), doubled, rtol=1e-2)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dead_inputs_are_harmless(name, shape):
    d = int(np.prod(shape[1:]))
    W, metric, _ = case(11, shape, live=max(d // 3, 1))
    errors = FORMS[name].errors(W, metric)
    achieved = [squared_error(W, f.dense(), metric) for f in built(name, W, metric)]
    assert np.isfinite(errors).all()
    assert (achieved <= errors[1:] + 1e-7 * errors[0]).all()
    assert all(np.abs(f.dense()).max() < 1e3 for f in built(name, W, metric))


@pytest.mark.parametrize("name", FORMS)
def test_a_constant_input_and_a_zero_kernel_are_harmless(name):
    W, metric, _ = case(12, (3, 4, 3, 3), live=0)
    assert squared_error(W, FORMS[name].build(W, metric, 2).dense(), metric) == 0
    W, metric, _ = case(12, (3, 4, 3, 3))
    assert np.abs(FORMS[name].build(0 * W, metric, 2).dense()).max() == 0


def test_conjugate_gradients_agree_with_the_direct_solve(monkeypatch):
    W, metric, _ = case(13, (6, 5, 3, 3))
    direct = squared_error(W, spatial(W, metric, 4).dense(), metric)
    start = squared_error(W, spatial(W, metric, 4, rounds=0).dense(), metric)
    monkeypatch.setattr(least_squares, "DIRECT_LIMIT", 0)
    iterated = squared_error(W, spatial(W, metric, 4).dense(), metric)
    assert iterated == pytest.approx(direct, abs=0.05 * (start - direct))
    monkeypatch.setattr(least_squares, "CG_STEPS", 1)
    hasty = squared_error(W, spatial(W, metric, 4).dense(), metric)
    assert direct + 0.05 * (start - direct) < hasty <= start


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("data", [True, False])
def test_refit_moves_the_last_factor_to_the_new_optimum(name, data):
    W, metric, _ = case(14, (5, 4, 3, 3))
    form = FORMS[name].build(W, metric, 3)
    target = W + 0.5 * np.random.default_rng(0).normal(size=W.shape)
    other = case(15, (5, 4, 3, 3))[1] if data else None
    moved = refit(form, target, other)
    assert all(a is b for a, b in zip(form.kernels[:-1], moved.kernels[:-1], strict=True))
    # brute force: the last kernel is linear in the output, so stack its design matrix
    last = form.kernels[-1]
    units = np.eye(last[0].size).reshape(-1, 1, *last.shape[1:])
    design = np.stack([compose((*form.kernels[:-1], u)).reshape(-1) for u in units])
    L = np.eye(36) if other is None else np.linalg.cholesky(other.xx)
    want = np.linalg.lstsq((design @ L).T, (target.reshape(5, -1) @ L).T, rcond=None)[0].T
    np.testing.assert_allclose(moved.kernels[-1].reshape(5, -1), want, atol=1e-5)
    assert not np.allclose(form.kernels[-1].reshape(5, -1), want, atol=1e-2)


def test_rows_are_enough_for_the_output_basis_and_its_refit():
    W, metric, x = case(16, (4, 30, 1, 1), rows=400)
    y = x @ W[:, :, 0, 0].T
    rows = RowMoments.of(x, y)
    dense, dual = output_basis(W, metric, 2), output_basis(W, rows, 2)
    np.testing.assert_allclose(dual.dense(), dense.dense(), atol=1e-4)
    np.testing.assert_allclose(refit(dual, W, rows).dense(), dense.dense(), atol=1e-4)
    with pytest.raises(ParameterError, match="only output_basis"):
        input_basis(W, rows, 2)


@pytest.mark.parametrize("m", [8, 40])
@pytest.mark.parametrize("wide", [True, False])
def test_few_rows_give_the_optimum_of_their_moments(m, wide):
    """Through the outputs of 12 rows where that is less work than their products."""
    W, _, _ = case(18, (m, 50 if wide else 30, 1, 1), rows=400)
    x = np.random.default_rng(18).normal(size=(12, W.shape[1]))
    x *= np.geomspace(1, 0.1, 12)[:, None]
    metric = RowMoments.of(x, x @ W[:, :, 0, 0].T)
    errors = output_basis_errors(W, metric)
    values = np.linalg.eigvalsh(metric.quadratic(W[:, :, 0, 0]))[::-1].clip(0)
    want = np.append(np.cumsum(values[::-1])[::-1], 0.0)
    np.testing.assert_allclose(errors, want[: len(errors)], atol=1e-9 * want[0])
    for rank in (1, 3, 8, *([20] if m > 20 else [])):  # more than rows: nothing is lost
        lost = squared_error(W, output_basis(W, metric, rank).dense(), metric)
        assert lost == pytest.approx(errors[rank], rel=1e-6, abs=1e-9 * errors[0])
    plain = squared_error(W, output_basis(W, None, 3).dense(), metric)
    assert plain > 1.01 * errors[3]


def test_tucker_ranks_are_equal_shares():
    assert tucker_ranks(8, 16, 16) == (8, 8)
    assert tucker_ranks(8, 8, 16) == (4, 8)
    assert tucker_ranks(1, 3, 300) == (1, 1)
    assert tucker_ranks(0, 3, 5) == (0, 0)
    assert FORMS["tucker2"].shapes((2, 99, 3, 3), 99)[0] == (18, 99, 1, 1)


def test_forms_that_add_nothing_do_not_apply():
    assert [n for n, f in FORMS.items() if f.applies((8, 8, 1, 1))] == ["output_basis"]
    assert not FORMS["spatial"].applies((8, 8, 3, 1))
    assert FORMS["spatial"].applies((8, 8, 3, 3))


def test_bad_arguments_are_named():
    W, metric, _ = case(17, (5, 4, 3, 3))
    with pytest.raises(ParameterError, match="'rank' must be 1 to 5"):
        output_basis(W, metric, 6)
    with pytest.raises(ParameterError, match="over 27 inputs"):
        output_basis(W[:, :3], metric, 2)
    with pytest.raises(ParameterError, match="kernel"):
        output_basis(W[0], metric, 2)
    with pytest.raises(ParameterError, match="1 to 5"):
        tucker2(W, metric, (2, 6))
