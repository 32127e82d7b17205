"""Groups of points from their inner products alone: NumPy in, NumPy out, nothing about models.

Shape names: n points, m dimensions, N clusters.
"""

from fedtalora_flwr.aggregation.clustering.identity import in_matched_group, keep_ids
from fedtalora_flwr.aggregation.clustering.kernel import Matrix, cosines, directions, embed
from fedtalora_flwr.aggregation.clustering.partition import kmeans, kmeans_by_silhouette
from fedtalora_flwr.aggregation.clustering.plane import on_a_plane
from fedtalora_flwr.aggregation.clustering.strays import strays

__all__ = [
    "Matrix",
    "cosines",
    "directions",
    "embed",
    "in_matched_group",
    "keep_ids",
    "kmeans",
    "kmeans_by_silhouette",
    "on_a_plane",
    "strays",
]
