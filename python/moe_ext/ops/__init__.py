"""The ops, one module per family: wrapper, fake and autograd formula of each."""
