"""A run under lm-evaluation-harness (EleutherAI), the package `lm-eval`: its tasks, our mixture."""
