"""The demo learns to answer: fine-tuning of out/demo on the skills corpus, on whatever is at hand.

    python data/prepare.py && python train.py config/demo.py        # the text model, once
    python data/prepare.py skills && python sft.py config/sft_skills.py
    python sample.py --out_dir=out/sft --chat

cost: twice the corpus, whose rows and tokens sft.py prints; the vocabulary's matrix, most of
the demo's work, meets the answers alone. Minutes and accuracy: RESULTS.md, "End-to-end pipeline".
"""
init_from = "out/demo"
dataset = "skills"
out_dir = "out/sft"
epochs = 2.0
batch_size = 4
gradient_accumulation_steps = 1

optimizer = "muon"
muon_learning_rate = 0.015
learning_rate = 2e-3
schedule = "linear"
min_lr = 0.0

eval_interval = 500
eval_iters = 25
log_interval = 50
