"""Where routed experts live, move and compute. Knows nothing of models, chat, HTTP or sampling."""
