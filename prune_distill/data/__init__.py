"""Documents to Megatron's indexed tokens: readers, encoder, work list, shards, blend. No NeMo, and no torch in workers.

`prepare.prepare` is the way in, `folder.DataFolder` what other stages read.
"""
