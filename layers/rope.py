"""Rotary position embedding: the frequencies, their scalings for long contexts, and the tables.

    cos, sin = rope_table(config, length=1024, device="cpu")        # each (1024, R / 2)
    y = kernels.rope(x, cos, sin)                                   # x (B, T, H, D)
"""
from __future__ import annotations

import math
from typing import Any

from config import UserError, refuse_to_run

import torch
from torch import Tensor


def rope_frequencies(config: Any, local: bool = False) -> tuple[Tensor, float]:
    """Return radians per position of each rotated pair, (R / 2,) float32, theta^(-2i/R), and a
    factor on cos and sin. `local`: of layers with a window, which have their own base, unscaled.

    linear   all divided by `factor`: positions are squeezed into the trained range (Chen 2023)
    llama3   keeps the fast ones, divides the slow ones, blends between the wavelengths
             original/high and original/low (Llama 3 report, 2024)
    yarn     the same by dimension: those that turn more than beta_fast times within the original
             context stay, below beta_slow they are divided, a ramp between (Peng 2023)
    """
    R = config.rotary_dim
    theta = config.rope_theta
    s = config.rope_scaling or {}
    if local and config.rope_local_theta:
        theta = config.rope_local_theta
        s = {}
    f = 1.0 / theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    kind = s.get("rope_type", s.get("type", "default"))
    needed = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                         "original_max_position_embeddings")}
    missing = [k for k in needed.get(kind, ()) if k not in s]
    if missing:
        raise UserError(f"rope_scaling of rope_type {kind!r} lacks {', '.join(missing)}")
    if kind == "linear":
        return f / s["factor"], 1.0
    original = s.get("original_max_position_embeddings")
    if kind == "llama3":
        low = s["low_freq_factor"]
        high = s["high_freq_factor"]
        blend = (original * f / (2 * math.pi) - low) / (high - low)
        blend = blend.clamp(0, 1)                    # 0: slow, stretched whole; 1: fast, kept
        return (1 - blend) * f / s["factor"] + blend * f, 1.0
    if kind == "yarn":
        def dimension(turns: float) -> float:        # the pair that turns that often
            return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = dimension(s.get("beta_fast") or 32)
        high = dimension(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low = math.floor(low)
            high = math.ceil(high)
        low = max(low, 0)
        high = min(high, R - 1)
        ramp = (torch.arange(R // 2) - low) / (high - low or 0.001)
        ramp = ramp.clamp(0, 1)                      # 0: fast, kept; 1: slow, stretched

        def grow(weight: float) -> float:            # warmer attention over longer contexts
            return 0.1 * weight * math.log(s["factor"]) + 1.0 if s["factor"] > 1 else 1.0

        both = s.get("mscale") and s.get("mscale_all_dim")       # DeepSeek's two settings
        factor = s.get("attention_factor") or (
            grow(s["mscale"]) / grow(s["mscale_all_dim"]) if both else grow(1.0))
        return ramp * f / s["factor"] + (1 - ramp) * f, factor
    if kind != "default":
        raise UserError(f"rope_type {kind!r} is not supported: use default, linear, llama3 or yarn")
    return f, 1.0


def rope_table(config: Any, length: int, device, local: bool = False):
    """Return cos and sin of every position times every frequency, each (length, R / 2) float32."""
    frequencies, factor = rope_frequencies(config, local)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


if __name__ == "__main__":
    refuse_to_run()
