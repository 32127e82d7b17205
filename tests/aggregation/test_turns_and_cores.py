"""Rivals that need more than an average: turns, a new basis, a core between fixed factors, Gram matrices."""

from dataclasses import replace

import pytest
import torch
from made_updates import (
    LAYERS,
    build,
    draw,
    effective,
    make_state,
    make_updates,
    mean_of_clients,
    pristine_weights,
    relative_error,
)

from fedtalora_flwr.aggregation import BadUpdate, GlobalState, LoraFactors, check_update, outliers, resolve
from fedtalora_flwr.aggregation.core import on_layer, outer_keys
from fedtalora_flwr.server.one_adapter import update_of_server

A, B = frozenset({"lora_A"}), frozenset({"lora_B"})


def one_round(method, state, generator, partitions=range(5)):
    trained = method.trains(state.version)
    return method.aggregate(state, make_updates(state, partitions, generator=generator, trainable=trained))


def assert_orthonormal(rows):
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-6)


def projection(rows):
    """The projection onto what rows span, (d, d) float64."""
    q, _ = torch.linalg.qr(rows.double().T)
    return q @ q.T


@pytest.mark.parametrize("name", ["fedtalora", "fedit", "fedex", "flora", "fedadam", "ffa-lora", "full"])
def test_a_method_that_knows_no_turns_trains_and_sends_the_same_factors_from_every_version(name):
    method = build(name)
    assert {method.trains(version) for version in range(3)} == {method.trainable} == {method.changing}
    state = make_state(draw(0))
    assert method.start(state, {}) is state


def test_rolora_trains_lora_b_first_and_then_each_factor_in_its_turn():
    method, generator = build("rolora"), draw(0)
    assert [method.trains(version) for version in range(4)] == [B, A, B, A]
    assert method.changing == A | B
    state = make_state(generator)
    for moved, rests in [("lora_B", "lora_A"), ("lora_A", "lora_B")]:
        new = one_round(method, state, generator)
        for name, pair in state.adapters.items():
            assert torch.equal(getattr(new.adapters[name], rests), getattr(pair, rests))
            assert not torch.equal(getattr(new.adapters[name], moved), getattr(pair, moved))
        assert new.residual == {}
        state = new


def test_fedsvd_begins_with_orthonormal_rows_that_span_what_loras_start_does():
    drawn = GlobalState({"fc": LoraFactors(torch.randn(3, 9, generator=draw(0)), torch.zeros(6, 3), 2.0)})
    pair = build("fedsvd").start(drawn, {}).adapters["fc"]
    assert_orthonormal(pair.lora_A)
    torch.testing.assert_close(projection(pair.lora_A), projection(drawn.adapters["fc"].lora_A))
    assert torch.count_nonzero(pair.lora_B) == 0


def test_fedsvd_gives_lora_a_orthonormal_rows_and_lora_b_orthogonal_columns_the_strongest_first():
    method, generator = build("fedsvd"), draw(1)
    state = one_round(method, make_state(generator, rank=3), generator)
    for pair in state.adapters.values():
        assert_orthonormal(pair.lora_A)
        squares = pair.lora_B.T @ pair.lora_B
        norms = squares.diagonal()
        torch.testing.assert_close(squares, torch.diag(norms), rtol=0, atol=1e-5 * float(norms.max()))
        assert (norms.diff() <= 0).all() and norms.min() > 0


def test_fedsvd_never_leaves_the_rows_that_the_first_lora_a_spans():
    method, generator = build("fedsvd"), draw(2)
    state = first = method.start(make_state(generator), {})
    for _ in range(4):
        state = one_round(method, state, generator)
    for name, pair in first.adapters.items():
        assert not torch.allclose(state.adapters[name].lora_A.abs(), pair.lora_A.abs(), atol=1e-3)
        torch.testing.assert_close(projection(state.adapters[name].lora_A), projection(pair.lora_A), rtol=0, atol=1e-5)


