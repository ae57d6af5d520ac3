"""Learn interventions: the scales of a trust dial, and greedy choices of heads. Serving needs none of it."""
