"""Recovery after Redis lost data: it was emptied, came back from an older file, or a key was overwritten.

settle      before retained state is dropped: write it back if Redis lost it, or let Redis's state replace it
compare     the decisions behind `settle`. Pure
write_back  the commits that restore what Redis lost
creation    tell a lost expert from one that was never created; only the latter is created automatically
listing     reconcile the list of experts with the experts in Redis

`consumers.history` records what an aggregator needs for this; `fedmoe.protocol.condition` checks that an expert's parts
belong together.
"""
