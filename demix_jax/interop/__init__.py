"""Models of other libraries: Hugging Face in and out, and the released DEMix code's checkpoints."""
