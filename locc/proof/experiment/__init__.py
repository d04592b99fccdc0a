"""What the checks run a program in: a batch, worlds of real tensors and of shapes, and a state put back."""
