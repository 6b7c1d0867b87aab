"""GLM (Zhipu AI): ChatGLM3, GLM-4, GLM-4-0414 and the MoE models GLM-4.5.

Rotary positions turn neighbouring features, in the first half of each head; biases on q, k, v.
GLM-4-0414 has norms around each branch. GLM-4.5 routes as DeepSeek-V3 does: sigmoid scores, a bias
for the choice alone, a shared expert, the first layer dense.
"""
from __future__ import annotations

from typing import Any

from config import refuse_to_run
from families.base import LLAMA, L, MOE, Family, like, make_size, needs_experts

E = "transformer.encoder.layers.{i}."


def chatglm_read(hf: dict, values: dict) -> None:
    """Read the number of key heads and the rotary base of the authors' files."""
    # the number of key heads is there even where it does not count
    if not hf.get("multi_query_attention"):
        values["n_kv_head"] = 0
    # GLM-4 stretches its context by the base alone
    values["rope_theta"] = 10000.0 * (hf.get("rope_ratio") or 1.0)


def chatglm_write(config: Any, hf: dict) -> None:
    """Write what the row does not say and the authors' program reads."""
    # the second line: what the row does not read, and the published program does
    hf.update(multi_query_attention=True, rope_ratio=config.rope_theta / 10000,
              add_bias_linear=False, rmsnorm=True, post_layer_norm=True, original_rope=True,
              apply_residual_connection_post_layernorm=False, tie_word_embeddings=False)


SHAPE = dict(head_dim=128, **make_size(40, 32, 2, 4096, 13696))
GLM = like(LLAMA, "glm", "GlmForCausalLM",
           fixed=dict(o_bias=False, mlp_bias=False, rope_interleaved=True),
           defaults=dict(max_position_embeddings=131072, head_dim=128, attention_bias=True,
                         num_key_value_heads=2, rms_norm_eps=1.5625e-7, partial_rotary_factor=0.5),
           keys={L + "mlp.gate_up_proj": (L + "mlp.gate_proj", L + "mlp.up_proj")},
           rope="partial",
           scratch=dict(qkv_bias=True, partial_rotary_factor=0.5),
           presets={"glm-4-9b": dict(SHAPE, vocab_size=151552, block_size=131072,
                                     norm_eps=1.5625e-7, rope_theta=5e6)})
ROWS = (
    GLM,
    like(GLM, "glm4", "Glm4ForCausalLM", dict(norm_placement="sandwich"),
         presets={"glm-4-9b-0414": dict(SHAPE, vocab_size=151552, block_size=32768)}),
    like(LLAMA, "glm4_moe", "Glm4MoeForCausalLM",
         dict(o_bias=False, mlp_bias=False, scoring_func="sigmoid", router_bias=True),
         {"num_experts": "n_routed_experts", **MOE, "n_shared_experts": "n_shared_experts",
          "first_k_dense_replace": "first_k_dense_replace", "norm_topk_prob": "norm_topk_prob",
          "routed_scaling_factor": "routed_scaling_factor", "qk_norm": "use_qk_norm"},
         dict(max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5,
              n_routed_experts=128, num_experts_per_tok=8, moe_intermediate_size=1408,
              n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True,
              routed_scaling_factor=1.0, use_qk_norm=False, partial_rotary_factor=0.5),
         only={"n_group": (1,), "topk_group": (1,), "scoring_func": ("sigmoid",),
               "topk_method": ("noaux_tc",)}, rope="partial",
         synonyms={"num_local_experts": "n_routed_experts"},
         ignores=("num_nextn_predict_layers", "num_mtp_layers"),
         # said, because the family's default is one more layer, that predicts a second token
         read=needs_experts, write=lambda config, hf: hf.update(num_nextn_predict_layers=0),
        scratch=dict(partial_rotary_factor=0.5, num_experts=8, num_experts_per_tok=2,
                     n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True),
        presets={"glm-4.5-air": dict(
            vocab_size=151552, block_size=131072, head_dim=128, rope_theta=1e6, qkv_bias=True,
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1408,
            **make_size(46, 96, 8, 4096, 10944))}),
    Family(
        "chatglm", "ChatGLMModel",              # ChatGLM3-6B and GLM-4-9B as they were published
        fixed=dict(GLM.fixed, activation="silu", partial_rotary_factor=0.5,
                   tie_word_embeddings=False),
        fields=(("vocab_size", "padded_vocab_size"), ("block_size", "seq_length"),
                ("n_layer", "num_layers"), ("n_head", "num_attention_heads"),
                ("n_kv_head", "multi_query_group_num"), ("n_embd", "hidden_size"),
                ("head_dim", "kv_channels"), ("intermediate_size", "ffn_hidden_size"),
                ("norm_eps", "layernorm_epsilon"), ("qkv_bias", "add_qkv_bias")),
        defaults=dict(padded_vocab_size=None, seq_length=2048, num_layers=None, hidden_size=None,
                      num_attention_heads=None, multi_query_group_num=1, kv_channels=0,
                      ffn_hidden_size=None, layernorm_epsilon=1e-5, add_qkv_bias=False),
        only={"add_bias_linear": (False,), "rmsnorm": (True,), "post_layer_norm": (True,),
              "apply_residual_connection_post_layernorm": (False,), "original_rope": (True,),
              "tie_word_embeddings": (False,), "interleaved_qkv": (False,)},
        prefix="transformer.",
        keys={"transformer.embedding.word_embeddings": ("model.embed_tokens",),
              E + "input_layernorm": (L + "input_layernorm",),
              E + "post_attention_layernorm": (L + "post_attention_layernorm",),
              E + "self_attention.query_key_value": tuple(L + f"self_attn.{x}_proj"
                                                          for x in "qkv"),
              E + "self_attention.dense": (L + "self_attn.o_proj",),
              E + "mlp.dense_h_to_4h": (L + "mlp.gate_proj", L + "mlp.up_proj"),
              E + "mlp.dense_4h_to_h": (L + "mlp.down_proj",),
              "transformer.encoder.final_layernorm": ("model.norm",),
              "transformer.output_layer": ("lm_head",)},
        read=chatglm_read, write=chatglm_write, rope="own", writable=False,
        reads=("multi_query_attention", "rope_ratio"),
        # of its own program: the types and kernels it computes with
        ignores=("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "vocab_size",
                 "bias_dropout_fusion", "fp32_residual_connection", "prefix_projection"),
        scratch=None, layout="chatglm",
        presets={"chatglm3-6b": {**SHAPE, "qkv_bias": True, "n_layer": 28, "vocab_size": 65024,
                                 "block_size": 8192}}),
)


if __name__ == "__main__":
    refuse_to_run()
