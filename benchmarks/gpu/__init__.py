"""What attention costs on a GPU, in both frameworks, against the peers that are installed."""
