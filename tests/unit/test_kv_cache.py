import torch

from hybrid.kv_cache import GROWTH, CachePool, LatentCache


class Shape:
    num_hidden_layers = 2
    latent_dim = 3
    max_position_embeddings = 10_000


def cache(token_ids: list[int], context: int | None = None) -> LatentCache:
    made = LatentCache(Shape(), torch.device("cpu"), context=context)  # type: ignore[arg-type]
    made.reserve(len(token_ids))
    for layer in range(2):
        made.layer(layer)[: len(token_ids)] = torch.tensor(token_ids)[:, None] + 100.0 * layer
    made.advance(token_ids)
    return made


def test_growing_keeps_what_is_valid() -> None:
    grown = cache([1, 2, 3])
    grown.reserve(GROWTH)
    assert len(grown.layer(0)) >= GROWTH + 3
    assert grown.layer(1)[:3, 0].tolist() == [101, 102, 103]


def test_reserve_does_not_move_what_has_room() -> None:
    made = cache([1])
    before = made.layer(0).data_ptr()
    made.reserve(GROWTH - 1)
    assert made.layer(0).data_ptr() == before


def test_the_longest_shared_prefix_is_taken_and_cut() -> None:
    pool = CachePool(4, 10_000)
    for ids in ([1, 2, 9], [1, 2, 3, 4, 5], [7]):
        pool.keep(cache(ids))
    taken = pool.take([1, 2, 3, 4, 8, 9])
    assert taken is not None
    assert taken.token_ids == [1, 2, 3, 4]
    assert pool.take([1, 2, 3, 4, 8, 9]).token_ids == [1, 2]  # type: ignore[union-attr]
    assert pool.tokens == 1


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = CachePool(4, 10_000)
    pool.keep(cache([1, 2, 3]))
    taken = pool.take([1, 2, 3])
    assert taken is not None
    assert taken.token_ids == [1, 2]


def test_a_long_conversation_is_not_cut_for_a_short_greeting() -> None:
    pool = CachePool(4, 10_000)
    pool.keep(cache(list(range(100))))
    forked = pool.take([0, 1, 2, 500, 501])
    assert forked is not None
    assert forked.token_ids == [0, 1, 2]
    forked.reserve(5)
    forked.layer(1)[:3] = -1.0
    whole = pool.take([*range(100), 7])
    assert whole is not None
    assert whole.length == 100
    assert whole.layer(1)[:3, 0].tolist() == [100, 101, 102]


def test_the_least_recently_used_goes_first() -> None:
    pool = CachePool(2, 10_000)
    for ids in ([1, 1], [2, 2], [3, 3]):
        pool.keep(cache(ids))
    assert pool.take([1, 1, 1]) is None
    assert pool.take([2, 2, 2]) is not None


def test_the_token_limit_holds_but_keeps_the_newest() -> None:
    pool = CachePool(4, 2 * GROWTH)
    for ids in ([1, 2, 3], [4, 5, 6], [7]):
        pool.keep(cache(ids))
    assert pool.tokens == 4  # memory counts, of which each has GROWTH tokens' worth
    pool.keep(cache(list(range(10, 13 + 2 * GROWTH))))
    assert pool.tokens == 3 + 2 * GROWTH


def test_a_cut_cache_still_counts_with_all_its_memory() -> None:
    pool = CachePool(4, 3 * GROWTH)
    long = cache([9] * (3 * GROWTH))
    long.truncate(1)
    pool.keep(cache([1, 2]))
    pool.keep(long)
    assert pool.take([1, 2, 3]) is None
    assert pool.take([9, 9, 9]) is long


def test_a_cache_without_tokens_displaces_none() -> None:
    pool = CachePool(1, GROWTH)
    pool.keep(cache([1, 2, 3]))
    cancelled = cache([])
    cancelled.reserve(5000)
    pool.keep(cancelled)
    assert pool.tokens == 3


def test_a_cache_grows_no_further_than_its_context() -> None:
    small = cache([1, 2, 3], context=16)
    assert small.capacity == 16
    small.reserve(13)
    assert small.capacity == 16
    large = cache([1] * 9000)
    large.reserve(1)
    large.reserve(1000)
    assert large.capacity == 10_000
