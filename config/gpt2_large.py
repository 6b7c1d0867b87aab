"""GPT-2 774M: the recipe of gpt2_small.py, wider and deeper.

    python data/prepare.py fineweb --shards=100
    torchrun --nproc_per_node=8 train.py config/gpt2_large.py --dataset=fineweb

cost: 773,521,920 parameters x 9,999,974,400 tokens -> 51,989,243 TFLOPs.
Not measured here: at 40% of an H100's 989 TFLOP/s that is 2,190 minutes on one, 274 on eight.
Expect a lower loss than gpt2_small.py at every step; no figure of our own yet.
"""
out_dir = "out/gpt2_large"
dataset = "stdlib"                  # so that it runs as it stands; --dataset=fineweb is meant
family = "gpt2"
n_layer = 36
n_head = 20
n_embd = 1280
block_size = 1024
batch_size = 4
gradient_accumulation_steps = 120    # 4 x 120 x 1024 = 491,520 tokens a step
checkpointing = False

learning_rate = 2.5e-4
min_lr = 2.5e-5
weight_decay = 0.1
max_iters = 20345
warmup_iters = 700
eval_interval = 500
eval_iters = 50
