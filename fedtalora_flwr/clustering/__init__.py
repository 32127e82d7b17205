"""Groups of points from their inner products alone: NumPy in, NumPy out, nothing about models.

Shape names: n points, m dimensions, N clusters.
"""

from fedtalora_flwr.clustering.identity import keep_ids
from fedtalora_flwr.clustering.kernel import cosines, embed
from fedtalora_flwr.clustering.partition import kmeans, kmeans_by_silhouette
from fedtalora_flwr.clustering.strays import strays

__all__ = ["cosines", "embed", "keep_ids", "kmeans", "kmeans_by_silhouette", "strays"]
