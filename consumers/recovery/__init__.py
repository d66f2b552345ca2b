"""What aggregators do when Redis has lost something: it was emptied, came back from an older file, or was overwritten.

settle      before retained state is dropped: does Redis hold it, or is it written back, or does it give way?
compare     the decisions behind that. Pure
write_back  the commits that give Redis back what it lost
creation    an expert that is not there: was it never created, or is it lost? Only the first is created unasked
listing     the list of experts, brought in line with the experts there are

What an aggregator remembers for this while all is well is `consumers.history`; how an expert's parts are held against
each other is `fedmoe.protocol.condition`.
"""
