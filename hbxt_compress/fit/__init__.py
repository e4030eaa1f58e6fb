"""Whether a compressed model fits a card: what is resident when, foretold without weights."""
