"""Points from inner products, groups of points, names that stay, and points that fit nowhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtalora_flwr.aggregation.clustering import (
    cosines,
    embed,
    in_matched_group,
    keep_ids,
    kmeans,
    kmeans_by_silhouette,
    on_a_plane,
    strays,
)

DIM = 300


def around(truth, *, noise, rng, centres=None):
    """Points near one centre a cluster, noise being relative to the centre's length."""
    centres = rng.normal(size=(max(truth) + 1, DIM)) if centres is None else centres
    return centres[truth] + noise * rng.normal(size=(len(truth), DIM))


def same_groups(labels, truth) -> bool:
    return len(set(zip(labels, truth, strict=True))) == len(set(labels)) == len(set(truth))


@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), m=st.integers(1, 5))
def test_embedded_points_have_the_inner_products_they_were_made_from(seed, n, m):
    given_points = np.random.default_rng(seed).normal(size=(n, m))
    points = embed(given_points @ given_points.T)
    assert points.shape[1] <= min(n, m)
    np.testing.assert_allclose(points @ points.T, given_points @ given_points.T, atol=1e-8)


def test_points_that_are_all_zero_are_one_point_and_not_an_error():
    assert not embed(cosines(np.zeros((3, 3)))).any()
    assert kmeans(embed(np.zeros((3, 3))), num_clusters=2, seed=0).tolist() == [0, 0, 0]


@given(seed=st.integers(0, 2**31))
def test_cosines_do_not_see_lengths(seed):
    rng = np.random.default_rng(seed)
    points, lengths = rng.normal(size=(6, 4)), rng.uniform(1e-6, 1e6, size=6)
    stretched = points * lengths[:, None]
    np.testing.assert_allclose(cosines(stretched @ stretched.T), cosines(points @ points.T), atol=1e-9)


@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_kmeans_finds_well_separated_groups(seed, sizes):
    truth = [group for group, size in enumerate(sizes) for _ in range(size)]
    points = around(truth, noise=0.1, rng=np.random.default_rng(seed))
    labels = kmeans(points, num_clusters=len(sizes), seed=seed)
    assert labels.tolist() == truth  # numbered by first member


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(3, 6), min_size=2, max_size=5))
def test_silhouette_chooses_the_number_of_groups_that_are_there(seed, sizes):
    truth = [group for group, size in enumerate(sizes) for _ in range(size)]
    points = around(truth, noise=0.3, rng=np.random.default_rng(seed))
    assert same_groups(kmeans_by_silhouette(points, largest=8, seed=seed), truth)


def test_silhouette_finds_a_number_of_groups_that_it_does_not_look_at_first():
    truth = [group for group in range(43) for _ in range(2)]  # up to 64 it looks at 2, 4, ... first
    points = around(truth, noise=0.2, rng=np.random.default_rng(0))[:, :20]
    assert same_groups(kmeans_by_silhouette(points, largest=64, seed=0), truth)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20))
def test_silhouette_leaves_points_without_structure_together(seed, n):
    points = around([0] * n, noise=1.0, rng=np.random.default_rng(seed), centres=np.zeros((1, DIM)))
    assert not kmeans_by_silhouette(points / np.linalg.norm(points, axis=1)[:, None], largest=8, seed=seed).any()


