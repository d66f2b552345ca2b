"""Try a federation out: an OpenAI-compatible endpoint and a chat, answered by the gateway or an expert."""
