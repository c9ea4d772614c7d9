"""Which tensors make a layer: real models' names, and a caller's own idea. And which layers stay under a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpunvme.errors import BudgetError
from gpunvme.models.grouping import layers_of
from gpunvme.models.residency import plan, spread

#: Names in the order of a file, and the layers that they make.
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "Llama, safetensors": (
        "lm_head.weight model.embed_tokens.weight model.layers.0.a model.layers.10.a model.layers.2.a model.norm.w",
        {
            "front": "model.embed_tokens.weight",
            "model.layers.0": "model.layers.0.a",
            "model.layers.2": "model.layers.2.a",
            "model.layers.10": "model.layers.10.a",
            "back": "lm_head.weight model.norm.w",
        },
    ),
    "Llama, GGUF": (
        "output.weight token_embd.weight rope_freqs.weight blk.1.x blk.0.x output_norm.weight",
        {
            "front": "token_embd.weight rope_freqs.weight",
            "blk.0": "blk.0.x",
            "blk.1": "blk.1.x",
            "back": "output.weight output_norm.weight",
        },
    ),
    "GPT-2": (
        "h.0.attn.bias h.0.ln_1.weight h.1.ln_1.weight ln_f.bias wpe.weight wte.weight",
        {
            "front": "wpe.weight wte.weight",
            "h.0": "h.0.attn.bias h.0.ln_1.weight",
            "h.1": "h.1.ln_1.weight",
            "back": "ln_f.bias",
        },
    ),
    "BERT": (
        "embeddings.LayerNorm.bias encoder.layer.0.a.b encoder.layer.1.a.b pooler.dense.bias",
        {
            "front": "embeddings.LayerNorm.bias",
            "encoder.layer.0": "encoder.layer.0.a.b",
            "encoder.layer.1": "encoder.layer.1.a.b",
            "back": "pooler.dense.bias",
        },
    ),
    "experts": (
        "model.layers.0.mlp.experts.0.w model.layers.0.mlp.experts.1.w model.layers.1.mlp.experts.0.w",
        {
            "model.layers.0": "model.layers.0.mlp.experts.0.w model.layers.0.mlp.experts.1.w",
            "model.layers.1": "model.layers.1.mlp.experts.0.w",
        },
    ),
    "two stacks": (
        "encoder.block.0.layer.0.q encoder.block.1.layer.0.q decoder.block.0.layer.1.q other",
        {
            "encoder.block.0": "encoder.block.0.layer.0.q",
            "encoder.block.1": "encoder.block.1.layer.0.q",
            "decoder.block.0": "decoder.block.0.layer.1.q",
            "back": "other",
        },
    ),
    "no layers": ("a b", {"front": "a b"}),
    "nothing": ("", {}),
}


@pytest.mark.parametrize("model", MODELS)
def test_by_the_usual_names(model: str) -> None:
    names, expected = MODELS[model]
    found = layers_of(names.split())
    assert list(found.items()) == [(layer, tensors.split()) for layer, tensors in expected.items()]


def test_by_a_function() -> None:
    names = ["b.2", "a.1", "c.10", "b.1", "x"]
    assert layers_of(names, lambda name: name[0] if name != "x" else None) == {
        "b": ["b.2", "b.1"],
        "a": ["a.1"],
        "c": ["c.10"],
    }
    assert list(layers_of(names[:4], lambda name: int(name[2:]))) == ["1", "2", "10"]
    with pytest.raises(ValueError, match="same name"):
        layers_of(names, lambda name: 1 if name == "x" else "1")


@given(
    st.lists(
        st.sampled_from(["a", "model.layers.0.x", "h.3.y", "blk.1.z", "norm.w", "embed.w"]).flatmap(
            lambda stem: st.integers(0, 99).map(lambda number: f"{stem}{number}")
        ),
        unique=True,
    )
)
def test_every_tensor_is_in_one_layer(names: list[str]) -> None:
    assert sorted(name for layer in layers_of(names).values() for name in layer) == sorted(names)


sizes = st.lists(st.integers(0, 9).map(lambda n: n * 100) | st.integers(0, 1000), min_size=1, max_size=12)


@given(sizes, st.integers(1, 4), st.integers(0, 6000))
def test_a_plan_keeps_its_budget(sizes: list[int], slots: int, budget: int) -> None:
    slots = min(slots, len(sizes))
    try:
        stay, slot = plan(sizes, slots, budget, "budget")
    except BudgetError:
        # No choice at all would have fitted: whatever stays, the slots have to hold the largest of the others.
        order = sorted(sizes)
        needs = [sum(order[count:]) + slots * order[count - 1] for count in range(1, len(order) + 1)]
        assert min([*needs, sum(sizes)]) > budget
        return
    rest = [size for number, size in enumerate(sizes) if number not in stay]
    assert all(size <= slot for size in rest)
    assert sum(sizes[number] for number in stay) + (slots * slot if rest else 0) <= budget


def test_equal_layers_are_spread_over_the_pass() -> None:
    assert sorted(spread(range(32), [10] * 32, 80)) == [2, 6, 10, 14, 18, 22, 26, 30]
    assert sorted(spread(range(4), [10] * 4, 5)) == []
    assert sorted(plan([10] * 6, 2, 50, "b").stay) == [1, 3, 5]


def test_one_layer_that_is_larger_than_all_others_stays() -> None:
    """Slots of its size would waste what many others could stay in."""
    stay, slot = plan([100, 10, 10, 10, 10, 10], 2, 145, "b")
    assert (0 in stay, slot) == (True, 10)
    assert sum([100, 10, 10, 10, 10, 10][number] for number in stay) == 120