def test_fedsvd_keeps_all_directions_where_the_clients_use_fewer():
    pair = LoraFactors(torch.randn(3, 9, generator=draw(3)), torch.zeros(6, 3), 2.0)
    pair.lora_B[:, 1] = 1.0  # a product of rank 1
    new = build("fedsvd").start(GlobalState({"fc": pair}), {}).adapters["fc"]
    assert_orthonormal(new.lora_A)
    torch.testing.assert_close(new.delta(), pair.delta(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projection(new.lora_A), projection(pair.lora_A))


def started(core_start, *, rank=2, seed=0):
    """A run of fed-sb at its start, and the W_0 of its layers."""
    weights = pristine_weights(draw(7))
    square = {name: LoraFactors(torch.eye(rank), torch.zeros(rank, rank), 4.0) for name in LAYERS}
    method = resolve("fed-sb", {"core_start": core_start, "seed": seed})
    return method, method.start(GlobalState(square, head={"bias": torch.zeros(4)}), weights), weights


@pytest.mark.parametrize("core_start", ["random", "weights"])
def test_fed_sb_averages_the_layers_weights_exactly_and_leaves_its_base_alone(core_start):
    method, state, weights = started(core_start)
    generator, base = draw(4), state.residual

    def of_layers(one):
        return type(one)(**{**vars(one), "adapters": {n: on_layer(n, p, base) for n, p in one.adapters.items()}})

    for _ in range(3):
        updates = make_updates(state, [4, 0, 2], generator=generator, trainable=method.trains(state.version))
        plain = GlobalState(state.adapters)  # without the base, which is no residual of the layers
        wanted = mean_of_clients(weights, plain, [of_layers(update) for update in updates])
        state = method.aggregate(state, updates)
        assert relative_error(effective(weights, {}, of_layers(state).adapters), wanted) < 1e-6
        assert state.residual is base
    for name, (d_out, d_in) in LAYERS.items():
        pair = state.adapters[name]
        assert pair.lora_B.shape == (2, 2) and torch.equal(pair.lora_A, torch.eye(2))
        assert on_layer(name, pair, base).delta().shape == (d_out, d_in)
        torch.testing.assert_close(on_layer(name, pair, base).delta().norm(), pair.delta().norm())


def test_fed_sbs_random_factors_are_orthonormal_and_those_of_the_seed():
    (_, first, _), (_, again, _), (_, other, _) = (started("random", seed=seed) for seed in (5, 5, 6))
    assert first.residual.keys() == {key for name in LAYERS for key in outer_keys(name)}
    for name, (d_out, d_in) in LAYERS.items():
        outer_A, outer_B = (first.residual[key] for key in outer_keys(name))
        assert (outer_A.shape, outer_B.shape) == ((2, d_in), (d_out, 2))
        assert_orthonormal(outer_A)
        assert_orthonormal(outer_B.T)
    for key, value in first.residual.items():
        assert torch.equal(value, again.residual[key]) and not torch.allclose(value, other.residual[key])


def test_fed_sbs_factors_of_the_weights_hold_their_strongest_directions():
    _, state, weights = started("weights")
    for name, weight in weights.items():
        outer_A, outer_B = (state.residual[key].double() for key in outer_keys(name))
        kept = outer_B.T @ weight.double() @ outer_A.T
        torch.testing.assert_close(kept, torch.diag(torch.linalg.svdvals(weight.double())[:2]), rtol=0, atol=1e-5)


def test_fed_sb_says_what_its_start_can_be():
    with pytest.raises(ValueError, match="core-start must be one of random, weights, got 'gradient'"):
        resolve("fed-sb", {"core_start": "gradient"})


NUM_ROWS = (30, 14, 21)  # inputs of each client's layers


def with_inputs(state, *, trained, seed=5, rows=NUM_ROWS, span=None):
    """Updates of clients that have inputs, and these by client and module: (n, m), of unequal scale by direction."""
    generator, inputs = draw(seed), []
    updates = make_updates(state, range(len(rows)), generator=generator, trainable=trained)
    for update, num in zip(updates, rows, strict=True):
        one = {}
        for name, pair in state.adapters.items():
            scale = torch.linspace(0.5, 2.0, pair.lora_A.shape[1]) * (update.partition_id + 1)
            x = torch.randn(num, pair.lora_A.shape[1], generator=generator) * scale
            if span is not None:
                x[:, span:] = 0
            one[name] = x @ pair.lora_A.T if trained == B else x
        inputs.append(one)
    grams = [{name: x.T @ x / len(x) for name, x in one.items()} for one in inputs]
    return [replace(update, grams=gram) for update, gram in zip(updates, grams, strict=True)], inputs


@pytest.mark.parametrize(("version", "factor"), [(0, "lora_B"), (1, "lora_A")])
def test_lorm_answers_the_clients_inputs_as_they_do_in_the_least_squares_sense(version, factor):
    method, state = build("lorm"), make_state(draw(4), version=version)
    updates, inputs = with_inputs(state, trained=method.trains(version))
    new = method.aggregate(state, updates[::-1])
    plain = build("rolora").aggregate(state, updates)
    for name in LAYERS:
        asked, answers = [], []
        for update, of_client in zip(updates, inputs, strict=True):
            x, root = of_client[name].double(), (update.num_examples / len(of_client[name])) ** 0.5
            asked.append(root * x)
            answers.append(root * x @ getattr(update.adapters[name], factor).double().T)
        wanted = torch.linalg.lstsq(torch.cat(asked), torch.cat(answers)).solution.T
        torch.testing.assert_close(getattr(new.adapters[name], factor).double(), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(getattr(plain.adapters[name], factor).double(), wanted, atol=0.05)
        rests = "lora_A" if factor == "lora_B" else "lora_B"
        assert torch.equal(getattr(new.adapters[name], rests), getattr(state.adapters[name], rests))
    assert torch.equal(new.head["weight"], plain.head["weight"]) and new.version == version + 1


def test_lorm_is_the_plain_mean_where_all_have_the_same_gram_or_none():
    method, state = build("lorm"), make_state(draw(5), version=1)
    updates, _ = with_inputs(state, trained=A)
    same = [replace(update, grams=updates[0].grams) for update in updates]
    none = [replace(update, grams={}) for update in updates]
    plain = build("rolora").aggregate(state, updates)
    for given in (same, none):
        for name, pair in method.aggregate(state, given).adapters.items():
            torch.testing.assert_close(pair.lora_A, plain.adapters[name].lora_A, rtol=1e-4, atol=1e-4)


def test_lorm_leaves_alone_what_no_clients_inputs_touch():
    method, state = build("lorm"), make_state(draw(6), version=1)
    updates, _ = with_inputs(state, trained=A, span=3)
    for name, pair in method.aggregate(state, updates).adapters.items():
        torch.testing.assert_close(pair.lora_A[:, 3:], state.adapters[name].lora_A[:, 3:])
        assert not torch.allclose(pair.lora_A[:, :3], state.adapters[name].lora_A[:, :3], atol=0.05)


def test_lorm_moves_a_task_by_its_share_where_the_servers_own_model_takes_part():
    method, state = build("lorm"), make_state(draw(7), version=1)
    updates, _ = with_inputs(state, trained=A)
    server = update_of_server(state, updates, num_tasks=3)
    all_the_way, a_quarter = (method.aggregate(state, given) for given in (updates, [*updates, server]))
    for name, pair in state.adapters.items():
        wanted = 0.75 * pair.lora_A + 0.25 * all_the_way.adapters[name].lora_A
        torch.testing.assert_close(a_quarter.adapters[name].lora_A, wanted, rtol=1e-4, atol=1e-4)


def test_a_gram_that_no_inputs_have_is_refused_and_so_is_one_that_would_count_for_all_others():
    state = make_state(draw(8), version=1)
    updates, _ = with_inputs(state, trained=A, rows=(30, 30, 30, 30))
    name = next(iter(LAYERS))
    for update in updates:
        check_update(state, update, trainable=A)
    contradicts = updates[0].grams[name].clone()
    contradicts[0, 1] = contradicts[1, 0] = 1.1 * float(contradicts[0, 0] * contradicts[1, 1]) ** 0.5
    negative = updates[0].grams[name].clone()
    negative[0, 0] = -1.0
    for gram in (contradicts, negative):
        bad = replace(updates[0], grams={**updates[0].grams, name: gram})
        with pytest.raises(BadUpdate, match="no inputs have such products"):
            check_update(state, bad, trainable=A)
    with pytest.raises(BadUpdate, match="not finite"):
        check_update(state, replace(updates[0], grams={**updates[0].grams, name: contradicts / 0}), trainable=A)
    loud = replace(updates[0], grams={key: 1e6 * gram for key, gram in updates[0].grams.items()})
    given = {update.partition_id: (state, update) for update in [loud, *updates[1:]]}
    found = outliers(given, limit=10.0)
    assert found.keys() == {0} and "changes the layers' inputs" in found[0]
