"""Measure what the things that a client sends tell whoever receives them: docs/PRIVACY.md.

The receiver has the model, as every server has, and a pool of images among which the client's are: the 1,438 training
images of scikit-learn's digits, on the shipped backbone. Clients are drawn from the pool; the test images are never
theirs.

Usage: python benchmarks/what_leaves.py [--clients 10] [--json FILE]
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtalora_flwr.config import RunConfig
from fedtalora_flwr.config.sources import app_folder, gather
from fedtalora_flwr.model import heads, penalties
from fedtalora_flwr.model.heads import FeatureRoot, init_rows, rows_at_means
from fedtalora_flwr.model.session import model_of, test_examples, training_examples
from fedtalora_flwr.model.train import Examples, FitResult, fit, sum_features, sum_fisher

CLASSES = list(range(10))
FACTORS = frozenset({"lora_A", "lora_B"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10, help="drawn for each row")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    receiver = Receiver()
    rows = []
    for what, measure in MEASURES.items():
        for label, value in measure(receiver, arguments.clients):
            rows.append({"what": what, "measured": label, "value": value})
            print(f"{what:18}{label:78}{value:10.3g}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


class Receiver:
    """The model, the pool and its features, and a random generator to draw clients with."""

    def __init__(self) -> None:
        assignments = ["num-clients=1", "num-tasks=1", "partition=iid", "precision=fp32", "lr-schedule=constant"]
        self.config = RunConfig.parse(gather(app_folder(), file=None, assignments=assignments))
        torch.manual_seed(0)
        self.model = model_of(self.config)
        self.start = self.model.initial_factors(seed=0)
        self.model.load(self.start, {})
        self.pool = training_examples(self.config, partition_id=0, task_id=0)
        self.others = test_examples(self.config, task_id=0)
        self.features, self.other_features = (self.features_of(each) for each in (self.pool, self.others))
        means = torch.stack([self.features[self.pool.labels == c].mean(0) for c in CLASSES])
        self.rows = rows_at_means(means.double())
        self.rng = np.random.default_rng(0)

    @torch.no_grad()
    def features_of(self, examples: Examples) -> Tensor:
        """Give the features under the untouched backbone, (N, d)."""
        self.model.eval()
        return torch.cat([self.model.backbone(part).float() for part in torch.split(examples.inputs, 256)])

    def draw(self, number: int, labels: Tensor | None = None) -> Tensor:
        """Draw rows of the pool, of whatever class or those with `labels`."""
        among = np.arange(len(self.pool)) if labels is None else labels.numpy()
        return torch.from_numpy(self.rng.choice(among, size=number, replace=False))

    def of(self, rows: Tensor) -> Examples:
        """Give rows of the pool as a client's examples."""
        return Examples(self.pool.inputs[rows], self.pool.labels[rows])

    def sums_of(self, rows: Tensor) -> FeatureRoot:
        """Sum as a client does, with the head lda or linear."""
        plain = heads.resolve("linear", {})
        return sum_features(self.model, self.of(rows), head=plain, num_classes=10, config=self.config)

    def nearest(self, feature: Tensor) -> int:
        """Find the image of the pool whose feature is nearest."""
        return int((self.features - feature).square().sum(1).argmin())


def moments(receiver: Receiver, clients: int) -> Iterator[tuple[str, float]]:
    """Read a class's row of M: with n examples it is the sum of their features."""
    for held in (1, 2, 5, 10, 20):
        found, errors = [], []
        for _ in range(clients):
            for c in CLASSES[:4]:
                rows = receiver.draw(held, (receiver.pool.labels == c).nonzero().flatten())
                moment = receiver.sums_of(rows).moment[c]
                mean = (moment[:-1] / moment[-1]).float()
                found.append(receiver.nearest(mean) in rows.tolist())
                errors.append(float((mean - receiver.features[rows[0]]).norm() / receiver.features[rows[0]].norm()))
        if held == 1:
            yield "a class with 1 example: relative error of its feature", max(errors)
        yield f"a class with {held} examples: the image nearest to their mean is one of them", float(np.mean(found))


def spans(receiver: Receiver, clients: int) -> Iterator[tuple[str, float]]:
    """Ask for each image whether its feature lies in the span of G's root, as those of the client's examples do."""
    width = receiver.features.shape[1] + 1
    for held in (50, 150, 190, 250):
        right = []
        for _ in range(clients):
            rows = receiver.draw(held)
            root = receiver.sums_of(rows).root
            _, values, directions = torch.linalg.svd(root, full_matrices=False)
            span = directions[values > 1e-9 * values[0]]
            outside = []
            for features in (receiver.features[rows], receiver.other_features[:held]):
                f = F.pad(features.double(), (0, 1), value=1.0)
                outside.append((f - f @ span.T @ span).norm(dim=1) / f.norm(dim=1))
            right.append(balanced(-outside[0], -outside[1]))
        label = f"{held} examples, {width} numbers a feature: members told from others (.5: by chance)"
        yield label, float(np.mean(right))


