"""GLM-4 in small: RoPE on neighbours in half of each head, biases on q, k, v, sandwich norms.

    python data/prepare.py && python train.py config/glm4.py
    python sample.py --out_dir=out/glm4

cost: 5,511,744 parameters x 614,400 tokens -> 22 TFLOPs.
Expect: the loss and minutes in RESULTS.md, "one of each family"; flags: presets.py, 'glm4'.
"""
out_dir = "out/glm4"
dataset = "stdlib"
family = "glm4"
n_layer = 6
n_head = 6
n_kv_head = 2
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
