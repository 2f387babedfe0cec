"""Set-up that every test shares."""

import torch

# Tests start processes of their own: two threads in each would fight over the cores.
torch.set_num_threads(1)
