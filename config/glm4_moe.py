"""DeepSeek's mixture in small: sigmoid scores, a shared expert, a bias that evens the load out.

    python data/prepare.py && python train.py config/glm4_moe.py
    python sample.py --out_dir=out/glm4_moe

cost: 9,017,320 parameters x 614,400 tokens -> 23 TFLOPs. Each token meets 5,699,560 of them.
Expect: the loss and minutes in RESULTS.md, "one of each family"; flags: presets.py, 'glm4_moe'.
"""
out_dir = "out/glm4_moe"
dataset = "stdlib"
family = "glm4_moe"
n_layer = 6
n_head = 6
n_kv_head = 2
n_embd = 192
head_dim = 32
tie_word_embeddings = True
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 192
n_shared_experts = 1                # every token goes through it; the first layer has an MLP
router_aux_loss_coef = 0.0          # no balance loss: the bias does it
router_bias_rate = 0.01
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
