"""Convert documents to Megatron's indexed tokens: readers, encoder, work list, shards, blend. Workers import no torch.

`prepare.prepare` is the entry point; other stages read `folder.DataFolder`.
"""
