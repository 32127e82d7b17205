"""Each way in which an update can be bad is refused by name."""

from dataclasses import replace

import pytest
import torch
from made_updates import FEATURE_DIM, NUM_CLASSES, draw, make_state, make_update

from fedtalora_flwr.aggregation import BadUpdate, ClientUpdate, GlobalState, LoraFactors, check_update, outliers
from fedtalora_flwr.aggregation.intake import update_norm

LAYER = "blocks.0.attn.qkv"  # (7, 5)


@pytest.fixture
def state() -> GlobalState:
    return make_state(draw(0), version=3)


@pytest.fixture
def update(state) -> ClientUpdate:
    return make_update(state, 1, generator=draw(1), class_counts=[4, 0, 2, 1])


def with_pair(update: ClientUpdate, **changes) -> ClientUpdate:
    return replace(update, adapters={**update.adapters, LAYER: replace(update.adapters[LAYER], **changes)})


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1)[-1] = value
    return copy


def test_good_update_passes(state, update):
    check_update(state, update)


def test_update_of_a_lower_rank_passes_where_its_pair_fits(state, update):
    check_update(state, with_pair(update, lora_A=torch.ones(1, 5), lora_B=torch.ones(7, 1)))


@pytest.mark.parametrize("version", [2, 4])
def test_another_base_version_is_refused(state, update, version):
    with pytest.raises(BadUpdate, match=f"trained on version {version}, the server is at 3"):
        check_update(state, replace(update, base_version=version))


def test_missing_module_is_refused(state, update):
    with pytest.raises(BadUpdate, match=r"adapters: missing \['blocks.0.attn.qkv'\], unknown \[\]"):
        check_update(state, replace(update, adapters={k: v for k, v in update.adapters.items() if k != LAYER}))


def test_unknown_module_is_refused(state, update):
    extra = {**update.adapters, "blocks.9.fc": update.adapters[LAYER]}
    with pytest.raises(BadUpdate, match=r"adapters: missing \[\], unknown \['blocks.9.fc'\]"):
        check_update(state, replace(update, adapters=extra))


def test_missing_and_unknown_head_parameters_are_refused(state, update):
    renamed = {"weight": update.head["weight"], "offset": update.head["bias"]}
    with pytest.raises(BadUpdate, match=r"head: missing \['bias'\], unknown \['offset'\]"):
        check_update(state, replace(update, head=renamed))


@pytest.mark.parametrize(
    ("lora_A", "lora_B"),
    [
        pytest.param((2, 6), (7, 2), id="d_in"),
        pytest.param((2, 5), (8, 2), id="d_out"),
        pytest.param((3, 5), (7, 2), id="rank of A is not rank of B"),
        pytest.param((5, 2), (2, 7), id="transposed"),
        pytest.param((0, 5), (7, 0), id="rank 0"),
        pytest.param((10,), (14,), id="flat"),
        pytest.param((1, 2, 5), (1, 7, 2), id="stacked"),
    ],
)
def test_pair_that_does_not_fit_the_layer_is_refused(state, update, lora_A, lora_B):
    with pytest.raises(BadUpdate, match=r"blocks.0.attn.qkv: lora_A .* do not fit \(7, rank\) @ \(rank, 5\)"):
        check_update(state, with_pair(update, lora_A=torch.ones(lora_A), lora_B=torch.ones(lora_B)))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_number_in_a_pair_that_is_not_finite_is_refused(state, update, factor, value):
    bad = poisoned(getattr(update.adapters[LAYER], factor), value)
    with pytest.raises(BadUpdate, match=f"{LAYER}.{factor} holds a number that is not finite"):
        check_update(state, with_pair(update, **{factor: bad}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_in_the_head_that_is_not_finite_is_refused_even_in_an_untrained_row(state, update, value):
    bad = update.head["weight"].clone()
    bad[1, 0] = value  # class 1 has no example here, and 0 * NaN is NaN
    with pytest.raises(BadUpdate, match="head weight holds a number that is not finite"):
        check_update(state, replace(update, head={**update.head, "weight": bad}))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float64, torch.complex64])
