"""Any family in small, in two to four minutes on two CPU cores, to see what it does differently.

    python data/prepare.py && python train.py config/tiny.py                    # Llama 3
    python train.py config/tiny.py --family=qwen3 --head_dim=64 --out_dir=out/qwen3
    python train.py config/tiny.py --family=gemma3 --sliding_window=64 --out_dir=out/gemma3
    python train.py config/tiny.py --family=glm4 --out_dir=out/glm4
    python train.py config/tiny.py --family=minicpm --n_kv_head=6 \\
        --schedule=wsd --out_dir=out/minicpm
    python train.py config/tiny.py --family=qwen3_moe --num_experts=8 --moe_intermediate_size=256 \\
        --out_dir=out/qwen3_moe                     # MoE: two of eight experts for each token
    python train.py config/tiny.py --family=glm4_moe --num_experts=8 --moe_intermediate_size=192 \\
        --router_aux_loss_coef=0 --router_bias_rate=0.01 --out_dir=out/glm4_moe
    python sample.py --out_dir=out/llama

cost: 5,507,520 parameters x 614,400 tokens -> 22 TFLOPs with the defaults below.
Loss and minutes of each: RESULTS.md, "Every family".
"""
out_dir = "out/llama"
dataset = "stdlib"
family = "llama"                    # families/ has the others
n_layer = 6
n_head = 6
n_kv_head = 2                       # three queries share a key and a value
n_embd = 192
head_dim = 32
tie_word_embeddings = True
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = "muon"
learning_rate = 3e-3                # of AdamW: embeddings and norms
muon_learning_rate = 0.02
weight_decay = 0.0
warmup_iters = 10
schedule = "linear"
min_lr = 0.0
max_iters = 300
eval_interval = 100
eval_iters = 20
log_interval = 10
