"""What it costs and what it buys: perplexity, roofline, memory, and the figures that show them."""