def test_tensor_that_is_not_float32_is_refused_with_its_type(state, update, dtype):
    with pytest.raises(BadUpdate, match=rf"lora_B holds {dtype}, expected torch.float32"):
        check_update(state, with_pair(update, lora_B=torch.ones(7, 2).to(dtype)))
    with pytest.raises(BadUpdate, match=rf"head bias holds {dtype}, expected torch.float32"):
        check_update(state, replace(update, head={**update.head, "bias": torch.ones(NUM_CLASSES).to(dtype)}))


def test_pair_whose_product_overflows_is_refused(state, update):
    huge = {"lora_A": torch.full((2, 5), 1e25), "lora_B": torch.full((7, 2), 1e25)}
    with pytest.raises(BadUpdate, match=f"{LAYER}: lora_B @ lora_A is too large"):
        check_update(state, with_pair(update, **huge))


def test_rank_above_that_of_the_run_is_refused_before_it_costs_the_server_and_the_others(state, update):
    with pytest.raises(BadUpdate, match=f"{LAYER}: rank 3 is more than the run's 2"):
        check_update(state, with_pair(update, lora_A=torch.ones(3, 5), lora_B=torch.ones(7, 3)))


def round_of(state, num, **changes):
    return [make_update(state, k, generator=draw(k), spread=0.1, **changes) for k in range(num)]


def found_of(state, updates, **limits):
    return outliers({update.partition_id: (state, update) for update in updates}, **limits)


def in_gauge(update, factor):
    """The same products of other factors."""
    pairs = {
        name: replace(p, lora_A=factor * p.lora_A, lora_B=p.lora_B / factor) for name, p in update.adapters.items()
    }
    return replace(update, adapters=pairs)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda update: in_gauge(update, 1e3), "lora_A"),
        (lambda update: in_gauge(update, 1e-3), "lora_B"),
        (lambda update: replace(update, head={k: v + 100 for k, v in update.head.items()}), "a class row"),
        (
            lambda update: replace(
                update,
                adapters={n: replace(p, lora_B=-100 * p.lora_B) for n, p in update.adapters.items()},
            ),
            "the weights",
        ),
    ],
    ids=["gauge of A", "gauge of B", "rows", "flipped"],
)
def test_one_that_changes_something_far_more_than_the_others_is_found(state, spoil, what):
    updates = round_of(state, 5)
    updates[3] = spoil(updates[3])
    found = found_of(state, updates, limit=10.0)
    assert found.keys() == {3} and f"changes {what} by " in found[3] and "outlier-limit is 10" in found[3]
    assert not found_of(state, updates, limit=0.0)


def test_honest_clients_are_no_outliers_however_few(state):
    updates = round_of(state, 5)
    assert not any(found_of(state, updates[:number], limit=10.0) for number in (1, 2, 5))


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e-3, 1e-6])
def test_another_gauge_is_found_among_two_clients_too(state, factor):
    updates = round_of(state, 2)
    found = found_of(state, [updates[0], in_gauge(updates[1], factor)], limit=10.0)
    assert found.keys() == {1} and "times the norm of both factors" in found[1]
    assert not found_of(state, [updates[0], in_gauge(updates[1], factor)], limit=0.0)


def test_one_that_takes_more_steps_may_go_as_much_further(state):
    updates = round_of(state, 4)
    far = make_update(state, 4, generator=draw(9), spread=3.0)
    assert found_of(state, [*updates, far], limit=10.0).keys() == {4}
    large = replace(far, num_examples=300 * far.num_examples, class_counts=300 * far.class_counts)
    assert not found_of(state, [*updates, large], limit=10.0)
    assert found_of(state, [*updates, large], limit=10.0, max_weight=2.0).keys() == {4}  # it counts as twice as many


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_another_gauge_is_found_in_the_first_round_too_where_lora_A_does_not_move(state, factor):
    updates = round_of(state, 5, trainable=frozenset({"lora_B"}))
    found = found_of(state, [*updates[:4], in_gauge(updates[4], factor)], limit=10.0)
    assert found.keys() == {4} and "changes lora_A by " in found[4]


