"""Which tensors make a layer, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable

#: From a tensor's name to its layer; None leaves it out.
Group = Callable[[str], Hashable | None]

# The outermost number counts: "model.layers.3.mlp.experts.5.w1" belongs to layer 3.
_NUMBERED = re.compile(
    r"(?:^|\.)(?:layers|layer|h|blk|block|blocks|transformer_blocks|single_transformer_blocks|resblocks)\.(\d+)\."
)
# What comes first and last in a network is not where it comes in a file, which is often sorted by name.
_FRONT = re.compile(r"(?:^|[._])(?:embed|embeddings?|embed_tokens|token_embd|position_embd|wte|wpe)(?:[._]|$)")
_BACK = re.compile(r"^(?:lm_head|output|output_norm|score|classifier|pooler)\.|(?:^|\.)(?:norm|ln_f|final_\w*norm)\.")


def layers_of(names: Iterable[str], group: Group | None = None) -> dict[str, list[str]]:
    """Group tensors into layers, in the order in which they are used.

    Parameters
    ----------
    names
        Tensors in the order of the files' bytes.
    group
        Returns the layer of a name, None to leave it out. Layers come in the order of their first tensor, or where all
        are integers in that of the numbers. If None, names like ``model.layers.3.…``, ``transformer.h.3.…``,
        ``blk.3.…`` and ``encoder.layer.3.…`` are understood; each such stack is a run of layers in the order of the
        numbers, stacks come in the order of their first tensor. The others are in the layer ``"front"`` if they
        are embeddings, ``"back"`` if they are final norms or heads, and by their place in the files if neither.

    Returns
    -------
    dict
        ``{layer's name: tensors}``, tensors in the order of the files' bytes.
    """
    return _by_number(list(names)) if group is None else _by_function(names, group)


def _by_function(names: Iterable[str], group: Group) -> dict[str, list[str]]:
    found: dict[Hashable, list[str]] = {}
    for name in names:
        key = group(name)
        if key is not None:
            found.setdefault(key, []).append(name)
    keys = list(found)
    numbers = [key for key in keys if isinstance(key, int)]
    if len(numbers) == len(keys):
        return {str(key): found[key] for key in sorted(numbers)}
    named = {str(key): found[key] for key in keys}
    if len(named) != len(keys):
        raise ValueError(f"group= returned different layers of the same name: {', '.join(map(repr, keys))}")
    return named


def _by_number(names: list[str]) -> dict[str, list[str]]:
    stacks: dict[str, dict[int, list[str]]] = {}
    front: list[str] = []
    back: list[str] = []
    for name in names:
        match = _NUMBERED.search(name)
        if match is not None:
            stack = stacks.setdefault(name[: match.start(1)], {})
            stack.setdefault(int(match[1]), []).append(name)
        elif _FRONT.search(name):
            front.append(name)
        elif _BACK.search(name):
            back.append(name)
        else:
            (back if stacks else front).append(name)
    layers = {"front": front} if front else {}
    for prefix, stack in stacks.items():
        layers.update((f"{prefix}{number}", stack[number]) for number in sorted(stack))
    if back:
        layers["back"] = back
    return layers
