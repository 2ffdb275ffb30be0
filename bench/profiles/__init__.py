"""Where one model's training step spends its time: a table per layer and a trace."""