def test_factors_that_nobody_changes_make_no_outlier(state):
    frozen = {"trainable": frozenset({"lora_B"})}
    assert not found_of(state, round_of(state, 5, **frozen), limit=10.0)


def test_norm_of_an_update_is_that_of_the_change_of_the_effective_weights_and_the_rows(state, update):
    squares = [
        (update.adapters[name].delta() - pair.delta()).square().sum() for name, pair in state.adapters.items()
    ] + [(update.head[name] - value).square().sum() for name, value in state.head.items()]
    norm = float(sum(squares)) ** 0.5
    assert update_norm(state, update) == pytest.approx(norm, rel=1e-5)
    check_update(state, update, norm_limit=1.01 * norm)
    with pytest.raises(BadUpdate, match=r"changes the weights by a norm of .*, norm-limit is"):
        check_update(state, update, norm_limit=0.99 * norm)


def test_update_that_says_the_same_in_other_factors_changes_nothing(state):
    mixed = {name: replace(p, lora_A=2 * p.lora_A, lora_B=p.lora_B / 2) for name, p in state.adapters.items()}
    same = replace(make_update(state, 1, generator=draw(1)), adapters=mixed, head=state.head)
    assert update_norm(state, same) < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_pairs_that_most_clients_left_as_they_were_make_nobody_an_outlier(seed):
    """Class rows begin at zero, so a client with one step moves no pair: zero, and not what rounding leaves of it."""
    state = make_state(draw(seed), rank=3)
    moved, *others = round_of(state, 5)
    still = [replace(update, adapters=state.adapters, head=moved.head) for update in others]
    assert update_norm(state, replace(still[0], head=state.head)) == 0
    assert not found_of(state, [moved, *still], limit=10.0)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_scaling_that_is_no_positive_number_is_refused(state, update, scaling):
    with pytest.raises(BadUpdate, match=r"scaling .* is not a positive number"):
        check_update(state, with_pair(update, scaling=scaling))


@pytest.mark.parametrize("shape", [(NUM_CLASSES + 1, FEATURE_DIM), (NUM_CLASSES, 1), (NUM_CLASSES,)])
def test_head_of_another_shape_is_refused(state, update, shape):
    with pytest.raises(BadUpdate, match="head weight has shape"):
        check_update(state, replace(update, head={**update.head, "weight": torch.ones(shape)}))


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(torch.tensor([8, -1, 0, 0]), id="negative"),
        pytest.param(torch.tensor([4, 0, 2, 2]), id="one too many"),
    ],
)
def test_class_counts_that_do_not_add_up_are_refused(state, update, counts):
    with pytest.raises(BadUpdate, match="class counts do not add up to num_examples 7"):
        check_update(state, replace(update, class_counts=counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_class_counts_that_are_no_whole_numbers_are_refused(state, update, dtype):
    with pytest.raises(BadUpdate, match=f"class counts hold {dtype}, expected torch.int64"):
        check_update(state, replace(update, class_counts=update.class_counts.to(dtype)))


@pytest.mark.parametrize("counts", [torch.ones(5).long(), torch.ones(1, 4).long(), torch.zeros(0).long()])
def test_class_counts_of_another_shape_are_refused(state, update, counts):
    with pytest.raises(BadUpdate, match=r"class counts have shape .*, expected \(4,\)"):
        check_update(state, replace(update, class_counts=counts))


@pytest.mark.parametrize("num_examples", [0, -7])
def test_update_without_examples_is_refused(state, update, num_examples):
    counts = torch.zeros(NUM_CLASSES, dtype=torch.int64)
    with pytest.raises(BadUpdate, match=f"num_examples is {num_examples}"):
        check_update(state, replace(update, num_examples=num_examples, class_counts=counts))


def test_update_without_examples_is_refused_where_the_state_has_no_head():
    pair = LoraFactors(torch.ones(2, 5), torch.ones(7, 2), 1.0)
    update = ClientUpdate(0, 0, {LAYER: pair}, {}, torch.zeros(0, dtype=torch.int64), 0)
    with pytest.raises(BadUpdate, match="num_examples is 0"):
        check_update(GlobalState({LAYER: pair}), update)
