from __future__ import annotations

import pytest

from convert.exporting import pruned_config
from prune_distill.errors import InputError

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 48,
}


def test_an_exported_config_has_the_new_sizes() -> None:
    source = {**dict.fromkeys(SIZES, 9), "rope_theta": 7.0, "eos_token_id": 3, "dtype": "float32"}
    source |= {"layer_types": ["full_attention"] * 4, "max_window_layers": 4}
    config = pruned_config(source, SIZES)
    assert config == {
        **SIZES,
        "rope_theta": 7.0,
        "eos_token_id": 3,
        "dtype": "float32",
        "layer_types": ["full_attention"] * 2,
        "max_window_layers": 2,
    }


def test_layers_of_several_types_are_rejected() -> None:
    with pytest.raises(InputError, match="full_attention', 'sliding_attention"):
        pruned_config(
            {"num_hidden_layers": 9, "layer_types": ["full_attention", "sliding_attention"]},
            SIZES,
        )
