from __future__ import annotations

from lowbit_server.quant.layout import Block, Linear, blocks


def test_layers_follow_in_order_of_number() -> None:
    names = ["model.layers.10.a", "model.layers.9.b", "model.norm", "model.layers.9.a", "embed"]
    linear = Linear("model.layers.9.a", 4, 8)
    # The weight's name is the layer's with a suffix.
    assert linear.weight == "model.layers.9.a.weight"
    assert blocks(names, [linear]) == [
        Block("", ("embed", "model.norm")),
        Block("model.layers.9", ("model.layers.9.a", "model.layers.9.b"), (linear,)),
        Block("model.layers.10", ("model.layers.10.a",)),
    ]


def test_numbers_inside_a_layer_do_not_split_it() -> None:
    names = [f"model.layers.0.experts.{number}.up" for number in range(3)]
    assert [block.name for block in blocks(names)] == ["", "model.layers.0"]
