"""`fedmoe dashboard`: a federation in a browser, and as a JSON API. It reads Redis and writes nothing."""
