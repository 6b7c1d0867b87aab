"""The demo learns to answer by adapters alone: the corpus and steps of config/sft_skills.py.

    python lora.py config/lora_skills.py
    python sample.py --out_dir=out/lora_skills --chat

cost: that of config/sft_skills.py without the gradients of frozen weights; at most 5% of the
parameters train. Accuracy beside the full fine-tuning's: RESULTS.md, "The life of a model".
"""
init_from = "out/demo"
dataset = "skills"
out_dir = "out/lora_skills"
lora_rank = 24
lora_alpha = 24.0
epochs = 2.0
batch_size = 4
gradient_accumulation_steps = 1

optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 2e-3
schedule = "linear"
min_lr = 0.0

eval_interval = 500
eval_iters = 50
log_interval = 50
