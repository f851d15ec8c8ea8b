"""The PyTorch model that others would run: a GPT-2 as in nanoGPT, written anew for comparisons.

Fused attention, one matrix for queries, keys and values, tied embeddings, compiled, fused AdamW.
It runs in a process of its own (`measure.serve`); nothing in this package needs PyTorch.
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench import measure
from bench.measure import Row


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds attention and the feed-forward block to the residual stream, [B, T, E]."""
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (
            part.view(heads).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, layers: int, width: int, heads: int, vocab: int, context: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, leaf in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(leaf)
            elif "norm" not in name:
                scale = math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(leaf, std=0.02 / scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns logits [B, T, V]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def make_model(settings: Row, device: str = "cpu") -> GPT:
    """Makes the model of a shape."""
    torch.manual_seed(0)
    names = ("layers", "width", "heads", "vocab", "context")
    return GPT(**{name: settings[name] for name in names}).to(device)


def prepare(settings: Row) -> Any:
    """Returns the work of `measure.serve`: "train", or "score" with several models in turn."""
    return {"train": prepare_training, "score": prepare_scoring}[settings["kind"]](settings)


def prepare_training(settings: Row) -> Any:
    """Makes whole training steps: loss, backward, clipping, AdamW."""
    device, bf16 = settings.get("device", "cpu"), settings.get("bf16", False)
    model = make_model(settings, device)
    forward = torch.compile(model) if settings["compile"] else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1, fused=True
    )
    shape = (4, settings["sequences"], settings["context"] + 1)
    text = torch.randint(0, settings["vocab"], shape, device=device)
    done = 0

    def step() -> torch.Tensor:
        nonlocal done
        tokens, done = text[done % len(text)], done + 1
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = forward(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def work(times: int) -> Row:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            loss = step()
        value = loss.item()  # waits
        seconds = (time.perf_counter() - start) / times
        cpu = (time.process_time() - cpu) / times
        memory = torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else 0
        memory = memory or measure.peak_memory()
        return {"seconds": seconds, "cpu": cpu, "loss": value, "peak_mb": memory}

    return work


def prepare_scoring(settings: Row) -> Any:
    """Makes log-probabilities of one text under several whole models, one after the other."""
    models = [make_model(settings).eval() for _ in range(settings["models"])]
    run: Any = _target_logprobs
    if settings["compile"]:
        run = torch.compile(run)
    text = torch.randint(0, settings["vocab"], (settings["sequences"], settings["context"] + 1))

    def work(times: int) -> Row:
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(times):
                for model in models:
                    run(model, text)
        seconds = (time.perf_counter() - start) / times
        parameters = sum(leaf.nbytes for model in models for leaf in model.parameters()) / 1e6
        return {"seconds": seconds, "parameters_mb": parameters, "peak_mb": measure.peak_memory()}

    return work


def _target_logprobs(model: GPT, text: torch.Tensor) -> torch.Tensor:
    """Returns [B, T] log-probabilities of the tokens that follow."""
    logits = model(text[:, :-1])
    chosen = logits.gather(-1, text[:, 1:, None])[..., 0]
    return chosen - logits.logsumexp(-1)


if __name__ == "__main__":
    measure.serve(prepare)
