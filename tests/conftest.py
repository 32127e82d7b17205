import os
import tempfile

os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

import hypothesis
import torch

_cache = tempfile.TemporaryDirectory(prefix="fedtalora-cache-")
os.environ["FEDTALORA_CACHE"] = _cache.name  # no test reads or fills the user's own
torch.set_num_threads(1)  # the same sums on any machine, and no fight over the cores of a shared one
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("seeded")
