"""Which token comes next: sampling, generation, and the way from token ids to text."""
