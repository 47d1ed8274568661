"""What the network computes: configuration, layers, forward and backward, checkpoints,
training.
"""
