"""How sparse may it be for my task? Ray Tune over sparsity and fine-tuning settings, Ray Train inside each trial."""
