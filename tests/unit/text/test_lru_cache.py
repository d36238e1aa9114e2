import copy
import pickle

from segalign.text.lru_cache import LruCache


def test_forgets_what_was_used_longest_ago():
    cache = LruCache(3)
    for key in "abc":
        cache.put(key, key.upper(), 1)
    assert cache.get("a") == "A"
    cache.put("d", "D", 1)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]


def test_cost_stays_bounded_and_exact():
    cache = LruCache(10)
    for number in range(100):
        cache.put(number % 7, number, number % 5)
        assert cache.cost <= 10
    assert cache.cost == sum(cost for _, cost in cache._entries.values())


def test_replacing_a_value_replaces_its_cost():
    cache = LruCache(10)
    cache.put("a", 1, 8)
    cache.put("a", 2, 3)
    assert (cache.get("a"), cache.cost, len(cache)) == (2, 3, 1)


def test_what_costs_too_much_is_not_stored():
    cache = LruCache(10)
    cache.put("small", 1, 10)
    cache.put("large", 2, 11)
    assert (cache.get("small"), cache.get("large")) == (1, None)


def test_clear():
    cache = LruCache(10)
    cache.put("a", 1, 5)
    cache.clear()
    assert (len(cache), cache.cost, cache.get("a")) == (0, 0, None)


def test_copies_start_empty():
    cache = LruCache(10)
    cache.put("a", 1, 5)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(twin), twin.cost, twin.max_cost) == (0, 0, 10)
    assert cache.get("a") == 1
