"""The demo, shrunk: 16 games to learn from, 26 held-out pictures, two steps of stage 2."""

TINY = [
    "num_views=1",
    "train.emoji-train.source.where={split: train, subcategory: game}",
    "held_out.source.where={split: test, category: Activities}",
    "extraction.moments_samples=4",
    "extraction.compute_batch=4",
    "stages.stage2.steps=2",
    "stages.stage2.global_batch=4",
    "stages.stage2.micro_batch=4",
    "stages.stage2.warmup_steps=0",
    "evaluation.k=1",
]
