"""The worker side: fine-tunes an adapter on private rows and publishes updates."""
