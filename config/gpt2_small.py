"""GPT-2 124M, nanoGPT's recipe: half a million tokens per step, 10 billion in all.

    python data/prepare.py                                      # try it on what is here, or
    python data/prepare.py fineweb --shards=100                 # 10 billion tokens, 20 GB
    torchrun --nproc_per_node=8 train.py config/gpt2_small.py --dataset=fineweb

cost: 124,337,664 parameters x 9,999,974,400 tokens -> 8,544,362 TFLOPs.
Not yet benchmarked: at 40% of an H100's 989 TFLOP/s that is 360 minutes on one, 45 on eight.
llm.c publishes a val_loss of about 3.28 on fineweb. The default dataset, the standard library, has
2.5 million tokens: a run on it is a test of the machine, so add --max_iters=100.

The larger sizes by the same recipe (354 M, 774 M and 1.6 billion parameters):

    --n_layer=24 --n_head=16 --n_embd=1024 --learning_rate=3e-4 --min_lr=3e-5 --batch_size=8 \\
        --gradient_accumulation_steps=60 --out_dir=out/gpt2_medium
    --n_layer=36 --n_head=20 --n_embd=1280 --learning_rate=2.5e-4 --min_lr=2.5e-5 --batch_size=4 \\
        --gradient_accumulation_steps=120 --out_dir=out/gpt2_large
    --n_layer=48 --n_head=25 --n_embd=1600 --learning_rate=2e-4 --min_lr=2e-5 --batch_size=4 \\
        --gradient_accumulation_steps=120 --checkpointing=1 --out_dir=out/gpt2_xl
"""
out_dir = "out/gpt2_small"
dataset = "stdlib"
family = "gpt2"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 40    # 12 x 40 x 1024 = 491,520 tokens per step over all ranks

learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
max_iters = 20345
warmup_iters = 700
eval_interval = 500
eval_iters = 150
