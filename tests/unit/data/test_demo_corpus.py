"""The demo's corpus."""

from __future__ import annotations


def test_the_demos_corpus_is_real_text_in_a_fixed_order() -> None:
    from prune_distill.data.demo_corpus import documents

    train, validation = documents()
    assert (train, validation) == documents()
    assert len(train) > 500
    assert not set(train) & set(validation)
    assert 0.04 < len(validation) / len(train) < 0.06
    assert sum(map(len, train)) > 2e6
