# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A baseline and two papers, side by side
#
# Trains the small language model three times on the source text of your Python's standard library:
# as it is, with HybridNorm's placement of norms, and with Monarch matrices in the feed-forward
# blocks. Each is a few rules put before the base's. `STEPS` sets how long: 60 takes a minute or
# two on two CPU cores, 600 shows the curves of the configs.
#
# In Colab, first run: `!pip install -q "git+<this repository>"`.

# %%
import os
import pathlib
import tempfile

STEPS = int(os.environ.get("NOTEBOOK_STEPS", "60"))
runs = pathlib.Path(tempfile.mkdtemp())

# %%
from configs import common
from efficient.training import loop

PAPERS = {
    "baseline": [],
    "hybrid_norm": [{"at": r"blocks/\d+", "use": "hybrid_norm"}],
    "monarch": [{"at": r"blocks/\d+/channel/.*", "use": "monarch", "blocks": 4, "init_std": 0.02}],
}

for name, rules in PAPERS.items():
    config = common.small_lm(common.parse(), steps=STEPS)
    config.rules = [*rules, *config.rules]
    config.eval_every = max(1, STEPS // 3)
    config.eval_batches = 4
    print(f"== {name}")
    loop.train(config, str(runs / name))

# %% [markdown]
# ## The curves
#
# Against steps, tokens, matrix FLOPs and seconds: a technique may win on one axis and lose on
# another.

# %%
from IPython.display import Image

from efficient import compare

compare.main([*(str(runs / name) for name in PAPERS), f"--out={runs}/compare.png"])
Image(f"{runs}/compare.png", width=1000)

# %% [markdown]
# ## What is in a run
#
# A checkpoint is a flat dict, path -> array, whose paths are those that rules speak of.

# %%
from efficient.checkpoints.checkpoint import read

for path, (shape, dtype) in list(read(str(runs / "monarch" / "checkpoints")).items())[:12]:
    print(f"{path:60} {shape} {dtype}")
