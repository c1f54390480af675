"""Training: optimizers, EMA, the steps and the loop around them."""
