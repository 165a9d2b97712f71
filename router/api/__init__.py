"""The API: OpenAI-compatible HTTP in front of the router core, and the token path from a bus frame to a socket."""
