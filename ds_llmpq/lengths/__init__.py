"""How long answers will be: predictors of output length, and what a scheduler gains from them (simulated)."""
