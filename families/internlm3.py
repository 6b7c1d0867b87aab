"""InternLM 3 (Shanghai AI Lab 2025): Llama with heads of 128 and one switch for all its biases."""
from __future__ import annotations

from config import UserError, refuse_to_run
from families.base import LLAMA, like, no_windows


def internlm3_read(hf: dict, values: dict) -> None:
    """Refuse biases in attention alone or in the MLP alone, as transformers does."""
    no_windows(hf, values)
    if values["qkv_bias"] != values["mlp_bias"]:
        raise UserError(f"expected qkv_bias = bias in an internlm3 model, got {values['qkv_bias']}"
                        f" and {values['mlp_bias']}")


ROWS = (
    like(LLAMA, "internlm3", "LlamaForCausalLM",
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=2, head_dim=128,
                       rms_norm_eps=1e-5), read=internlm3_read, rank=2,
         synonyms={"qkv_bias": "attention_bias", "bias": "mlp_bias"}),
)


if __name__ == "__main__":
    refuse_to_run()
