"""What the command line trains: image data, the reference CNN, the loop, its checkpoints and its pictures."""
