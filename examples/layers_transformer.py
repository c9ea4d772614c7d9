"""A real transformer in plain PyTorch, one layer in memory at a time; the output is that of the whole model.

python examples/layers_transformer.py [CHECKPOINT] [--device cuda]

Without a checkpoint it takes the one that `gpunvme demo` takes, or, if that is not installed, makes a small one of the
same kind with random numbers.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

import gpunvme

try:
    import torch
    from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
except ImportError:
    # Layers need no framework: without one they are NumPy arrays.
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "model.safetensors"
        gpunvme.save_file({f"blk.{n}.weight": np.full((8, 8), n, np.float32) for n in range(4)}, source)
        with gpunvme.LayerLoader(source) as loader:
            print("sum:", sum(float(layer.tensors[f"{layer.name}.weight"].sum()) for layer in loader))
            print(loader.stats())
    print("PyTorch is not installed: no transformer")
    sys.exit()

HEAD = 32  # elements of one attention head


def random_checkpoint(path: Path, layers: int = 3, width: int = 64, words: int = 1000) -> Path:
    """Write a BERT with the names and the shapes of real ones."""
    generator = torch.Generator().manual_seed(1)

    def dense(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": torch.randn(out, into, generator=generator) / math.sqrt(into),
            f"{name}.bias": torch.randn(out, generator=generator) / 10,
        }

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    found = norm("embeddings.LayerNorm")
    for name, rows in (("word", words), ("position", 512), ("token_type", 2)):
        found[f"embeddings.{name}_embeddings.weight"] = torch.randn(rows, width, generator=generator)
    for number in range(layers):
        prefix = f"encoder.layer.{number}."
        for name in ("query", "key", "value"):
            found |= dense(f"{prefix}attention.self.{name}", width, width)
        found |= dense(f"{prefix}attention.output.dense", width, width) | norm(f"{prefix}attention.output.LayerNorm")
        found |= dense(f"{prefix}intermediate.dense", 4 * width, width)
        found |= dense(f"{prefix}output.dense", width, 4 * width) | norm(f"{prefix}output.LayerNorm")
    gpunvme.save_file(found | dense("pooler.dense", width, width), path)
    return path


def forward(name: str, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute one layer of a BERT: token numbers into embeddings, states into states, the first state into a vector."""

    def dense(part: str, y: torch.Tensor) -> torch.Tensor:
        return linear(y, tensors[f"{part}.weight"], tensors[f"{part}.bias"])

    def norm(part: str, y: torch.Tensor) -> torch.Tensor:
        return layer_norm(y, y.shape[-1:], tensors[f"{part}.weight"], tensors[f"{part}.bias"], 1e-12)

    if name == "front":
        words, positions, types = (
            tensors[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type")
        )
        return norm("embeddings.LayerNorm", words[x] + positions[: x.shape[1]] + types[0])
    if name == "back":
        return torch.tanh(dense("pooler.dense", x[:, 0]))
    attention = f"{name}.attention"
    query, key, value = (
        dense(f"{attention}.self.{part}", x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    seen = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = norm(f"{attention}.output.LayerNorm", dense(f"{attention}.output.dense", seen) + x)
    wide = gelu(dense(f"{name}.intermediate.dense", x))
    return norm(f"{name}.output.LayerNorm", dense(f"{name}.output.dense", wide) + x)


def checkpoint_at_hand(directory: Path) -> Path:
    """Find the checkpoint of `gpunvme demo`, or make one."""
    from gpunvme.cli.demo import packaged_checkpoint
    from gpunvme.cli.exits import NotInstalledError

    try:
        return Path(packaged_checkpoint())
    except NotInstalledError as reason:
        print(f"a small model of random numbers ({reason})")
        return random_checkpoint(directory / "model.safetensors")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint", nargs="?")
parser.add_argument("--device", default="cpu")
parser.add_argument("--texts", type=int, default=3, help="how many passes")
arguments = parser.parse_args()

with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
    source = Path(arguments.checkpoint) if arguments.checkpoint else checkpoint_at_hand(Path(directory))
    whole = gpunvme.load_file(source, device=arguments.device)
    words = whole["embeddings.word_embeddings.weight"].shape[0]
    texts = torch.randint(words, (arguments.texts, 2, 20), generator=torch.Generator().manual_seed(2))
    equal = True
    with gpunvme.LayerLoader(source, arguments.device) as loader:
        for text in texts.to(arguments.device):
            y = text
            for layer in loader:  # while one is computed with, the next one is read
                y = forward(layer.name, layer.tensors, y)
            expected = text
            for name in loader.names:
                expected = forward(name, whole, expected)
            equal &= torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
        print(f"{len(loader)} layers, {loader.nbytes / 1e6:.1f} MB, {len(texts)} texts; {loader.stats()}")
    print(f"equal to the whole model: {equal}")
