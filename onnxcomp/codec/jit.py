"""Inner loops compiled by numba, which is an extra: imported where it is needed only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def inner_loop(function: Function, *, cache: bool, allocates: bool) -> Function:
    """Compile a function on typed integers and arrays when it is first called.

    Args:
        function: The function.
        cache: Keep it on disk, where numba finds a folder that it may write to; there is none
            where the package and the home of the user are read-only.
        allocates: It makes arrays. Reference counts are left out otherwise, since calls with
            many arrays would spend most of their time on them.
    """
    options: dict[str, Any] = {"error_model": "numpy", "nogil": True, "_nrt": allocates}
    made: Function
    try:
        made = numba.njit(cache=cache, **options)(function)
    except RuntimeError:  # no such folder
        made = numba.njit(**options)(function)
    return made
