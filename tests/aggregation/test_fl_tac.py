"""FL-TAC on synthetic tasks: each is a low-rank change of the weights, and every slot sees it with noise of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_updates import draw, effective, relative_error, tensors_of

from fedtalora_flwr.aggregation import ClientUpdate, GlobalState, LoraFactors, resolve, slots_exactness_error
from fedtalora_flwr.aggregation.methods.fl_tac import FLTAC, ClusteredState, Slot
from fedtalora_flwr.aggregation.signature import changes_of_factors, moments_gram

SHAPES = {"attn.qkv": (24, 16), "mlp.fc2": (10, 30)}  # (d_out, d_in)
RANK, SCALING = 2, 2.0
EXACT, PLAIN = resolve("fedtalora"), resolve("fedit")


def start_state(generator) -> GlobalState:
    return GlobalState(
        {
            name: LoraFactors.initial(rank=RANK, d_in=d_in, d_out=d_out, scaling=SCALING, generator=generator)
            for name, (d_out, d_in) in SHAPES.items()
        },
        head={"weight": torch.zeros(3, 4), "bias": torch.zeros(3)},
    )


def make_task(generator):
    """The change of the weights that a task asks for, of rank 1 and length 1 in each layer."""
    task = {}
    for name, (d_out, d_in) in SHAPES.items():
        change = torch.outer(torch.randn(d_out, generator=generator), torch.randn(d_in, generator=generator))
        task[name] = change / change.norm()
    return task


def train(state: GlobalState, task, slot, *, generator, noise=0.5, num_examples=10, num_steps=5) -> ClientUpdate:
    """Steps of gradient descent on ``|R + s B A - task - noise|^2 / 2`` in every layer."""
    adapters = {}
    for name, pair in state.adapters.items():
        lora_A, lora_B = pair.lora_A.clone(), pair.lora_B.clone()
        wanted = task[name] + noise * torch.randn(task[name].shape, generator=generator) / task[name].numel() ** 0.5
        wanted = wanted - state.residual.get(name, torch.zeros(()))
        for _ in range(num_steps):
            error = SCALING * (lora_B @ lora_A) - wanted
            lora_B, lora_A = lora_B - 0.1 * error @ lora_A.T, lora_A - 0.1 * lora_B.T @ error
        adapters[name] = LoraFactors(lora_A, lora_B, SCALING)
    counts = torch.tensor([num_examples, 0, 0])
    return ClientUpdate(slot.partition_id, num_examples, adapters, state.head, counts, state.version)


def train_all(state: ClusteredState, tasks, slots, *, generator, **options):
    """One update of each slot (slot -> its task), every slot with another number of examples."""
    return {
        slot: train(
            state.of(slot), tasks[task], slot, generator=generator, num_examples=5 + 3 * slot.partition_id, **options
        )
        for slot, task in slots.items()
    }


def deal(num_clients, num_tasks, rng):
    """Give every client some of the tasks, in an order of its own, and every task two clients at least."""
    held = [set(rng.permutation(num_tasks)[: rng.integers(1, num_tasks + 1)].tolist()) for _ in range(num_clients)]
    for task in range(num_tasks):
        held[task % num_clients].add(task)
        held[(task + 1) % num_clients].add(task)
    return {
        Slot(client, number): task
        for client, tasks in enumerate(held)
        for number, task in enumerate(rng.permutation(sorted(tasks)).tolist())
    }


def same_groups(assigned, slots) -> bool:
    pairs = {(assigned.get(slot), task) for slot, task in slots.items()}
    return len(pairs) == len({cluster for cluster, _ in pairs}) == len({task for _, task in pairs})


def begin(seed, num_tasks):
    generator = draw(seed)
    return generator, ClusteredState(start_state(generator)), [make_task(generator) for _ in range(num_tasks)]


TWO_TASKS = {Slot(0, 0): 0, Slot(0, 1): 1, Slot(1, 0): 1, Slot(2, 0): 0, Slot(3, 0): 1, Slot(3, 1): 0}


def two_clusters(method=EXACT, **options):
    """Two tasks, six slots, one round done."""
    generator, state, tasks = begin(7, 3)
    fl_tac = FLTAC(method, num_clusters=2, **options)
    return generator, fl_tac, tasks, fl_tac.aggregate(state, train_all(state, tasks, TWO_TASKS, generator=generator))


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), num_tasks=st.integers(2, 4), num_clients=st.integers(3, 6), given_n=st.booleans())
def test_slots_find_those_of_their_task_and_keep_their_cluster_while_clients_come_and_go(
    seed, num_tasks, num_clients, given_n
):
    rng = np.random.default_rng(seed)
    generator, state, tasks = begin(seed, num_tasks)
    slots = deal(num_clients, num_tasks, rng)
    fl_tac = FLTAC(EXACT, num_clusters=num_tasks if given_n else 0)
    if not given_n:  # the silhouette of a round needs tasks that several clients are there for
        slots |= {Slot(num_clients + copy, task): task for copy in range(2) for task in range(num_tasks)}
    state = fl_tac.aggregate(state, train_all(state, tasks, slots, generator=generator))
    first = dict(state.assigned)
    assert same_groups(first, slots) and not state.own
    for _ in range(3):
        present = rng.choice(len(slots), size=rng.integers(1, len(slots) + 1), replace=False).tolist()
        some = dict(list(slots.items())[i] for i in present) if given_n else slots
        state = fl_tac.aggregate(state, train_all(state, tasks, some, generator=generator))
        assert state.assigned == first


def test_product_signature_finds_the_tasks_whatever_the_gauge_and_the_raw_one_does_not():
    generator, state, tasks = begin(1, 2)
    slots = {Slot(client, number): number for client in range(6) for number in range(2)}
    updates = train_all(state, tasks, slots, generator=generator, num_steps=20)
    for slot, update in updates.items():
        M = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator))[0] * 3
        pairs = {n: LoraFactors(M.inverse() @ f.lora_A, f.lora_B @ M, SCALING) for n, f in update.adapters.items()}
        updates[slot] = replace(update, adapters=pairs)
    by_product = FLTAC(EXACT, num_clusters=2, signature="product").aggregate(state, updates)
    by_raw = FLTAC(EXACT, num_clusters=2, signature="raw", stray_share=0).aggregate(state, updates)
    assert same_groups(by_product.assigned, slots)
    assert not same_groups(by_raw.assigned, slots)


def test_first_round_with_a_shared_lora_a_is_clustered_by_lora_b_too():
    _, _, _, state = two_clusters(signature="lora_B")
    assert same_groups(state.assigned, TWO_TASKS)


def test_number_of_tasks_is_found_by_the_silhouette():
    generator, state, tasks = begin(2, 3)
    slots = {Slot(client, number): number for client in range(5) for number in range(3)}
    state = FLTAC(EXACT).aggregate(state, train_all(state, tasks, slots, generator=generator))
    assert sorted(state.clusters) == [0, 1, 2] and same_groups(state.assigned, slots)


def test_cluster_is_what_the_method_makes_of_its_slots_alone():
    generator, fl_tac, tasks, state = two_clusters(PLAIN)
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    new = fl_tac.aggregate(state, updates)
    for task in (0, 1):
        slots = [slot for slot, one in TWO_TASKS.items() if one == task]
        wanted = PLAIN.aggregate(state.of(slots[0]), [updates[slot] for slot in sorted(slots)])
        got = new.clusters[new.assigned[slots[0]]]
        assert all(torch.equal(value, tensors_of(wanted)[key]) for key, value in tensors_of(got).items())
        assert got.version == new.version == 2


def test_cluster_no_slot_of_which_is_there_stays_as_it_was():
    generator, fl_tac, tasks, state = two_clusters()
    alone = Slot(1, 0)
    new = fl_tac.aggregate(state, train_all(state, tasks, {alone: 1}, generator=generator))
    assert new.assigned == state.assigned
    other = state.assigned[Slot(0, 0)]
    assert new.clusters[other] is state.clusters[other]
    assert new.of(alone).version == 2


def test_slot_never_seen_before_trains_from_the_start_and_joins_the_cluster_of_its_task():
    generator, fl_tac, tasks, state = two_clusters()
    newcomer = Slot(9, 0)
    assert state.of(newcomer) is state.start
    new = fl_tac.aggregate(state, train_all(state, tasks, {newcomer: 1, Slot(0, 0): 0}, generator=generator))
    assert new.assigned[newcomer] == state.assigned[Slot(0, 1)]
    assert new.of(newcomer) is new.of(Slot(1, 0))


def test_stray_goes_on_from_its_own_adapter_and_leaves_the_cluster_it_was_put_in_alone():
    generator, fl_tac, tasks, state = two_clusters()
    stray = Slot(5, 0)
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    lost = {stray: train(state.of(stray), tasks[2], stray, generator=generator)}
    new, without = fl_tac.aggregate(state, updates | lost), fl_tac.aggregate(state, updates)
    assert stray not in new.assigned and set(new.own) == {stray}
    for name, pair in lost[stray].adapters.items():
        assert torch.equal(new.of(stray).adapters[name].lora_B, pair.lora_B)
    for cluster, wanted in without.clusters.items():
        got = tensors_of(new.clusters[cluster])
        assert all(torch.equal(value, got[key]) for key, value in tensors_of(wanted).items())


def test_stray_that_turns_to_a_task_of_others_is_taken_in_and_its_own_state_is_dropped():
    generator, fl_tac, tasks, state = two_clusters()
    stray, slots = Slot(5, 0), TWO_TASKS
    lost = {stray: train(state.of(stray), tasks[2], stray, generator=generator)}
    state = fl_tac.aggregate(state, train_all(state, tasks, slots, generator=generator) | lost)
    turned = train_all(state, tasks, slots | {stray: 0}, generator=generator, num_steps=200)
    new = fl_tac.aggregate(state, turned)
    assert new.own == {} and new.assigned[stray] == new.assigned[Slot(0, 0)]


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_cluster_is_the_weighted_mean_of_its_slots_weights_also_of_one_that_comes_from_another_cluster(seed):
    generator, state, tasks = begin(seed, 2)
    fl_tac = FLTAC(EXACT, num_clusters=2, stray_share=0)
    for _ in range(2):
        state = fl_tac.aggregate(state, train_all(state, tasks, TWO_TASKS, generator=generator))
    assert any(value.any() for one in state.clusters.values() for value in one.residual.values())
    mover, pristine = Slot(0, 0), {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    updates = train_all(state, tasks, TWO_TASKS | {mover: 1}, generator=generator, num_steps=150)
    new = fl_tac.aggregate(state, updates)
    cluster = new.assigned[mover]
    assert cluster == state.assigned[Slot(0, 1)] != state.assigned[mover]
    for one in new.clusters:
        members = {slot: updates[slot] for slot, c in new.assigned.items() if c == one}
        total = sum(update.num_examples for update in members.values())
        wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for slot, update in members.items():
            for name, weight in effective(pristine, state.of(slot).residual, update.adapters).items():
                wanted[name] += update.num_examples / total * weight
        got = new.clusters[one]
        assert relative_error(effective(pristine, got.residual, got.adapters), wanted) < 1e-6
    assert not new.clusters[cluster].step  # nobody can walk from the old residual to the mixed one


def torn_task():
    """Two clusters asked for while only one of the two tasks is there: it is torn in two."""
    generator, state, tasks = begin(1, 2)
    fl_tac, slots = FLTAC(EXACT, num_clusters=2), {Slot(client, 0): 0 for client in range(8)}
    state = fl_tac.aggregate(state, train_all(state, tasks, slots, generator=generator))
    assert sorted(state.clusters) == [0, 1] == sorted(set(state.assigned.values()))
    return generator, fl_tac, tasks, state, slots


@pytest.mark.parametrize("num_present", [0, 2])
def test_task_that_was_torn_in_two_is_one_cluster_once_the_other_task_is_there(num_present):
    generator, fl_tac, tasks, state, slots = torn_task()
    larger = max((0, 1), key=list(state.assigned.values()).count)
    some = [next(slot for slot, c in state.assigned.items() if c == one) for one in (0, 1)][:num_present]
    newcomers = {Slot(client, 1): 1 for client in range(4)}
    present = dict.fromkeys(some, 0) | newcomers
    new = fl_tac.aggregate(state, train_all(state, tasks, present, generator=generator))
    assert same_groups(new.assigned, slots | newcomers) and len(new.clusters) == 2
    assert {new.assigned[slot] for slot in slots} == {larger}
    assert (new.clusters[larger] is state.clusters[larger]) == (not some)
    updates = train_all(new, tasks, slots | newcomers, generator=generator)  # those who were away go on from there
    again = fl_tac.aggregate(new, updates)
    assert again.assigned == new.assigned and slots_exactness_error(new, updates, again) < 1e-6


def test_cluster_that_joins_another_brings_the_residual_that_its_slots_trained_on():
    generator, fl_tac, tasks, state, slots = torn_task()
    assert any(not torch.equal(r, state.clusters[1].residual[k]) for k, r in state.clusters[0].residual.items())
    updates = train_all(state, tasks, slots | {Slot(client, 1): 1 for client in range(4)}, generator=generator)
    new = fl_tac.aggregate(state, updates)
    assert len(new.clusters) == 2 and slots_exactness_error(state, updates, new) < 1e-6


def test_absent_slots_of_a_cluster_whose_own_adapter_is_a_stray_stay_in_it():
    generator, state, tasks = begin(7, 3)
    fl_tac = FLTAC(EXACT, num_clusters=2)
    state = fl_tac.aggregate(state, train_all(state, tasks, TWO_TASKS, generator=generator))
    kept = state.assigned[Slot(0, 1)]
    others = {Slot(client, 2): 2 for client in range(6)} | {Slot(0, 0): 0, Slot(2, 0): 0, Slot(3, 1): 0}
    new = fl_tac.aggregate(state, train_all(state, tasks, others, generator=generator))
    assert all(new.assigned[slot] == kept for slot, task in TWO_TASKS.items() if task == 1)
    assert new.clusters[kept] is state.clusters[kept] and same_groups(new.assigned, TWO_TASKS | others)


def test_silhouette_of_a_round_with_one_slot_joins_no_clusters_of_others():
    generator, fl_tac, tasks, state = two_clusters()
    alone = {Slot(9, 0): 2}
    new = replace(fl_tac, num_clusters=0).aggregate(state, train_all(state, tasks, alone, generator=generator))
    assert {slot: new.assigned[slot] for slot in TWO_TASKS} == state.assigned


def test_number_of_many_tasks_is_found_by_the_silhouette_too():
    generator, state, tasks = begin(2, 25)
    slots = {Slot(client, number): number for client in range(3) for number in range(25)}
    updates = train_all(state, tasks, slots, generator=generator, noise=0.2, num_steps=20)
    state = FLTAC(EXACT).aggregate(state, updates)
    assert len(state.clusters) == 25 and same_groups(state.assigned, slots)


def test_cluster_to_which_no_slot_belongs_any_more_is_dropped():
    generator, fl_tac, tasks, state = two_clusters(stray_share=0)
    slots = dict.fromkeys(TWO_TASKS, 0)
    new = fl_tac.aggregate(state, train_all(state, tasks, slots, generator=generator, num_steps=300))
    left = state.assigned[Slot(0, 0)]
    assert len(state.clusters) == 2 and set(new.clusters) == {left} == set(new.assigned.values())


def test_fewer_slots_than_tasks_are_a_cluster_each():
    generator, state, tasks = begin(3, 2)
    updates = train_all(state, tasks, {Slot(4, 0): 0, Slot(1, 2): 1}, generator=generator)
    new = FLTAC(EXACT, num_clusters=5).aggregate(state, updates)
    assert new.assigned == {Slot(1, 2): 0, Slot(4, 0): 1}


@pytest.mark.parametrize("num_clusters", [0, 2])
def test_order_of_replies_does_not_change_a_bit_and_nothing_that_is_given_changes(num_clusters):
    generator, _, tasks, state = two_clusters()
    fl_tac = FLTAC(EXACT, num_clusters=num_clusters)
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    before = {c: {k: v.clone() for k, v in tensors_of(one).items()} for c, one in state.clusters.items()}
    wanted = fl_tac.aggregate(state, updates)
    for _ in range(3):
        slots = list(updates)
        order = torch.randperm(len(slots), generator=generator)
        got = fl_tac.aggregate(state, {slots[i]: updates[slots[i]] for i in order})
        assert got.assigned == wanted.assigned
        for cluster, one in wanted.clusters.items():
            assert all(torch.equal(v, tensors_of(got.clusters[cluster])[k]) for k, v in tensors_of(one).items())
    for cluster, tensors in before.items():
        assert all(torch.equal(v, tensors_of(state.clusters[cluster])[k]) for k, v in tensors.items())


def test_no_update_is_an_error_and_not_an_empty_state():
    with pytest.raises(ValueError, match="nothing to average: no slot sent an update"):
        FLTAC(EXACT).aggregate(ClusteredState(start_state(draw(0))), {})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"signature": "BA"}, "signature must be one of product, changes, moments, lora_B, raw, got 'BA'"),
        ({"num_clusters": -1}, "num_clusters must be at least 0, got -1"),
        ({"stray_share": 1.0}, r"stray_share must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        FLTAC(EXACT, **settings)


def test_truncated_residuals_are_refused_as_their_debt_would_stay_with_a_cluster_that_is_left():
    with pytest.raises(ValueError, match=r"residual-energy is 0\.5; with method fl-tac it must be 1"):
        resolve("fl-tac", {"residual_energy": 0.5})


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_slots_are_clustered_and_drawn_with_any_seed_that_a_run_may_have(seed):
    generator, state, tasks = begin(7, 3)
    fl_tac = FLTAC(EXACT, num_clusters=2, seed=seed)
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    new = fl_tac.aggregate(state, updates)
    assert same_groups(new.assigned, TWO_TASKS)
    assert fl_tac.picture(new, updates).keys() == TWO_TASKS.keys()


SHARED_RANK, HEAD = 3, {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}


def begin_shared(seed):
    generator = draw(seed)
    initial = start_state(generator)
    pairs = {
        name: LoraFactors.initial(rank=SHARED_RANK + RANK, d_in=d_in, d_out=d_out, scaling=SCALING, generator=generator)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return generator, ClusteredState.begin(replace(initial, adapters=pairs), shared_rank=SHARED_RANK)


def train_shared(state: ClusteredState, updates, *, generator, spread=0.3):
    """What each client made of the shared part: its own move of both factors, with the examples of all its slots."""
    moved = []
    for client in sorted({slot.partition_id for slot in updates}):
        mine = [update for slot, update in updates.items() if slot.partition_id == client]
        factors = {
            name: LoraFactors(
                pair.lora_A + spread * torch.randn(pair.lora_A.shape, generator=generator),
                pair.lora_B + spread * torch.randn(pair.lora_B.shape, generator=generator),
                pair.scaling,
            )
            for name, pair in state.shared.adapters.items()
        }
        counts = sum(update.class_counts for update in mine)
        moved.append(ClientUpdate(client, int(counts.sum()), factors, {}, counts, state.shared.version))
    return moved


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_shared_part_and_each_cluster_are_the_means_of_what_was_trained_for_any_slots_and_weights(seed):
    rng = np.random.default_rng(seed)
    generator, state = begin_shared(seed)
    tasks = [make_task(generator) for _ in range(2)]
    fl_tac = FLTAC(EXACT, num_clusters=2, shared_rank=SHARED_RANK)
    pristine = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for _ in range(3):
        some = [slot for slot in TWO_TASKS if rng.random() < 0.7] or [Slot(0, 0)]
        updates = {
            slot: train(state.of(slot), tasks[TWO_TASKS[slot]], slot, generator=generator, num_examples=weight)
            for slot, weight in zip(some, rng.integers(1, 40, len(some)).tolist(), strict=True)
        }
        shared = train_shared(state, updates, generator=generator)
        new = fl_tac.aggregate(state, updates, shared)
        assert slots_exactness_error(state, updates, new, shared) < 1e-6

        def mean(updates, bases):
            total, summed = sum(u.num_examples for u in updates), {n: v.double() for n, v in nothing.items()}
            for update, base in zip(updates, bases, strict=True):
                for name, weight in effective(nothing, base.residual, update.adapters).items():
                    summed[name] += update.num_examples / total * weight
            return summed

        common = mean(shared, [state.shared] * len(shared))
        for place in {new.place(slot) for slot in some}:
            members = [slot for slot in some if new.place(slot) == place]
            own = mean([updates[slot] for slot in members], [state.of(slot) for slot in members])
            wanted = {name: pristine[name].double() + common[name] + own[name] for name in SHAPES}
            got = new.whole(new.of(members[0]))
            assert relative_error(effective(pristine, got.residual, got.adapters), wanted) < 1e-6
        state = new


def test_exactness_error_sees_a_shared_part_that_lost_its_residual():
    generator, state = begin_shared(5)
    tasks = [make_task(generator) for _ in range(2)]
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    shared = train_shared(state, updates, generator=generator)
    new = FLTAC(EXACT, num_clusters=2, shared_rank=SHARED_RANK).aggregate(state, updates, shared)
    assert all(value.any() for value in new.shared.residual.values())
    broken = replace(new, shared=replace(new.shared, residual={}))
    assert slots_exactness_error(state, updates, new, shared) < 1e-6
    assert slots_exactness_error(state, updates, broken, shared) > 1e-2


def test_clusters_are_found_and_averaged_by_what_is_not_shared_alone():
    generator, state = begin_shared(6)
    tasks = [make_task(generator) for _ in range(2)]
    fl_tac = FLTAC(EXACT, num_clusters=2, shared_rank=SHARED_RANK)
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    news = [
        fl_tac.aggregate(state, updates, train_shared(state, updates, generator=generator, spread=spread))
        for spread in (0.0, 30.0)
    ]
    alone = FLTAC(EXACT, num_clusters=2).aggregate(replace(state, shared=None), updates)
    assert same_groups(alone.assigned, TWO_TASKS)
    for new in news:
        assert new.assigned == alone.assigned
        for cluster, wanted in alone.clusters.items():
            got = tensors_of(new.clusters[cluster])
            assert all(torch.equal(value, got[key]) for key, value in tensors_of(wanted).items())


def test_state_without_a_shared_part_is_all_that_its_slots_train_from():
    initial = start_state(draw(0))
    state = ClusteredState.begin(initial, shared_rank=0)
    assert state.start is initial and state.shared is None and state.whole(initial) is initial


def test_initial_pairs_are_cut_into_shared_and_own_rows_and_put_together_again():
    initial, generator = start_state(draw(8)), draw(9)
    pairs = {
        name: LoraFactors(
            torch.randn(5, d_in, generator=generator), torch.randn(d_out, 5, generator=generator), SCALING
        )
        for name, (d_out, d_in) in SHAPES.items()
    }
    state = ClusteredState.begin(replace(initial, adapters=pairs, version=2), shared_rank=SHARED_RANK)
    again = state.whole(state.start)
    for name, pair in pairs.items():
        assert torch.equal(state.shared.adapters[name].lora_A, pair.lora_A[:SHARED_RANK])
        assert torch.equal(state.start.adapters[name].lora_B, pair.lora_B[:, SHARED_RANK:])
        assert torch.equal(again.adapters[name].lora_A, pair.lora_A)
        assert torch.equal(again.adapters[name].lora_B, pair.lora_B)
    assert state.shared.version == again.version == 2 and state.shared.head is initial.head


def test_changes_are_summed_over_the_rounds_in_which_a_slot_was_there_and_leave_out_what_was_broadcast():
    generator, state, tasks = begin(9, 2)
    fl_tac, slots = FLTAC(EXACT, num_clusters=2, signature="changes"), sorted(TWO_TASKS)
    wanted = torch.zeros(len(slots), len(slots), dtype=torch.float64)
    for some in (TWO_TASKS, {slot: task for slot, task in TWO_TASKS.items() if slot.partition_id}, TWO_TASKS):
        updates = train_all(state, tasks, some, generator=generator)
        changes = torch.zeros(len(slots), sum(d_out * d_in for d_out, d_in in SHAPES.values()), dtype=torch.float64)
        for row, slot in enumerate(slots):
            if slot in updates:
                before, after = state.of(slot).adapters, updates[slot].adapters
                changes[row] = torch.cat([(after[n].delta() - before[n].delta()).flatten() for n in SHAPES])
        unit = changes / changes.norm(dim=1, keepdim=True).clamp(min=1e-12)
        wanted += unit @ unit.T
        state = fl_tac.aggregate(state, updates)
        assert torch.allclose(state.changes, wanted, atol=1e-5)
    assert same_groups(state.assigned, TWO_TASKS)


def test_moments_are_those_of_each_rounds_changes():
    generator, state, tasks = begin(9, 2)
    fl_tac, slots = FLTAC(EXACT, num_clusters=2, signature="moments"), sorted(TWO_TASKS)
    wanted = torch.zeros(len(slots), len(slots), dtype=torch.float64)
    for _ in range(2):
        updates = train_all(state, tasks, TWO_TASKS, generator=generator)
        wanted += moments_gram([changes_of_factors(state.of(s).adapters, updates[s].adapters) for s in slots])
        state = fl_tac.aggregate(state, updates)
        assert torch.allclose(state.changes, wanted)
    assert fl_tac.picture(state, {slot: updates[slot] for slot in slots[:3]}).keys() == set(slots[:3])


@pytest.mark.parametrize(("signature", "finds"), [("changes", True), ("product", False)])
def test_slot_that_began_in_a_wrong_cluster_is_found_by_its_changes_and_not_by_what_it_was_sent(signature, finds):
    generator, state, tasks = begin(7, 2)
    fl_tac = FLTAC(EXACT, num_clusters=2, signature=signature, stray_share=0)
    mover, slots = Slot(4, 0), TWO_TASKS | {Slot(5, 0): 0, Slot(5, 1): 1}
    first = train_all(state, tasks, slots | {mover: 0}, generator=generator, num_steps=20)
    state = fl_tac.aggregate(state, first)
    assert state.assigned[mover] == state.assigned[Slot(0, 0)]
    for _ in range(3):  # on its own task from now on, of which a round shows little
        updates = train_all(state, tasks, slots | {mover: 1}, generator=generator, num_steps=2)
        state = fl_tac.aggregate(state, updates)
    assert (state.assigned[mover] == state.assigned[Slot(0, 1)]) == finds


def test_slot_never_seen_before_is_found_by_its_changes_once_it_is_there_with_slots_of_its_task():
    generator, fl_tac, tasks, state = two_clusters(signature="changes")
    newcomer = Slot(9, 0)
    new = fl_tac.aggregate(state, train_all(state, tasks, TWO_TASKS | {newcomer: 1}, generator=generator))
    assert new.assigned == state.assigned | {newcomer: state.assigned[Slot(0, 1)]}


def test_class_rows_of_a_shared_part_are_averaged_over_all_slots_that_hold_the_class_whatever_their_cluster():
    generator, state = begin_shared(4)
    tasks = [make_task(generator) for _ in range(2)]
    updates = train_all(state, tasks, TWO_TASKS, generator=generator)
    values = {Slot(0, 0): (0, 1.0, 6), Slot(3, 0): (0, 5.0, 2), Slot(0, 1): (1, 7.0, 4)}  # class, its rows, examples
    for slot, (held, value, num_examples) in values.items():
        rows = {name: torch.zeros_like(rows).index_fill_(0, torch.tensor(held), value) for name, rows in HEAD.items()}
        counts = torch.zeros(3, dtype=torch.int64).index_fill_(0, torch.tensor(held), num_examples)
        updates[slot] = replace(updates[slot], head=rows, class_counts=counts, num_examples=num_examples)
    updates = {slot: updates[slot] for slot in values}
    shared = train_shared(state, updates, generator=generator)
    new = FLTAC(EXACT, num_clusters=2, shared_rank=SHARED_RANK).aggregate(state, updates, shared)
    assert new.assigned[Slot(0, 0)] != new.assigned[Slot(3, 0)]  # of different tasks, and yet
    assert new.shared.head["bias"].tolist() == [2.0, 7.0, 0.0]
    assert torch.equal(new.sent_to(Slot(3, 0)).head["weight"], new.shared.head["weight"])
    bias = {slot: new.whole(new.of(slot)).head["bias"].tolist() for slot in values}
    assert bias[Slot(3, 0)] == (bias[Slot(0, 1)] if new.of(Slot(3, 0)) is new.of(Slot(0, 1)) else [2.0, 0.0, 0.0])
    assert bias[Slot(0, 0)] == [2.0, 0.0, 0.0]
