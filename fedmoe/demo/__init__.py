"""`fedmoe demo`: the whole thing on one machine, on a real model and real data."""
