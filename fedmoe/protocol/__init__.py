"""What both sides must agree on: names, keys, records, arithmetic. Pure: no Redis, no transformers."""
