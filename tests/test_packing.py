from ampo_fast.packing import token_runs


def test_runs_hold_whole_items_in_order():
    assert token_runs([3, 3, 3, 9, 1], 6) == [[0, 1], [2], [3], [4]]
    assert token_runs([], 6) == []
