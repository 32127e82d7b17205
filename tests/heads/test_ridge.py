import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from fedtalora_flwr.model import heads
from fedtalora_flwr.model.heads import FeatureSums, init_rows
from fedtalora_flwr.model.heads.ridge import chosen_lambda

NUM_CLASSES, FEATURE_DIM = 4, 6


def pooled(seed: int, num_examples: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = 1.0 + torch.randn(num_examples, FEATURE_DIM, generator=generator)
    return features, torch.randint(0, NUM_CLASSES, (num_examples,), generator=generator)


def sums_over(features: torch.Tensor, labels: torch.Tensor, holders: torch.Tensor) -> FeatureSums:
    total = FeatureSums.zero(num_classes=NUM_CLASSES, feature_dim=FEATURE_DIM)
    for holder in holders.unique():
        mine = holders == holder
        total = total + FeatureSums.of(features[mine], labels[mine], num_classes=NUM_CLASSES)
    return total


@given(
    seed=st.integers(0, 2**31),
    num_clients=st.integers(1, 8),
    ridge_lambda=st.sampled_from([1e-4, 1e-2, 1.0]),
    by_class=st.booleans(),
)
def test_ridge_equals_sklearn_on_the_pooled_data_whatever_the_partition(seed, num_clients, ridge_lambda, by_class):
    features, labels = pooled(seed)
    generator = torch.Generator().manual_seed(seed)
    holders = labels % num_clients if by_class else torch.randint(0, num_clients, labels.shape, generator=generator)
    sums = sums_over(features, labels, holders)
    rows = heads.resolve("ridge", {"ridge_lambda": ridge_lambda}).classifier({}, sums).rows

    strength = ridge_lambda * float((features.double() ** 2).sum()) / FEATURE_DIM
    onehot = torch.nn.functional.one_hot(labels, NUM_CLASSES).double()
    wanted = Ridge(alpha=strength, solver="cholesky").fit(features.double().numpy(), onehot.numpy())
    torch.testing.assert_close(rows["weight"].double(), torch.from_numpy(wanted.coef_), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows["bias"].double(), torch.from_numpy(wanted.intercept_), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 60))
def test_sums_of_two_parts_add_up_to_the_sums_of_the_whole(seed, cut):
    features, labels = pooled(seed)
    whole = FeatureSums.of(features, labels, num_classes=NUM_CLASSES)
    parts = FeatureSums.of(features[:cut], labels[:cut], num_classes=NUM_CLASSES) + FeatureSums.of(
        features[cut:], labels[cut:], num_classes=NUM_CLASSES
    )
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.moment, whole.moment)


def test_sums_hold_the_products_the_counts_and_the_number_of_examples():
    sums = FeatureSums.of(torch.tensor([[2.0], [3.0], [5.0]]), torch.tensor([0, 2, 2]), num_classes=3)
    assert sums.gram.tolist() == [[4.0 + 9.0 + 25.0, 10.0], [10.0, 3.0]]
    assert sums.moment.tolist() == [[2.0, 1.0], [0.0, 0.0], [8.0, 2.0]]


