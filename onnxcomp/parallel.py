"""Work on several items at once, with results in order and few of them waiting."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def ordered_map(
    function: Callable[[_Item], _Found], items: Iterable[_Item], *, at_once: int
) -> Iterator[_Found]:
    """Yield what a function makes of every item, in their order.

    Args:
        function: Called in other threads, unless `at_once` is 1.
        items: Taken as they are needed: with their results at most `at_once` + 1 are held.
        at_once: Calls that run at the same time.
    """
    if at_once == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[_Found]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
