"""Sizes of random models for the tests of ranks."""

from __future__ import annotations

from dataclasses import replace

from duplex_engine.models.random import Preset

# What four ranks can be cut from: experts, both kinds of layer, fewer key/value heads than ranks.
LARGER = Preset(
    vocab_size=320,
    d_model=96,
    d_ff=256,
    layers="ld gm lm gd",
    heads=(8, 2),
    local_heads=(4, 4),
    d_head=20,
    d_rel=5,
    rel_extent=48,
    window=24,
    patch_size=8,
    vision_layers=2,
    moe={"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
)
# The same in small.
SMALL = Preset(
    vocab_size=320,
    d_model=24,
    d_ff=32,
    layers="lm gd",
    heads=(4, 2),
    local_heads=(4, 4),
    d_head=4,
    d_rel=3,
    rel_extent=40,
    window=24,
    patch_size=8,
    vision_layers=1,
    moe={"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
)
# What four can be cut from in int4 and NVFP4: whole groups of columns.
GROUPS = replace(
    SMALL, d_model=32, d_ff=128, d_head=32, moe=SMALL.moe | {"moe_intermediate_size": 128}
)
# What eight ranks can be cut from.
EIGHT = replace(
    SMALL, heads=(8, 2), local_heads=(8, 8), moe=SMALL.moe | {"moe_intermediate_size": 32}
)
