import pytest


def twice(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize("cache", [True, False])
def test_functions_are_compiled_where_nothing_can_be_kept_on_disk(cache, monkeypatch):
    """A package and a home that are read-only, as in many containers."""
    numba = pytest.importorskip("numba")
    from onnxcomp.codec.jit import inner_loop

    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(twice)
    made = inner_loop(twice, cache=cache, allocates=False)
    assert made(21) == 42
    assert made.signatures
