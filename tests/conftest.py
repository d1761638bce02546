"""Settings of all tests."""

import torch

# The tensors are small: one thread is quicker than two, and far quicker where other processes want the cores, too.
torch.set_num_threads(1)
