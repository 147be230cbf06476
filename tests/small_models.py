"""Small UNets with seeded weights that the executors' tests run in full: every kind of layer, few of each."""

from __future__ import annotations

SMALL = {
    "block_out_channels": [64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
"""Two levels, attention at the first.

Two channels in each of the 32 groups: with one, GroupNorm would take the time embedding out again.
"""

SMALLER = {**SMALL, "mid_block_type": None}
"""The same latent space with fewer layers: what an edge device would run."""

HEIGHT_PX, WIDTH_PX = 192, 64
"""A latent of 24 x 8, whose rows divide by 2, 3 and 4 at both levels."""
