"""What the paper claims, tried where the truth is known: a mixture in two dimensions, with an exact teacher."""
