"""Other people's one-shot pruning, written anew from their papers on our adapters, to compare with.

Every method is ``prune(network, space, batches, flops, *, align=64, seed=0) -> (plan, module)``: unlabelled batches
on the network's device, the part of the FLOPs to keep, and back the plan and a sliced, compensated module within the
budget's window. None of them draws random numbers; ``seed`` is there so that all are called alike. No code of theirs
is used.
"""
