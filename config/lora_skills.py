"""The demo learns to answer by adapters alone: the corpus of config/sft_skills.py.

    python lora.py config/lora_skills.py
    python sample.py --out_dir=out/lora --chat

cost: half again as many steps, without the gradients of frozen weights; 4.7% of the parameters
train. What helped: rank in attention rather than adapters on all linears, and one on the output
matrix. Accuracy beside full fine-tuning: RESULTS.md, "End-to-end pipeline".
"""
init_from = "out/demo"
dataset = "skills"
out_dir = "out/lora"
lora_rank = 54
lora_alpha = 432.0              # Muon's steps have a fixed length: so much of it arrives
targets = "q_proj,k_proj,v_proj,o_proj,lm_head:8"
epochs = 3.0
batch_size = 4
gradient_accumulation_steps = 1

optimizer = "muon"
muon_learning_rate = 0.003
learning_rate = 2e-3
schedule = "linear"
min_lr = 0.0

eval_interval = 500
eval_iters = 25
log_interval = 50
