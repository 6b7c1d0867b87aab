"""Qwen3 in small: Llama with a norm on each head of q and k, whose width is set apart.

    python data/prepare.py && python train.py config/qwen3.py
    python sample.py --out_dir=out/qwen3

cost: 6,098,112 parameters x 614,400 tokens -> 27 TFLOPs.
Expect: the loss and minutes in RESULTS.md, "one of each family"; flags: presets.py, 'qwen3'.
"""
out_dir = "out/qwen3"
dataset = "stdlib"
family = "qwen3"
n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 192
head_dim = 64                       # not 192 / 6: Qwen3 sets it apart from the width
rope_theta = 10000.0
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
