"""`fedmoe demo`: a whole federation on one machine, with a real model and real data."""
