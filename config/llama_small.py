"""A Llama of GPT-2's size: RoPE, RMSNorm, SwiGLU, grouped queries, trained with Muon.

    python data/prepare.py fineweb --shards=50
    torchrun --nproc_per_node=8 train.py config/llama_small.py --dataset=fineweb

cost: 114,114,048 parameters x 4,999,741,440 tokens -> 3,988,870 TFLOPs.
Not yet benchmarked: at 40% of an H100's 989 TFLOP/s that is 168 minutes on one, 21 on eight.
Muon's published gain over AdamW is about 1.5 times fewer steps to the same loss.
"""
out_dir = "out/llama_small"
dataset = "stdlib"                  # so that it runs anywhere; --dataset=fineweb is meant
family = "llama"
n_layer = 12
n_head = 12
n_kv_head = 4                       # three queries share a key
n_embd = 768
tie_word_embeddings = True
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 40

optimizer = "muon"
learning_rate = 3e-3                # of AdamW: embeddings and norms
muon_learning_rate = 0.02
weight_decay = 0.1
max_iters = 10172
warmup_iters = 100
schedule = "wsd"
min_lr = 0.0
eval_interval = 500
eval_iters = 150