def updates(receiver: Receiver, clients: int) -> Iterator[tuple[str, float]]:
    """Look at the rows and the pair that a client of 20 examples sends after one epoch."""
    yes, cosines, told = [], [], []
    for _ in range(clients):
        rows = receiver.draw(20)
        labels, counts = receiver.pool.labels[rows], torch.bincount(receiver.pool.labels[rows], minlength=10)
        result = train(receiver, rows, start=init_rows(num_classes=10, feature_dim=receiver.features.shape[1]))
        for c in (counts == 1).nonzero().flatten().tolist():
            row, of = result.head["weight"][c], int(rows[labels == c])
            scores = F.cosine_similarity(receiver.features - receiver.features.mean(0), row[None])
            cosines.append(float(scores[of]))
            yes.append(int(scores.argmax()) == of)
        result = train(receiver, rows, start=receiver.rows, epochs=5)
        receiver.model.load(result.adapters, {})
        fallen = []
        others = Examples(receiver.others.inputs[:100], receiver.others.labels[:100])
        for examples, before in ((receiver.of(rows), receiver.features[rows]), (others, receiver.other_features[:100])):
            after = receiver.features_of(examples)
            fallen.append(loss(before, receiver.rows, examples.labels) - loss(after, result.head, examples.labels))
        receiver.model.load(receiver.start, {})
        told.append(auc(*fallen))
    yield (
        "20 examples, one epoch: cosine of a class row's change with the one example's feature",
        float(np.mean(cosines)),
    )
    yield "the image of 1,438 that is nearest to that row is the example", float(np.mean(yes))
    yield "20 examples, five epochs: how much further the loss fell on members (AUC, .5: chance)", float(np.mean(told))


def fishers(receiver: Receiver, clients: int) -> Iterator[tuple[str, float]]:
    """Compare the summed squared gradients with those of single images."""
    for held in (1, 5, 20):
        told = []
        for number in range(clients):
            rows, strangers = receiver.draw(held), receiver.rng.choice(len(receiver.others), size=20, replace=False)
            total = fisher(receiver, receiver.of(rows), seed=number)
            likeness = []
            for pool, chosen in ((receiver.pool, rows.tolist()), (receiver.others, strangers.tolist())):
                each = [Examples(pool.inputs[i : i + 1], pool.labels[i : i + 1]) for i in chosen]
                likeness.append(
                    torch.tensor(
                        [float(F.cosine_similarity(fisher(receiver, one, seed=1000), total, 0)) for one in each]
                    )
                )
            told.append(auc(*likeness))
        yield f"{held} examples: how much liker a member's own are (AUC, .5: chance)", float(np.mean(told))


def pixels(receiver: Receiver, clients: int) -> Iterator[tuple[str, float]]:
    """Look by gradient descent for an image with a feature that a class of one example has told."""
    rows = receiver.draw(clients)
    wanted, images = receiver.features[rows], receiver.pool.inputs[rows].float() / 255
    found = torch.full_like(images, 0.5, requires_grad=True)
    optimiser = torch.optim.Adam([found], lr=0.05)
    for _ in range(500):
        got = receiver.model.backbone(found * 255)
        smooth = (found[..., 1:] - found[..., :-1]).abs().mean() + (found[..., 1:, :] - found[..., :-1, :]).abs().mean()
        optimiser.zero_grad()
        ((got - wanted).square().mean() + 0.02 * smooth).backward()
        optimiser.step()
        with torch.no_grad():
            found.clamp_(0, 1)
    by_class = torch.stack([receiver.pool.inputs[receiver.pool.labels == c].float().mean(0) for c in CLASSES])
    usual = by_class[receiver.pool.labels[rows]]
    with torch.no_grad():
        gap = (receiver.model.backbone(found * 255) - wanted).norm() / wanted.norm()
    yield "from a feature: relative error of the rebuilt image's feature", float(gap)
    yield "correlation of its pixels with the image's", correlation(found.detach(), images)
    yield "correlation of the mean image of the class with the image's", correlation(usual, images)


def train(receiver: Receiver, rows: Tensor, *, start: dict[str, Tensor], epochs: int = 1) -> FitResult:
    """Train as a client does."""
    config = RunConfig.parse({**receiver.config.flat(), "local-epochs": epochs})
    receiver.model.load(receiver.start, {})
    result = fit(
        receiver.model, start, receiver.of(rows), classes=CLASSES, trainable=FACTORS, old_classes=[], config=config,
        penalty=penalties.resolve("none", {}), task_id=0, round_in_task=0, seed=[0],
    )  # fmt: skip
    receiver.model.load(receiver.start, {})
    return result


def fisher(receiver: Receiver, examples: Examples, *, seed: int) -> Tensor:
    """Give the squared gradients as one vector."""
    sums = sum_fisher(
        receiver.model, receiver.rows, examples, classes=CLASSES, trainable=FACTORS, config=receiver.config, seed=[seed]
    )
    return torch.cat([value.flatten() for value in sums.values()])


def loss(features: Tensor, rows: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Give the cross-entropy of each example."""
    return F.cross_entropy(F.linear(features, rows["weight"], rows["bias"]), labels, reduction="none")


def auc(members: Tensor, others: Tensor) -> float:
    """Give the chance that a member's score is above another's."""
    above = (members[:, None] > others[None, :]).double() + 0.5 * (members[:, None] == others[None, :]).double()
    return float(above.mean())


def balanced(members: Tensor, others: Tensor, *, threshold: float = -1e-6) -> float:
    """Give the mean of how many members and how many others are called rightly."""
    return float(((members > threshold).double().mean() + (others <= threshold).double().mean()) / 2)


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """Give the mean correlation of two lists of images over their pixels."""
    pairs = zip(ours.flatten(1), theirs.flatten(1), strict=True)
    return float(np.mean([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]))


MEASURES: dict[str, Callable[[Receiver, int], Iterator[tuple[str, float]]]] = {
    "moments": moments,
    "gram": spans,
    "update": updates,
    "squared gradients": fishers,
    "pixels": pixels,
}

if __name__ == "__main__":
    main()
