from ampo_fast.random_streams import stream_seed


def test_stream_seeds_differ_in_every_part_and_fit_63_bits():
    parts = [(0, 1, "a", 2), (1, 1, "a", 2), (0, 2, "a", 2), (0, 1, "b", 2), (0, 1, "a", 3), (0, 11, "a", 2)]
    seeds = {stream_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)


def test_a_seed_stays_what_it_was():
    assert (
        stream_seed(0, 1, "a", 2) == 1_231_020_804_855_295_621
    )  # or a resumed run would draw other samples than the one before