@given(seed=st.integers(0, 2**31), copies=st.integers(2, 5))
def test_lambda_is_free_of_the_number_of_examples(seed, copies):
    features, labels = pooled(seed)
    ridge = heads.resolve("ridge", {"ridge_lambda": 0.1})
    once = ridge.classifier({}, FeatureSums.of(features, labels, num_classes=NUM_CLASSES))
    often = FeatureSums.of(features.repeat(copies, 1), labels.repeat(copies), num_classes=NUM_CLASSES)
    for name, value in ridge.classifier({}, often).rows.items():
        torch.testing.assert_close(value, once.rows[name])


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_lambda_keeps_its_strength_for_features_of_another_scale(scale):
    features, labels = pooled(0)
    ridge = heads.resolve("ridge", {"ridge_lambda": 0.01})
    plain = ridge.classifier({}, FeatureSums.of(features, labels, num_classes=NUM_CLASSES))
    scaled = ridge.classifier({}, FeatureSums.of(scale * features, labels, num_classes=NUM_CLASSES))
    torch.testing.assert_close(scale * scaled.rows["weight"], plain.rows["weight"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled.rows["bias"], plain.rows["bias"], rtol=1e-3, atol=1e-5)


def test_ridge_solves_where_fewer_examples_than_features_were_summed():
    features, labels = pooled(1, num_examples=2)
    rows = (
        heads.resolve("ridge", {"ridge_lambda": 0.01})
        .classifier({}, FeatureSums.of(features, labels, num_classes=NUM_CLASSES))
        .rows
    )
    assert all(torch.isfinite(value).all() for value in rows.values())


def test_ridge_asks_for_sums_and_gives_float32_rows_of_the_classifiers_shape():
    ridge = heads.resolve("ridge", {"ridge_lambda": 0.01})
    assert ridge.collects_sums
    rows = ridge.classifier({}, FeatureSums.of(*pooled(2), num_classes=NUM_CLASSES)).rows
    wanted = init_rows(num_classes=NUM_CLASSES, feature_dim=FEATURE_DIM)
    assert {k: (v.shape, v.dtype) for k, v in rows.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}


@given(seed=st.integers(0, 2**31), num_examples=st.integers(3, 60), noise=st.floats(0.1, 10.0))
def test_chosen_lambda_has_the_smallest_error_of_generalised_cross_validation_on_the_pooled_data(
    seed, num_examples, noise
):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES, (num_examples,), generator=generator)
    centres = torch.randn(NUM_CLASSES, FEATURE_DIM, generator=generator)
    features = 1.0 + centres[labels] + noise * torch.randn(num_examples, FEATURE_DIM, generator=generator)
    X, Y = features.double(), torch.nn.functional.one_hot(labels, NUM_CLASSES).double()
    centring = torch.eye(num_examples).double() - 1 / num_examples
    errors = {}
    for ridge_lambda in torch.logspace(-3, 2, 21, dtype=torch.float64).tolist():
        gram = X.T @ centring @ X + ridge_lambda * X.square().sum() / FEATURE_DIM * torch.eye(FEATURE_DIM)
        hat = 1 / num_examples + centring @ X @ torch.linalg.solve(gram, X.T @ centring)  # (n, n), the bias left free
        errors[ridge_lambda] = num_examples * (Y - hat @ Y).square().sum() / (num_examples - hat.trace()).square()
    chosen = chosen_lambda(FeatureSums.of(features, labels, num_classes=NUM_CLASSES))
    assert errors[chosen] <= min(errors.values()) * (1 + 1e-6) + 1e-12


def test_lambda_is_chosen_where_it_is_zero_larger_for_fewer_examples_and_finite_for_one():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(NUM_CLASSES).repeat(500)
    centres = torch.randn(NUM_CLASSES, FEATURE_DIM, generator=generator)
    features = centres[labels] + 2 * torch.randn(len(labels), FEATURE_DIM, generator=generator)
    few, many = (FeatureSums.of(features[:n], labels[:n], num_classes=NUM_CLASSES) for n in (3 * NUM_CLASSES, 2000))
    assert chosen_lambda(few) > 10 * chosen_lambda(many)
    rows = heads.resolve("ridge", {"ridge_lambda": 0.0}).classifier({}, few).rows
    fixed = heads.resolve("ridge", {"ridge_lambda": chosen_lambda(few)}).classifier({}, few).rows
    assert all(torch.equal(rows[name], fixed[name]) for name in rows)
    one = FeatureSums.of(features[:1], labels[:1], num_classes=NUM_CLASSES)
    alone = heads.resolve("ridge", {"ridge_lambda": 0.0}).classifier({}, one).rows
    assert all(torch.isfinite(value).all() for value in alone.values())


def test_class_of_which_nothing_was_summed_scores_zero():
    features, labels = pooled(3)
    sums = FeatureSums.of(features, labels.clamp(max=2), num_classes=NUM_CLASSES)
    rows = heads.resolve("ridge", {"ridge_lambda": 0.01}).classifier({}, sums).rows
    assert torch.count_nonzero(rows["weight"][3]) == 0 == rows["bias"][3]


def test_random_features_are_the_same_on_every_node_and_separate_what_a_linear_solution_cannot():
    features = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])  # exclusive or
    labels = torch.tensor([0, 0, 1, 1])
    answers = {}
    for num_random in (0, 50):
        settings = {"ridge_lambda": 1e-6, "ridge_features": num_random, "seed": 3}
        node, server = heads.resolve("ridge", settings), heads.resolve("ridge", settings)
        sums = FeatureSums.of(node.lift(features), labels, num_classes=2)
        assert sums.gram.shape[0] == node.lifted_dim(2) + 1
        scores = server.classifier({}, sums).logits(features, torch.tensor([0, 1]))
        answers[num_random] = scores.argmax(1).tolist()
    assert answers[50] == labels.tolist() != answers[0]
