"""Work that threads do before its result is requested."""

import threading

import pytest

from dino_hf.inference.ahead import map_ahead


def numbers(count: int, read: list[int]):
    for number in range(count):
        read.append(number)
        yield number


def test_results_come_with_their_items_in_order():
    first = threading.Event()

    def slow_first(number: int) -> int:
        if number == 0:
            assert first.wait(10)
        if number == 2:
            first.set()
        return 10 * number

    assert list(map_ahead(slow_first, range(5), 3)) == [(0, 0), (1, 10), (2, 20), (3, 30), (4, 40)]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_as_many_items_as_threads_are_read_ahead(num_threads):
    read = []
    results = map_ahead(str, numbers(20, read), num_threads)
    assert next(results) == (0, "0")
    assert read == list(range(num_threads + 1))
    assert next(results) == (1, "1")
    assert read == list(range(num_threads + 2))
    assert len(list(results)) == 18


@pytest.mark.parametrize(("budget", "num_read"), [(4, 2), (6, 3), (8.5, 3), (9, 4)])
def test_items_are_read_ahead_until_their_cost_is_above_the_budget(budget, num_read):
    """Each costs 3. One more item is read before it is known that it has no room; it is not begun before there is."""
    read, running, most = [], [0], [0]
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            running[0] += 3
            most[0] = max(most[0], running[0])
        with lock:
            running[0] -= 3
        return number

    results = map_ahead(work, numbers(12, read), 8, cost=lambda number: 3, budget=budget)
    next(results)
    assert read == list(range(num_read))
    assert [item for item, _ in results] == list(range(1, 12))
    assert most[0] <= budget


def test_costs_are_added():
    """4 and 8 have no bit in common, so a budget of 11 tells a sum from other ways to join them."""
    has_begun = threading.Event()

    def work(cost: int) -> bool:
        if cost == 8:
            has_begun.set()
        return cost == 4 and has_begun.wait(0.2)

    results = map_ahead(work, iter([4, 8, 1]), 8, cost=lambda cost: cost, budget=11)
    assert list(results) == [(4, False), (8, False), (1, False)]


def test_an_item_above_the_budget_is_processed_alone_and_before_the_next_is_read():
    read = []
    results = map_ahead(str, numbers(4, read), 8, cost=lambda number: 50, budget=10)
    for number in range(4):
        assert next(results) == (number, str(number))
        assert read == list(range(number + 1))


def test_an_error_comes_in_its_turn_and_ends_the_threads():
    def fail_at_two(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    before = threading.active_count()
    results = map_ahead(fail_at_two, range(9), 4)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert threading.active_count() == before


def test_work_that_was_not_begun_is_cancelled_when_the_results_are_not_wanted():
    begun, go = [], threading.Event()

    def wait(number: int) -> int:
        begun.append(number)
        assert number == 0 or go.wait(10)
        return number

    results = map_ahead(wait, range(9), 2)
    assert next(results) == (0, 0)
    threading.Timer(0.05, go.set).start()
    results.close()
    assert max(begun) <= 3
