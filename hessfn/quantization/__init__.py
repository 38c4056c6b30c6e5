"""What layers are given bits by: how much the loss minds errors in each."""
