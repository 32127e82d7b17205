import torch
from hypothesis import given
from hypothesis import strategies as st
from made_updates import NUM_CLASSES, draw, make_state, make_update

from fedtalora_flwr.aggregation import resolve


def test_class_row_is_averaged_over_the_clients_that_hold_the_class():
    state = make_state(draw(0))
    counts = [[3, 0, 5, 0], [1, 2, 0, 0]]
    updates = [make_update(state, p, generator=draw(p), class_counts=c) for p, c in enumerate(counts)]
    head = resolve("fedtalora").aggregate(state, updates).head
    first, second = updates[0].head, updates[1].head
    for name in ("weight", "bias"):
        torch.testing.assert_close(head[name][0], 0.75 * first[name][0] + 0.25 * second[name][0])
        torch.testing.assert_close(head[name][1], second[name][1])
        torch.testing.assert_close(head[name][2], first[name][2])


@given(seed=st.integers(0, 2**31), untrained=st.sets(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=3))
def test_rows_that_nobody_trained_stay_equal_to_the_bit(seed, untrained):
    generator = draw(seed)
    state = make_state(generator)
    counts = [0 if c in untrained else 2 + c for c in range(NUM_CLASSES)]
    updates = [make_update(state, p, generator=generator, class_counts=counts) for p in range(3)]
    head = resolve("fedtalora").aggregate(state, updates).head
    for name, broadcast in state.head.items():
        assert head[name].dtype == broadcast.dtype
        for c in range(NUM_CLASSES):
            assert torch.equal(head[name][c], broadcast[c]) == (c in untrained)
