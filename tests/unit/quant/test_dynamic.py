from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.quant.dynamic import bits_of, mixed_layers, overrides
from lowbit_server.quant.schemes import LayerBits

NAMES = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.experts.{}.up", "h.{}.fc")


@given(
    mixed=st.dictionaries(st.integers(0, 130), st.sampled_from([2, 3, 8])),
    asked=st.lists(st.integers(0, 130), min_size=1),
    expert=st.integers(0, 130),
)
def test_layers_get_their_own_bits_and_are_known_again(
    mixed: dict[int, int], asked: list[int], expert: int
) -> None:
    layers = tuple(
        LayerBits.model_validate({"layer": number, "bits": bits})
        for number, bits in sorted(mixed.items())
    )
    config = {"bits": 4, "dynamic": overrides(layers)}
    for number in asked:
        for name in NAMES:
            assert bits_of(config, name.format(number, expert)) == mixed.get(number, 4)
    everywhere = [NAMES[0].format(number) for number in range(131)]
    assert mixed_layers(config, everywhere) == layers


def test_the_first_pattern_from_the_start_of_a_name_counts() -> None:
    config = {
        "bits": 4,
        "dynamic": {
            r"-:.*\.down": {},
            r".*\.1\.mlp\.gate": {"bits": 8, "group_size": 32},
            r"+:.*\.1\.mlp": {"bits": 3},
            r"mlp": {"bits": 2},
            r"+:.*\.2\.": {"group_size": 32},
        },
    }
    assert bits_of(config, "model.layers.1.mlp.gate") == 8
    assert bits_of(config, "model.layers.1.mlp.up") == 3
    assert bits_of(config, "model.layers.2.mlp.up") == 4
    assert bits_of(config, "model.layers.0.mlp.up") == 4
    names = [f"model.layers.{layer}.mlp.{part}" for layer in range(3) for part in ("gate", "up")]
    assert mixed_layers(config, names) == (LayerBits(layer=1, bits=8),)


def test_without_overrides_all_layers_are_alike() -> None:
    for config in ({"bits": 4}, {"bits": 4, "dynamic": None}, {"bits": 4, "dynamic": {}}):
        assert bits_of(config, "model.layers.1.mlp.up") == 4
        assert mixed_layers(config, ["model.layers.1.mlp.up"]) == ()
