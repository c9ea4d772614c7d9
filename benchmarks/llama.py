"""A Llama-shaped model in plain PyTorch, with random weights, of any size: made, and computed with layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

import gpunvme

HEAD = 128
WORDS = 32_000
_GIB = 1 << 30
# What a shard has at most.
_SHARD = 2 * _GIB


class Shape(NamedTuple):
    """Width, width of the MLP, and number of layers."""

    width: int
    wide: int
    layers: int

    @classmethod
    def of_size(cls, nbytes: int) -> Shape:
        """Return the shape of a model of about so many bytes."""
        width = 4096 if nbytes >= 4 * _GIB else 2048 if nbytes >= _GIB else 1024
        wide = -(-width * 8 // 3 // 256) * 256
        each = 2 * (4 * width * width + 3 * width * wide)
        return cls(width, wide, max(2, (nbytes - 4 * WORDS * width) // each))

    def tensors(self, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Make every tensor, in BF16."""
        generator = torch.Generator(device).manual_seed(1)

        def random(rows: int, columns: int) -> torch.Tensor:
            made = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
            return made.mul_(1 / math.sqrt(columns))

        ones = torch.ones(self.width, device=device, dtype=torch.bfloat16)
        yield "model.embed_tokens.weight", random(WORDS, self.width)
        for number in range(self.layers):
            prefix = f"model.layers.{number}."
            yield prefix + "input_layernorm.weight", ones
            yield prefix + "mlp.down_proj.weight", random(self.width, self.wide)
            yield prefix + "mlp.gate_proj.weight", random(self.wide, self.width)
            yield prefix + "mlp.up_proj.weight", random(self.wide, self.width)
            yield prefix + "post_attention_layernorm.weight", ones
            for part in "kqvo":
                yield f"{prefix}self_attn.{part}_proj.weight", random(self.width, self.width)
        yield "model.norm.weight", ones
        yield "lm_head.weight", random(WORDS, self.width)

    def save(self, directory: Path, device: str) -> list[Path]:
        """Write the model as shards; return their names."""
        paths: list[Path] = []
        part: dict[str, torch.Tensor] = {}

        def write() -> None:
            paths.append(directory / f"part{len(paths):03}.safetensors")
            gpunvme.save_file(part, paths[-1])
            part.clear()

        for name, tensor in self.tensors(device):
            if sum(each.nbytes for each in part.values()) + tensor.nbytes > _SHARD:
                write()
            part[name] = tensor.clone()
        write()
        return paths


class Decoder:
    """Makes one token after another, each from one pass over the layers.

    Parameters
    ----------
    batch : int
        How many texts at once.
    device : str
        Where.
    """

    def __init__(self, batch: int, device: str) -> None:
        self._tokens = torch.arange(batch, device=device)
        self._cache: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._place = 0
        self.logits: torch.Tensor | None = None

    def step(self, layers: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Make the next token. ``layers`` are names and tensors, in order."""
        x = torch.empty(0)
        for name, tensors in layers:
            if name == "front":
                x = embedding(self._tokens, tensors["model.embed_tokens.weight"])
            elif name == "back":
                x = rms_norm(x, x.shape[-1:], tensors["model.norm.weight"], 1e-5)
                self.logits = linear(x, tensors["lm_head.weight"])
                self._tokens = self.logits.argmax(-1)
            else:
                x = self._layer(name, tensors, x)
        self._place += 1

    def _layer(self, name: str, tensors: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
        def through(part: str, y: torch.Tensor) -> torch.Tensor:
            return linear(y, tensors[f"{name}.{part}.weight"])

        y = rms_norm(x, x.shape[-1:], tensors[f"{name}.input_layernorm.weight"], 1e-5)
        query, key, value = (
            through(f"self_attn.{part}_proj", y).unflatten(-1, (-1, HEAD)).unsqueeze(2) for part in "qkv"
        )
        query, key = self._turned(query), self._turned(key)
        if name in self._cache:
            before = self._cache[name]
            key, value = torch.cat((before[0], key), 2), torch.cat((before[1], value), 2)
        self._cache[name] = key, value
        seen = scaled_dot_product_attention(query, key, value).flatten(1)
        x = x + through("self_attn.o_proj", seen)
        y = rms_norm(x, x.shape[-1:], tensors[f"{name}.post_attention_layernorm.weight"], 1e-5)
        return x + through("mlp.down_proj", silu(through("mlp.gate_proj", y)) * through("mlp.up_proj", y))

    def _turned(self, y: torch.Tensor) -> torch.Tensor:
        """Rotate by the place in the text."""
        half = HEAD // 2
        angle = self._place / 10_000 ** (torch.arange(half, device=y.device) / half)
        cosine, sine = angle.cos().to(y.dtype), angle.sin().to(y.dtype)
        left, right = y[..., :half], y[..., half:]
        return torch.cat((left * cosine - right * sine, left * sine + right * cosine), -1)
