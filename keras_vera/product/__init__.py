"""The arithmetic of VeRA: products and their gradients, plans, A and B."""