def test_fewer_distinct_points_than_clusters_leave_no_empty_cluster():
    points = np.array([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
    assert kmeans(points, num_clusters=5, seed=0).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("n", "num_clusters"), [(0, 2), (3, 0)])
def test_no_point_and_no_cluster_are_refused(n, num_clusters):
    with pytest.raises(ValueError, match=f"cannot cut {n} points into {num_clusters} clusters"):
        kmeans(np.zeros((n, 2)), num_clusters=num_clusters, seed=0)


@given(st.permutations(range(4)), st.integers(0, 2**31))
def test_groups_that_are_numbered_afresh_keep_their_ids(order, seed):
    before = np.random.default_rng(seed).permutation([0, 0, 1, 1, 2, 2, 3, 3])
    labels = np.array([order[cluster] for cluster in before])
    ids = keep_ids(labels, before.tolist())
    assert [ids[label] for label in labels] == before.tolist()


@pytest.mark.parametrize(
    ("labels", "known", "wanted"),
    [
        ([0, 0, 1], [None, None, None], [0, 1]),
        ([0, 0, 0, 1], [7, 7, 2, 2], [7, 2]),
        ([0, 0, 0, 1, 1], [3, 3, 3, 3, 3], [3, 0]),  # a cluster that splits keeps its id on the larger side
        ([0, 0, 0], [4, 4, 1], [4]),  # and two that merge that of the larger
        ([0, 1, 1], [5, None, None], [5, 0]),  # strangers get an id of their own
        ([0, 0, 1, 1], [0, 1, 1, 1], [0, 1]),  # the matching is the best of all, not first come first served
    ],
)
def test_a_group_has_the_id_of_the_cluster_with_which_it_shares_most(labels, known, wanted):
    assert keep_ids(np.array(labels), known) == wanted


def test_a_point_counts_for_as_many_members_as_it_stands_for_and_the_id_of_one_that_counts_for_none_is_not_new():
    assert keep_ids(np.array([0, 0, 0, 1]), [4, 4, 1, 4], votes=[1, 1, 3, 1]) == [1, 4]
    assert keep_ids(np.array([0, 1, 1]), [0, 2, None], votes=[0, 1, 1]) == [1, 2]


@pytest.mark.parametrize("noise", [0.1, 1.5])
def test_a_point_like_nobody_is_a_stray_and_the_members_are_not(noise):
    rng = np.random.default_rng(0)
    centres = np.eye(2, DIM) * DIM**0.5
    truth = [0] * 6 + [1] * 6
    points = np.vstack([around(truth, noise=noise, rng=rng, centres=centres), -centres.sum(0)])
    flagged = strays(points, np.array([*truth, 0]), share=0.5)
    assert flagged.tolist() == [False] * 12 + [True]


def test_a_point_alone_in_its_group_is_no_stray_and_neither_is_anyone_without_structure():
    assert not strays(np.eye(4), np.array([0, 1, 2, 3]), share=0.9).any()
    assert not strays(np.eye(4), np.array([0, 0, 0, 0]), share=0.9).any()
    assert not strays(np.zeros((3, 1)), np.array([0, 0, 0]), share=0.9).any()


@pytest.mark.parametrize(
    ("found", "true", "wanted"),
    [
        ([5, 5, 2, 2], [0, 0, 1, 1], [True, True, True, True]),  # ids need not be those of the groups
        ([0, 0, 0, 1], [0, 0, 1, 1], [True, True, False, True]),
        ([0, 0, 0, 0], [0, 0, 1, 1], [True, True, False, False]),  # one cluster is one group's at most
        ([0, None, 1, 1], [0, 0, 1, 1], [True, False, True, True]),
        ([0, 1, 2, 3], [0, 0, 1, 1], [True, False, True, False]),
    ],
)
def test_points_are_right_whose_cluster_is_matched_with_their_group(found, true, wanted):
    assert sum(in_matched_group(found, true)) == sum(wanted)
    assert len(in_matched_group(found, true)) == len(true)


def test_neighbours_on_the_plane_are_of_one_group():
    rng = np.random.default_rng(3)
    truth = np.repeat(np.arange(3), 6)
    places = on_a_plane(around(truth, noise=0.3, rng=rng), seed=0)
    assert places.shape == (18, 2)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag(np.full(18, np.inf))
    assert (truth[distances.argmin(1)] == truth).all()


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_few_points_have_places_of_their_own_too(n):
    places = on_a_plane(np.random.default_rng(n).normal(size=(n, 5)), seed=0)
    assert places.shape == (n, 2) and np.isfinite(places).all() and len(np.unique(places, axis=0)) == n
